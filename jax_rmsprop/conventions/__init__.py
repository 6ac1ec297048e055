"""Every framework's RMSProp, under its own argument names, order and defaults.

`conventions.pytorch(lr=1e-2, momentum=0.9)` takes the steps of `torch.optim.RMSprop`
with the same arguments, and so on; `conventions.nature_dqn()` and the like are
published recipes. `CONVENTIONS` has the values in which the frameworks differ;
`explain` and `python -m jax_rmsprop.conventions` print them.

Each function returns an Optax transformation built from `rmsprop` and parts of Optax,
with the guarantees of `rmsprop`. Numbers may be arrays or tracers. Learning rate, decay
of the average, momentum and weight decay may be schedules (functions of the step, from
0) where `rmsprop` accepts one. State and arithmetic are float32 or wider, and an update
has the dtype of its gradient. A wrong value raises a TypeError or ValueError in the
framework's terms. Arguments without effect here, such as PyTorch's `foreach`, are
accepted and ignored; features that are not supported, such as Keras's `use_ema`, are
not arguments. A momentum of 0 allocates no buffer. For parameter groups use
`optax.partition` with one of these for each group.

In the equations x is a parameter, g its gradient, nu the average of g^2 or, if
`centered`, the variance; b is the momentum buffer, which starts at 0. Arguments without
a description are as in the equations and in `rmsprop`.

    >>> import jax.numpy as jnp
    >>> from jax_rmsprop import conventions
    >>> params = jnp.ones(3)
    >>> steps = []
    >>> for make in (conventions.pytorch, conventions.tensorflow1):
    ...     optimizer = make(0.01)
    ...     update, _ = optimizer.update(0.1 * params, optimizer.init(params), params)
    ...     steps.append(f"{update[0]:.4f}")
    >>> steps
    ['-0.1000', '-0.0011']
"""

from jax_rmsprop.conventions._explain import explain
from jax_rmsprop.conventions._jax import flax_legacy, jax_example_libraries, optax
from jax_rmsprop.conventions._laprop import dreamer_v3, laprop
from jax_rmsprop.conventions._mxnet import mxnet1, mxnet2
from jax_rmsprop.conventions._others import chainer, d2l, mlx, paddle
from jax_rmsprop.conventions._pytorch import (
    bitsandbytes,
    pytorch,
    stable_baselines3,
    timm,
)
from jax_rmsprop.conventions._recipes import (
    dopamine_dqn,
    dqn_zoo,
    efficientnet,
    impala,
    mobilenet_v3,
    nature_dqn,
)
from jax_rmsprop.conventions._table import CONVENTIONS, RECIPES, Convention, Recipe
from jax_rmsprop.conventions._tensorflow import keras, sonnet, tensorflow1, tf_keras_v2

__all__ = [
    "RECIPES",
    "CONVENTIONS",
    "Convention",
    "Recipe",
    "bitsandbytes",
    "chainer",
    "d2l",
    "dopamine_dqn",
    "dqn_zoo",
    "dreamer_v3",
    "efficientnet",
    "explain",
    "flax_legacy",
    "impala",
    "jax_example_libraries",
    "keras",
    "laprop",
    "mlx",
    "mobilenet_v3",
    "mxnet1",
    "mxnet2",
    "nature_dqn",
    "optax",
    "paddle",
    "pytorch",
    "sonnet",
    "stable_baselines3",
    "tensorflow1",
    "tf_keras_v2",
    "timm",
]
