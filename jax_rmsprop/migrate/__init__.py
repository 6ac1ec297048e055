"""Optimizer state from other frameworks and back, for a training to go on elsewhere.

    state = migrate.from_torch(checkpoint, params, layout=layout)
    torch_optimizer.load_state_dict(
        migrate.to_torch(state, params, torch_optimizer, layout=layout)
    )

Each pair of functions moves the state of one framework's RMSProp into that of its
function in `jax_rmsprop.conventions`, and back; the steps that follow are the same on
both sides. What is no state, such as the learning rate, is the caller's; of a PyTorch
checkpoint `settings` reads it: `conventions.pytorch(**migrate.settings(checkpoint))`.

The caller's `layout` says which of their arrays is which of ours. It is one function,
for parameters and state alike: it takes a tree like the parameters and returns their
arrays by name. A Flax kernel is [in, out] and a PyTorch weight [out, in], so

    def layout(tree):
        return {"fc.weight": tree["fc"]["kernel"].T, "fc.bias": tree["fc"]["bias"]}

Then `layout(params)` is their parameters, and `from_named` is the way back. A layout
may rename, transpose, reshape, split and stack, with NumPy's or JAX's functions; each
element must come out once and unchanged.

One thing is not kept alike: where others have the average of g^2, the nu of a centered
`RMSPropState` is the variance, nu - mu^2. Both ways are computed in float64, and
a variance that their rounding made negative becomes 0.

What is missing, unknown or of another shape is refused in one line that names the entry
(ValueError). None of this needs the other framework: arrays are read through NumPy, and
tensors made by those that the caller passes.
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
