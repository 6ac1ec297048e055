"""The RMSProps of Chainer, PaddlePaddle, MLX and the textbook."""

from __future__ import annotations

from jax_rmsprop import _validate
from jax_rmsprop._validate import Number, NumberOrSchedule
from jax_rmsprop.conventions._wrap import Transformation, named


def chainer(
    lr: NumberOrSchedule = 0.01,
    alpha: NumberOrSchedule = 0.99,
    eps: Number = 1e-8,
    eps_inside_sqrt: bool = False,
) -> Transformation:
    """Chainer's `chainer.optimizers.RMSprop`.

        x = x - lr * g / (sqrt(nu) + eps)          or, if `eps_inside_sqrt`,
        x = x - lr * g / sqrt(nu + eps)

    Example:
      >>> optimizer = chainer(lr=1e-3, eps_inside_sqrt=True)

    References:
      https://github.com/chainer/chainer/blob/v7.8.1/chainer/optimizers/rmsprop.py
    """
    return named(
        {"learning_rate": "lr", "gamma": "alpha"},
        learning_rate=lr,
        gamma=alpha,
        eps=eps,
        eps_in_sqrt=_validate.check_bool("eps_inside_sqrt", eps_inside_sqrt),
    )


def paddle(
    learning_rate: NumberOrSchedule,
    rho: NumberOrSchedule = 0.95,
    epsilon: Number = 1e-6,
    momentum: Number = 0.0,
    centered: bool = False,
    *,
    weight_decay: Number | None = None,
    name: str | None = None,
) -> Transformation:
    """PaddlePaddle's `paddle.optimizer.RMSProp`.

        g = g + weight_decay * x
        b = momentum * b + learning_rate * g / sqrt(nu + epsilon)
        x = x - b

    The parameters are passed to `init`, not here. Paddle clips before the decay: for
    its `grad_clip`, put Optax's clipping before this in a chain. `name` is ignored.

    Example:
      >>> optimizer = paddle(0.01, momentum=0.9, weight_decay=1e-4)

    References:
      https://github.com/PaddlePaddle/Paddle/blob/v3.3.1/python/paddle/optimizer/rmsprop.py
    """
    del name
    return named(
        {"gamma": "rho", "eps": "epsilon"},
        learning_rate=learning_rate,
        gamma=rho,
        eps=epsilon,
        centered=centered,
        momentum=momentum,
        weight_decay=0.0 if weight_decay is None else weight_decay,
        decoupled_weight_decay=False,
    )


def mlx(
    learning_rate: NumberOrSchedule,
    alpha: NumberOrSchedule = 0.99,
    eps: Number = 1e-8,
) -> Transformation:
    """MLX's `mlx.optimizers.RMSprop`.

        x = x - learning_rate * g / (sqrt(nu) + eps)

    Example:
      >>> optimizer = mlx(1e-3)

    References:
      https://github.com/ml-explore/mlx/blob/v0.32.4/python/mlx/optimizers/optimizers.py
    """
    return named(
        {"gamma": "alpha"},
        learning_rate=learning_rate,
        gamma=alpha,
        eps=eps,
        eps_in_sqrt=False,
    )


def d2l(
    lr: NumberOrSchedule,
    gamma: NumberOrSchedule = 0.9,
) -> Transformation:
    """The textbook's RMSProp from scratch, with its eps of 1e-6.

        x = x - lr * g / sqrt(nu + 1e-6)

    Example:
      >>> optimizer = d2l(0.4, gamma=0.9)

    References:
      Zhang et al., Dive into Deep Learning, section 12.8,
      https://d2l.ai/chapter_optimization/rmsprop.html
    """
    return named({"learning_rate": "lr"}, learning_rate=lr, gamma=gamma, eps=1e-6)
