"""The optimizer: Optax's own parts chained around `scale_by_rmsprop`.

The chain is: coupled decay, the scaled gradient, the learning rate if it enters the
momentum, the momentum, decoupled decay, the learning rate if it does not, and the sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from jax_rmsprop import _hyperparameters
from jax_rmsprop._jit import jit_transformation
from jax_rmsprop._precision import once_rounded
from jax_rmsprop._transform import uncompiled_scale_by_rmsprop
from jax_rmsprop._validate import Number, NumberOrSchedule, is_zero


def rmsprop(
    learning_rate: NumberOrSchedule,
    gamma: NumberOrSchedule = 0.9,
    eps: Number = 1e-6,
    *,
    eps_in_sqrt: bool = True,
    initial_scale: Number = 0.0,
    centered: bool = False,
    bias_correction: bool = False,
    momentum: NumberOrSchedule | None = None,
    nesterov: bool = False,
    lr_in_momentum: bool = True,
    weight_decay: NumberOrSchedule = 0.0,
    decoupled_weight_decay: bool = True,
    mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp, ready to use: the step with its learning rate, momentum and decay.

    With u from `scale_by_rmsprop`, the parameters x move by

        x = x - learning_rate * u                      without momentum

        b = momentum * b + learning_rate * u           lr_in_momentum=True
        x = x - b

        b = momentum * b + u                           lr_in_momentum=False
        x = x - learning_rate * b

    With `nesterov`, momentum * b + learning_rate * u (momentum * b + u if the learning
    rate comes after) takes the place of b in the second line. Decoupled decay subtracts
    learning_rate * weight_decay * x besides; coupled decay adds weight_decay * x to the
    gradient at the start.

    All of it is computed and kept in float32 or wider, and rounded once, to the
    gradient's dtype. The momentum buffer b is that of `optax.trace`.

    Args:
      learning_rate: >= 0, a scalar of any type, a tracer, or a schedule
        from the step (from 0) to the rate.
      gamma: decay of the average, in [0, 1], likewise.
      eps: what keeps the divisor from zero, >= 0.
      eps_in_sqrt: whether `eps` is added inside the root.
      initial_scale: the average's initial value, >= 0.
      centered: divide by the root of the variance rather than of the mean square.
      bias_correction: divide the average by the weight it has collected.
      momentum: in [0, 1], a number, tracer or schedule as well; None for no momentum
        and no buffer.
      nesterov: look ahead along the momentum.
      lr_in_momentum: whether the learning rate enters before the buffer (Optax,
        Keras, TensorFlow) or after it (PyTorch). The two differ when it changes.
      weight_decay: >= 0, likewise; `update` needs the parameters unless it is the
        number 0.
      decoupled_weight_decay: whether the decay stays outside the average and the
        momentum (AdamW's way) or is part of the gradient (PyTorch's).
      mask: which leaves decay: a tree of bools, or a function from the parameters to
        one; None for all. See `optax.masked`.

    Returns:
      A transformation that accepts extra arguments. Its state is a chain's: a tuple
      with a `ScaleByRMSPropState` in second place and, with momentum, an
      `optax.TraceState` after it. Outside a jit an update is one dispatch, and other
      values of any number above compile nothing anew, but for a weight decay in place
      of the number 0.

    Raises:
      TypeError, ValueError: as `scale_by_rmsprop` does; `nesterov` without
        `momentum`; `update` without the parameters though there is weight decay.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_rmsprop import rmsprop
      >>> def loss(x):
      ...     return 0.1 * x[0] ** 2 + 2 * x[1] ** 2
      >>> optimizer = rmsprop(learning_rate=0.4, gamma=0.9)
      >>> x = jnp.array([-5.0, -2.0])
      >>> state = optimizer.init(x)
      >>> for _ in range(20):
      ...     updates, state = optimizer.update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"x1 {x[0]:f}, x2 {x[1]:f}")
      x1 -0.010599, x2 0.000000

    References:
      Tieleman and Hinton, Lecture 6.5 - rmsprop, 2012,
      https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf;
      decoupled decay: Loshchilov and Hutter, Decoupled Weight Decay Regularization,
      2019, https://arxiv.org/abs/1711.05101.
    """
    options = _hyperparameters.check_options(
        eps_in_sqrt=eps_in_sqrt,
        centered=centered,
        bias_correction=bias_correction,
        nesterov=nesterov,
        lr_in_momentum=lr_in_momentum,
        decoupled_weight_decay=decoupled_weight_decay,
    )
    if nesterov and momentum is None:
        raise ValueError("`nesterov` must be False if `momentum` is None, got True")
    hyperparameters = _hyperparameters.check_hyperparameters(
        learning_rate=learning_rate,
        gamma=gamma,
        eps=eps,
        initial_scale=initial_scale,
        weight_decay=weight_decay,
        **({} if momentum is None else {"momentum": momentum}),
    )
    if is_zero(hyperparameters["weight_decay"]):
        del hyperparameters["weight_decay"]
    return jit_transformation(
        _chain,
        {**options, "mask": _hyperparameters.check_mask(mask)},
        hyperparameters,
        get_count=get_count,
        uses_params="weight_decay" in hyperparameters,
    )


def get_count(state: Any) -> jax.Array:
    """The step of a chain's state."""
    return state[1].count


def _chain(
    *,
    learning_rate: jax.Array,
    momentum: jax.Array | None = None,
    weight_decay: jax.Array | None = None,
    nesterov: bool,
    lr_in_momentum: bool,
    decoupled_weight_decay: bool,
    mask: Any,
    **average: Any,
) -> optax.GradientTransformation:
    """The chain, its numbers scalar arrays; `average` is for `scale_by_rmsprop`."""

    def chain(fit: Callable[[Any], Any]) -> optax.GradientTransformation:
        def add_decay(rate: jax.Array | None) -> optax.GradientTransformation:
            add = optax.identity() if rate is None else optax.add_decayed_weights(rate)
            return add if mask is None else optax.masked(add, mask)

        rate, decay, same = fit(learning_rate), fit(weight_decay), optax.identity()
        in_buffer = lr_in_momentum and momentum is not None
        late_decay = rate * decay if in_buffer and decay is not None else decay
        # As many parts whatever the numbers, so that a decay of zero changes no tree.
        # Where the learning rate is in the buffer, the minus comes last: before it, it
        # would let the compiler reorder a sum of products if it knows the rate.
        return optax.chain(
            add_decay(None if decoupled_weight_decay else decay),
            uncompiled_scale_by_rmsprop(**average),
            optax.scale(rate) if in_buffer else same,
            same if momentum is None else optax.trace(fit(momentum), nesterov=nesterov),
            add_decay(late_decay if decoupled_weight_decay else None),
            optax.scale(-1.0) if in_buffer else optax.scale_by_learning_rate(rate),
        )

    return once_rounded(chain, None if weight_decay is None else "weight_decay")
