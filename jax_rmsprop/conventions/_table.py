"""The values in which the frameworks' RMSProps, and published recipes, differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Convention:
    """The values in which one framework's RMSProp differs from another's.

    For people and `explain`: the framework's function has its own. Where something else
    decides, the value is words (in parentheses the framework's argument for it).

    Attributes:
      framework: whose RMSProp it is.
      argument_names: the framework's name of an argument of `rmsprop`, where it has
        another.
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
      title: what it trained.
      convention: the framework whose RMSProp it ran, a key of `CONVENTIONS`.
      settings: the arguments it set, beside the learning rate.
    """

    title: str
    convention: str
    settings: Mapping[str, Any]


def _frozen(**items: Any) -> Mapping[str, Any]:
    return MappingProxyType(items)


_LR_ALPHA = _frozen(learning_rate="lr", gamma="alpha")
_RHO_EPSILON = _frozen(gamma="rho", eps="epsilon")
_DECAY_EPSILON = _frozen(gamma="decay", eps="epsilon")
_MXNET1 = _frozen(gamma="gamma1", momentum="gamma2", eps="epsilon", weight_decay="wd")
_MXNET2 = _frozen(gamma="rho", eps="epsilon", weight_decay="wd")

CONVENTIONS: Mapping[str, Convention] = _frozen(
    pytorch=Convention(
        framework="PyTorch",
        argument_names=_LR_ALPHA,
        eps_in_sqrt=False,
        initial_scale=0.0,
        lr_in_momentum=False,
        decoupled_weight_decay=False,
    ),
    keras=Convention(
        framework="Keras 3",
        argument_names=_RHO_EPSILON,
        eps_in_sqrt=True,
        initial_scale=0.0,
        lr_in_momentum=True,
        decoupled_weight_decay=True,
    ),
    tensorflow1=Convention(
        framework="TensorFlow 1",
        argument_names=_DECAY_EPSILON,
        eps_in_sqrt=True,
        initial_scale=1.0,
        lr_in_momentum=True,
        decoupled_weight_decay=None,
    ),
    tf_keras_v2=Convention(
        framework="tf.keras, OptimizerV2",
        argument_names=_RHO_EPSILON,
        eps_in_sqrt="inside if there is momentum",
        initial_scale=0.0,
        lr_in_momentum=True,
        decoupled_weight_decay=None,
    ),
    timm=Convention(
        framework="timm, RMSpropTF",
        argument_names=_LR_ALPHA,
        eps_in_sqrt=True,
        initial_scale=1.0,
        lr_in_momentum="before (`lr_in_momentum`)",
        decoupled_weight_decay="coupled (`decoupled_decay`)",
    ),
    stable_baselines3=Convention(
        framework="Stable-Baselines3",
        argument_names=_LR_ALPHA,
        eps_in_sqrt=True,
        initial_scale=1.0,
        lr_in_momentum=False,
        decoupled_weight_decay=False,
    ),
    mxnet1=Convention(
        framework="MXNet 1",
        argument_names=_MXNET1,
        eps_in_sqrt=True,
        initial_scale=0.0,
        lr_in_momentum="before, if `centered`",
        decoupled_weight_decay="coupled, then clipped",
    ),
    mxnet2=Convention(
        framework="MXNet 2",
        argument_names=_MXNET2,
        eps_in_sqrt="inside if `centered`",
        initial_scale=0.0,
        lr_in_momentum="before, if `centered`",
        decoupled_weight_decay="clipped, then coupled",
    ),
    optax=Convention(
        framework="Optax",
        argument_names=_frozen(gamma="decay"),
        eps_in_sqrt="inside (`eps_in_sqrt`)",
        initial_scale=0.0,
        lr_in_momentum=True,
        decoupled_weight_decay=None,
    ),
    bitsandbytes=Convention(
        framework="bitsandbytes",
        argument_names=_LR_ALPHA,
        eps_in_sqrt=False,
        initial_scale=0.0,
        lr_in_momentum=None,
        decoupled_weight_decay=False,
    ),
    chainer=Convention(
        framework="Chainer",
        argument_names=_LR_ALPHA,
        eps_in_sqrt="outside (`eps_inside_sqrt`)",
        initial_scale=0.0,
        lr_in_momentum=None,
        decoupled_weight_decay=None,
    ),
    paddle=Convention(
        framework="PaddlePaddle",
        argument_names=_RHO_EPSILON,
        eps_in_sqrt=True,
        initial_scale=0.0,
        lr_in_momentum=True,
        decoupled_weight_decay=False,
    ),
    mlx=Convention(
        framework="MLX",
        argument_names=_frozen(gamma="alpha"),
        eps_in_sqrt=False,
        initial_scale=0.0,
        lr_in_momentum=None,
        decoupled_weight_decay=None,
    ),
    flax_legacy=Convention(
        framework="Flax, flax.optim",
        argument_names=_frozen(gamma="beta2"),
        eps_in_sqrt=False,
        initial_scale=0.0,
        lr_in_momentum=None,
        decoupled_weight_decay=None,
    ),
    jax_example_libraries=Convention(
        framework="JAX's examples",
        argument_names=_frozen(learning_rate="step_size"),
        eps_in_sqrt=True,
        initial_scale=0.0,
        lr_in_momentum=True,
        decoupled_weight_decay=None,
    ),
    sonnet=Convention(
        framework="Sonnet 2",
        argument_names=_DECAY_EPSILON,
        eps_in_sqrt=True,
        initial_scale=0.0,
        lr_in_momentum=True,
        decoupled_weight_decay=None,
    ),
    laprop=Convention(
        framework="LaProp",
        argument_names=_frozen(learning_rate="lr", gamma="betas"),
        eps_in_sqrt=False,
        initial_scale="0, corrected",
        lr_in_momentum="before, corrected",
        decoupled_weight_decay="after the step, without the rate",
    ),
    dreamer_v3=Convention(
        framework="DreamerV3",
        argument_names=_frozen(learning_rate="lr", gamma="beta2"),
        eps_in_sqrt=False,
        initial_scale="0, corrected",
        lr_in_momentum=False,
        decoupled_weight_decay=None,
    ),
    d2l=Convention(
        framework="the textbook",
        argument_names=_frozen(learning_rate="lr"),
        eps_in_sqrt=True,
        initial_scale=0.0,
        lr_in_momentum=None,
        decoupled_weight_decay=None,
    ),
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
