"""The values in which the frameworks' RMSProps, and published recipes, differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Convention:
    """The values in which one framework's RMSProp differs from another's.

    For readers and `explain`; the framework's function has its own copies. A value that
    depends on other settings is text (with the framework's argument in parentheses).

    Attributes:
      framework: the framework's name.
      argument_names: the framework's names of arguments of `rmsprop`, if they differ.
      eps_in_sqrt: as in `rmsprop`.
      initial_scale: as in `rmsprop`.
      lr_in_momentum: as in `rmsprop`; None if there is no momentum.
      decoupled_weight_decay: as in `rmsprop`; None if there is no decay.
    """

    framework: str
    argument_names: Mapping[str, str]
    eps_in_sqrt: bool | str
    initial_scale: float | str
    lr_in_momentum: bool | str | None
    decoupled_weight_decay: bool | str | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A published recipe.

    Attributes:
      title: the model or algorithm.
      convention: the framework whose RMSProp it used, a key of `CONVENTIONS`.
      settings: the arguments it set, except the learning rate.
    """

    title: str
    convention: str
    settings: Mapping[str, Any]


def _frozen(**items: Any) -> Mapping[str, Any]:
    return MappingProxyType(items)


_LR_ALPHA = _frozen(learning_rate="lr", gamma="alpha")
_RHO_EPSILON = _frozen(gamma="rho", eps="epsilon")
_DECAY = _frozen(gamma="decay")
_DECAY_EPSILON = _frozen(gamma="decay", eps="epsilon")
_MXNET1 = _frozen(gamma="gamma1", momentum="gamma2", eps="epsilon", weight_decay="wd")
_MXNET2 = _frozen(gamma="rho", eps="epsilon", weight_decay="wd")

# The fields above: framework, names, eps inside the root, initial nu, the rate before
# the momentum, decoupled decay.
CONVENTIONS: Mapping[str, Convention] = _frozen(
    pytorch=Convention("PyTorch", _LR_ALPHA, False, 0.0, False, False),
    keras=Convention("Keras 3", _RHO_EPSILON, True, 0.0, True, True),
    tensorflow1=Convention("TensorFlow 1", _DECAY_EPSILON, True, 1.0, True, None),
    tf_keras_v2=Convention(
        *("tf.keras, OptimizerV2", _RHO_EPSILON, "inside if there is momentum", 0.0),
        *(True, None),
    ),
    timm=Convention(
        *("timm, RMSpropTF", _LR_ALPHA, True, 1.0),
        *("before (`lr_in_momentum`)", "coupled (`decoupled_decay`)"),
    ),
    stable_baselines3=Convention(
        "Stable-Baselines3", _LR_ALPHA, True, 1.0, False, False
    ),
    mxnet1=Convention(
        *("MXNet 1", _MXNET1, True, 0.0),
        *("before, if `centered`", "coupled, then clipped"),
    ),
    mxnet2=Convention(
        *("MXNet 2", _MXNET2, "inside if `centered`", 0.0),
        *("before, if `centered`", "clipped, then coupled"),
    ),
    optax=Convention("Optax", _DECAY, "inside (`eps_in_sqrt`)", 0.0, True, None),
    bitsandbytes=Convention("bitsandbytes", _LR_ALPHA, False, 0.0, None, False),
    chainer=Convention(
        "Chainer", _LR_ALPHA, "outside (`eps_inside_sqrt`)", 0.0, None, None
    ),
    paddle=Convention("PaddlePaddle", _RHO_EPSILON, True, 0.0, True, False),
    mlx=Convention("MLX", _frozen(gamma="alpha"), False, 0.0, None, None),
    flax_legacy=Convention(
        "Flax, flax.optim", _frozen(gamma="beta2"), False, 0.0, None, None
    ),
    jax_example_libraries=Convention(
        "JAX's examples", _frozen(learning_rate="step_size"), True, 0.0, True, None
    ),
    sonnet=Convention("Sonnet 2", _DECAY_EPSILON, True, 0.0, True, None),
    laprop=Convention(
        *("LaProp", _frozen(learning_rate="lr", gamma="betas"), False, "0, corrected"),
        *("before, corrected", "after the step, without the rate"),
    ),
    dreamer_v3=Convention(
        *("DreamerV3", _frozen(learning_rate="lr", gamma="beta2"), False),
        *("0, corrected", False, None),
    ),
    d2l=Convention("the textbook", _frozen(learning_rate="lr"), True, 0.0, None, None),
)

RECIPES: Mapping[str, Recipe] = _frozen(
    nature_dqn=Recipe(
        "DQN in Nature", "keras", _frozen(rho=0.95, epsilon=0.01, centered=True)
    ),
    dopamine_dqn=Recipe(
        "Dopamine's DQN",
        "tensorflow1",
        _frozen(decay=0.95, epsilon=1e-5, centered=True),
    ),
    dqn_zoo=Recipe(
        "DQN Zoo", "optax", _frozen(decay=0.95, eps=0.01 / 32**2, centered=True)
    ),
    impala=Recipe("IMPALA", "pytorch", _frozen(alpha=0.99, eps=0.01)),
    efficientnet=Recipe(
        "EfficientNet", "tensorflow1", _frozen(decay=0.9, momentum=0.9, epsilon=1e-3)
    ),
    mobilenet_v3=Recipe(
        "MobileNetV3",
        "pytorch",
        _frozen(alpha=0.9, eps=0.0316, weight_decay=1e-5, momentum=0.9),
    ),
)
