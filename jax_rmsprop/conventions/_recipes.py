"""The RMSProp settings of published results."""

from __future__ import annotations

from jax_rmsprop import _validate
from jax_rmsprop._validate import NumberOrSchedule
from jax_rmsprop.conventions._jax import optax
from jax_rmsprop.conventions._pytorch import pytorch
from jax_rmsprop.conventions._table import RECIPES
from jax_rmsprop.conventions._tensorflow import keras, tensorflow1
from jax_rmsprop.conventions._wrap import Transformation


def nature_dqn(learning_rate: NumberOrSchedule = 2.5e-4) -> Transformation:
    """DQN in Nature: `keras` with rho 0.95, epsilon 0.01 and centered.

    The paper's "gradient momentum" 0.95 is the decay of the gradient's average, and its
    "min squared gradient" 0.01 is eps: there is no momentum.

    Example:
      >>> optimizer = nature_dqn()

    References:
      Mnih et al., Human-level control through deep reinforcement learning, Nature 518,
      2015, extended data table 1, https://doi.org/10.1038/nature14236; the steps are
      those of the code published with it, NeuralQLearner.lua.
    """
    return _recipe("nature_dqn", learning_rate)


def dopamine_dqn(learning_rate: NumberOrSchedule = 2.5e-4) -> Transformation:
    """Dopamine's DQN: `tensorflow1` with decay 0.95, epsilon 1e-5 and centered.

    Dopamine's JAX agents use Optax, whose nu starts at 0 instead of 1.

    Example:
      >>> optimizer = dopamine_dqn()

    References:
      Castro et al., Dopamine, 2018, https://arxiv.org/abs/1812.06110;
      https://github.com/google/dopamine/blob/master/dopamine/agents/dqn/configs/dqn.gin
    """
    return _recipe("dopamine_dqn", learning_rate)


def dqn_zoo(learning_rate: NumberOrSchedule = 2.5e-4) -> Transformation:
    """DQN Zoo's DQN: `optax` with decay 0.95, eps 0.01 / 32^2 and centered.

    It is `nature_dqn` for another loss: there the losses of a batch of 32 are summed,
    here they are averaged. So gradients are 32 times smaller and their squares 32^2
    times, and eps is scaled accordingly. The steps are the same.

    Example:
      >>> import jax.numpy as jnp
      >>> summed = jnp.array([3.2, -0.1])
      >>> steps = []
      >>> for optimizer, g in ((nature_dqn(), summed), (dqn_zoo(), summed / 32)):
      ...     updates, _ = optimizer.update(g, optimizer.init(g))
      ...     steps.append([f"{u:.4e}" for u in updates])
      >>> steps[0] == steps[1], steps[0]
      (True, ['-1.1355e-03', '2.4427e-04'])

    References:
      Quan and Ostrovski, DQN Zoo, 2020,
      https://github.com/google-deepmind/dqn_zoo/blob/master/dqn_zoo/dqn/run_atari.py
    """
    return _recipe("dqn_zoo", learning_rate)


def impala(learning_rate: NumberOrSchedule = 6e-4) -> Transformation:
    """IMPALA on Atari, as TorchBeast runs it: `pytorch` with alpha 0.99 and eps 0.01.

    There the rate falls linearly to 0 and the gradient's global norm is clipped to 40:
    `optax.linear_schedule` and `optax.clip_by_global_norm`. The original authors' code
    uses `tensorflow1(4.8e-4, decay=0.99, epsilon=0.1)`.

    Example:
      >>> optimizer = impala()

    References:
      Espeholt et al., IMPALA, 2018, https://arxiv.org/abs/1802.01561; Kuettler et al.,
      TorchBeast, 2019, https://arxiv.org/abs/1910.03552;
      https://github.com/facebookresearch/torchbeast/blob/main/torchbeast/monobeast.py
    """
    return _recipe("impala", learning_rate)


def efficientnet(learning_rate: NumberOrSchedule = 0.016) -> Transformation:
    """EfficientNet: `tensorflow1` with decay 0.9, momentum 0.9 and epsilon 1e-3.

    The rate is for batches of 256, is proportional to the batch size, and decays by
    0.97 every 2.4 epochs after 5 of warm-up. There the loss includes a weight decay of
    1e-5.

    Example:
      >>> optimizer = efficientnet()

    References:
      Tan and Le, EfficientNet, 2019, https://arxiv.org/abs/1905.11946;
      https://github.com/tensorflow/tpu/blob/master/models/official/efficientnet/utils.py
    """
    return _recipe("efficientnet", learning_rate)


def mobilenet_v3(learning_rate: NumberOrSchedule = 0.064) -> Transformation:
    """MobileNetV3 in torchvision: `pytorch`, eps 0.0316, momentum and alpha 0.9.

    The weight decay is 1e-5. The rate is for batches of 1024 and decays by 0.973 every
    2 epochs. The eps is the root of 1e-3, which other code adds inside the root.

    Example:
      >>> optimizer = mobilenet_v3()

    References:
      Howard et al., Searching for MobileNetV3, 2019, https://arxiv.org/abs/1905.02244;
      https://github.com/pytorch/vision/tree/main/references/classification
    """
    return _recipe("mobilenet_v3", learning_rate)


# The conventions that recipes use.
_RAN = {f.__name__: f for f in (keras, optax, pytorch, tensorflow1)}


def _recipe(name: str, learning_rate: NumberOrSchedule) -> Transformation:
    recipe = RECIPES[name]
    # Under the recipe's own argument name, which may differ from the convention's.
    rate = _validate.check_scalar("learning_rate", learning_rate, schedule=True)
    return _RAN[recipe.convention](rate, **recipe.settings)
