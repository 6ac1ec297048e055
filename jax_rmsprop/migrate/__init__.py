"""Convert optimizer state from and to other frameworks, to resume a training.

    state = migrate.from_torch(checkpoint, params, layout=layout)
    torch_optimizer.load_state_dict(
        migrate.to_torch(state, params, torch_optimizer, layout=layout)
    )

Each pair of functions converts between the state of one framework's RMSProp and that of
its function in `jax_rmsprop.conventions`; both sides then take the same steps. Settings
that are not state, such as the learning rate, are not converted. `settings` reads those
of a PyTorch checkpoint: `conventions.pytorch(**migrate.settings(checkpoint))`.

`layout` maps our arrays to theirs, for parameters and state alike. It takes a tree like
the parameters and returns their arrays by name. A Flax kernel is [in, out] and a
PyTorch weight [out, in], so

    def layout(tree):
        return {"fc.weight": tree["fc"]["kernel"].T, "fc.bias": tree["fc"]["bias"]}

`layout(params)` gives their parameters, and `from_named` inverts it. A layout may
rename, transpose, reshape, split and stack with functions of NumPy or JAX, and must
return each element exactly once, unchanged.

One difference: the nu of a centered `RMSPropState` is the variance, nu - mu^2, where
other frameworks store the average of g^2. The conversion is computed in float64; a
variance made negative by their rounding becomes 0.

An entry that is missing, unknown or of another shape raises a ValueError that names it.
The other framework need not be installed: arrays are read through NumPy, and tensors
are created by those that the caller passes.
"""

from jax_rmsprop.migrate._keras import from_keras, to_keras
from jax_rmsprop.migrate._named import from_named
from jax_rmsprop.migrate._optax import from_optax, to_optax
from jax_rmsprop.migrate._tensorflow import from_tf1, to_tf1
from jax_rmsprop.migrate._torch import (
    from_bitsandbytes,
    from_timm,
    from_torch,
    settings,
    to_bitsandbytes,
    to_timm,
    to_torch,
)

__all__ = [
    "from_bitsandbytes",
    "from_keras",
    "from_named",
    "from_optax",
    "from_tf1",
    "from_timm",
    "from_torch",
    "settings",
    "to_bitsandbytes",
    "to_keras",
    "to_optax",
    "to_tf1",
    "to_timm",
    "to_torch",
]
