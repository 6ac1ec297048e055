"""RMSProp as an Optax transformation: the state, a step, and who calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jax_rmsprop import _validate
from jax_rmsprop._arithmetic import (
    as_array,
    clip,
    narrow,
    state_dtype,
    summable,
    times,
    widen,
)
from jax_rmsprop._equations import mean_and_variance, mean_square, scaled
from jax_rmsprop._hyperparameters import (
    Hyperparameters,
    Operands,
    Options,
    at_step,
    check_mask,
    check_numbers,
    decaying,
    in_dtype,
    off_if_zero,
    one_minus_gamma,
)
from jax_rmsprop._sharding import shard_new_like, zeros_for_shapes
from jax_rmsprop._validate import Number, NumberOrSchedule


class RMSPropState(NamedTuple):
    """The state of `rmsprop` and `scale_by_rmsprop`, one class for all options.

    Each tree has the structure, shapes and placement of the parameters, and is float32
    for leaves of lower precision.

    Attributes:
      count: the number of updates so far, int32 of shape ().
      nu: the average of squared gradients, or their variance if `centered`; real, and
        never negative.
      mu: the average of gradients if `centered`, else None.
      momentum: the momentum buffer b, or None without momentum.
      weight: the weight that nu has collected if `bias_correction`, a float of shape
        (); else None.
    """

    count: Any  # tuple.count is a method, which type checkers refuse to override
    nu: optax.Updates
    mu: optax.Updates | None
    momentum: optax.Updates | None
    weight: jax.Array | None


# A jit of its own, so that a thousand leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=0)
def step(
    options: Options,
    n: Operands,
    g: jax.Array,
    x: jax.Array | None,
    nu: jax.Array,
    mu: jax.Array | None,
    b: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Take the equations (1) to (6) of `_equations` on one leaf.

    Args:
      options: which of them, and where.
      n: the numbers, and the weight of nu.
      g: the gradient.
      x: the parameter; None where nothing decays.
      nu: the average of squares. Its precision is that of the arithmetic, and its
        place is where it is done.
      mu: the average of gradients, or None.
      b: the momentum's buffer, or None.

    Returns:
      What to add to x, in the gradient's dtype; without a learning rate, u. And the
      new nu, mu and b. All is finite if the gradient and the parameter are.
    """
    gradient, g = g, widen(g, nu)
    decay = None if x is None else times(n.weight_decay, widen(x, nu))
    if decay is not None and not options.decoupled_weight_decay:
        g, decay = g + decay, None  # (1)
    if mu is None:
        nu = mean_square(nu, g, n.decay)  # (2)
    else:
        mu, nu = mean_and_variance(mu, nu, g, n.decay)  # (2')
    corrected = nu if n.weight is None else nu / n.weight
    u = scaled(g, corrected, eps=n.eps, eps_in_sqrt=options.eps_in_sqrt)  # (3)
    rate_is_in_b = b is not None and options.lr_in_momentum
    if rate_is_in_b:
        u = times(n.learning_rate, u)  # (4)
    if b is not None:
        u = summable(u)
        b = summable(times(n.momentum, b) + u)  # (5)
        u = times(n.momentum, b) + u if options.nesterov else b
    if decay is not None:
        u = u + (times(n.learning_rate, decay) if rate_is_in_b else decay)
    if n.learning_rate is not None:
        u = -u if rate_is_in_b else times(-n.learning_rate, u)  # (6)
    may_overflow = decay is not None or (b is not None and not rate_is_in_b)
    if may_overflow or gradient.dtype != g.dtype:  # else `least_eps` sees to it
        u = clip(u, jnp.finfo(gradient.dtype).max)
    return narrow(u, gradient), nu, mu, b


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _compiled_update(
    options: Options, h: Any, updates: Any, state: Any, parameters: Any
) -> tuple[optax.Updates, RMSPropState]:
    """Step every leaf; `parameters` has one for each, None where nothing decays."""
    # Numbers, where jit is switched off; Python's as leaves; a state made under x64.
    every = h, updates, state, parameters
    h, updates, state, parameters = jax.tree.map(as_array, every)
    _validate.check_gradient(updates, state.nu, state.mu, state.momentum)
    weight = state.weight
    if weight is not None:
        weight += one_minus_gamma(h).astype(weight.dtype) * (1 - weight)
    operands = functools.cache(functools.partial(in_dtype, h, options, weight))
    g, tree = jax.tree.flatten(updates)
    nothing = [None] * len(g)
    nu, mu, b = (
        nothing if part is None else tree.flatten_up_to(part)
        for part in (state.nu, state.mu, state.momentum)
    )
    leaves: Any = zip(g, parameters, nu, mu, b, strict=True)
    new = [step(options, operands(leaf[2].dtype), *leaf) for leaf in leaves]

    def part(i: int, old: Any = ()) -> Any:
        return None if old is None else tree.unflatten([leaf[i] for leaf in new])

    count = optax.safe_increment(state.count)
    return part(0), RMSPropState(
        count, part(1), part(2, state.mu), part(3, state.momentum), weight
    )


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _compiled_init(
    options: Options, has_momentum: bool, initial_scale: Any, params: Any
) -> RMSPropState:
    params = jax.tree.map(jnp.asarray, params)
    _validate.check_inexact_leaves(params)

    def filled(value: Any, real: bool = False) -> Any:
        def fill(p: jax.Array) -> jax.Array:
            dtype = state_dtype(p)
            dtype = jnp.finfo(dtype).dtype if real else dtype
            return shard_new_like(jnp.full_like(p, value, dtype), p)

        return jax.tree.map(fill, params)

    scale = jnp.asarray(initial_scale)
    return RMSPropState(
        count=jnp.zeros([], jnp.int32),
        nu=filled(scale, real=True),
        mu=filled(0) if options.centered else None,
        momentum=filled(0) if has_momentum else None,
        # An initial value that was asked for is an average already: weight 1.
        weight=(scale > 0).astype(float) if options.bias_correction else None,
    )


def init(options: Options, h: Hyperparameters, params: optax.Params) -> Any:
    """The state at the beginning."""
    with _validate.blame_leaves(params):
        momentum = h.momentum is not None
        shapes = zeros_for_shapes(params)
        return _compiled_init(options, momentum, h.initial_scale, shapes)


# Positional, so that no extra argument has the name of one of these.
def update(
    options: Options,
    h: Hyperparameters,
    mask: Any,
    /,
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
) -> tuple[optax.Updates, Any]:
    """Take a step; see `step`."""
    del extra_args
    _validate.check_class(state, RMSPropState)
    h = at_step(h, state.count)
    if state.momentum is None and isinstance(h.momentum, jax.core.Tracer):
        h = off_if_zero(h, "momentum")  # it was known, and 0, when the state was made
    _validate.check_fields(
        state,
        mu=("centered", options.centered),
        momentum=("momentum", h.momentum is not None),
        weight=("bias_correction", options.bias_correction),
    )
    with _validate.blame_leaves(updates, state):
        if h.weight_decay is None:
            parameters = [None] * len(jax.tree.leaves(updates))
        else:
            h, parameters = decaying(h, mask, updates, params)
        return _compiled_update(options, h, updates, state, parameters)


def build(
    names: Mapping[str, str],
    mask: Any | Callable[[Any], Any] | None,
    options: Options,
    **numbers: Any,
) -> optax.GradientTransformationExtraArgs:
    """The transformation, its arguments checked under the caller's own names."""
    h = check_numbers(names, **numbers)
    if options.nesterov and h.momentum is None:
        raise ValueError("`nesterov` must be False if `momentum` is None, got True")
    # Partials of functions here, so that the result can be pickled.
    return optax.GradientTransformationExtraArgs(
        functools.partial(init, options, h),
        functools.partial(update, options, h, check_mask(mask)),
    )


def scale_by_rmsprop(
    gamma: NumberOrSchedule = 0.9,
    eps: Number = 1e-6,
    *,
    eps_in_sqrt: bool = True,
    initial_scale: Number = 0.0,
    centered: bool = False,
    bias_correction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Divide each gradient by the root of the moving average of its square.

        nu = gamma * nu + (1 - gamma) * |g|^2
        u  = g / sqrt(nu + eps)  or  g / (sqrt(nu) + eps)

    and if `centered`, with the average mu of the gradient, and the variance as nu:

        nu = gamma * nu + (1 - gamma) * gamma * |g - mu|^2
        mu = gamma * mu + (1 - gamma) * g

    which is the average of the square minus the square of the average, in a form that
    cannot become negative. The update has the sign of the gradient: chain with
    `optax.scale(-learning_rate)`, or use `rmsprop`.

    Arithmetic and state are float32 or wider for every dtype; an update has the dtype
    of its gradient. A component of the gradient beyond 2^62 (2^510 in float64), or
    infinite, counts as that bound, so its square cannot overflow. Without centering,
    and unless gamma is 1, a component of the update exceeds 1/sqrt(1 - gamma) by no
    more than rounding: TPUs and GPUs multiply by an approximate reciprocal of the root.
    A zero gradient gives a zero update, even with `eps=0`.

    Args:
      gamma: decay of the average, in [0, 1]; the average looks back over about
        1/(1-gamma) steps. A scalar of any type, a tracer, or a schedule from the
        step (from 0) to the decay. With 1 the average keeps its initial value.
      eps: keeps the divisor from zero, >= 0; added to the square (in units of g^2) if
        `eps_in_sqrt`, else to the root (in units of g).
      eps_in_sqrt: where `eps` enters: True inside the root (the textbook, Keras,
        TensorFlow, Optax), False outside (PyTorch).
      initial_scale: the average's initial value, >= 0: 0, or 1 in TensorFlow 1.
      centered: divide by the root of the variance rather than of the mean square.
      bias_correction: divide the average by the weight it has collected, so that
        its first values are not biased toward 0, also with a schedule of gamma. An
        `initial_scale` other than 0 counts as full weight: there is nothing to correct.

    Returns:
      A transformation whose state is an `RMSPropState`. Its `update` accepts the
      parameters and extra arguments, and needs neither. Outside a jit an update is one
      dispatch, plus one for each schedule, and changing gamma or eps does not
      recompile it.

    Raises:
      TypeError: an argument is not a number, or, from `init`, `params` has a leaf that
        is neither floating-point nor complex.
      ValueError: a concrete argument is out of range; `centered` with `bias_correction`
        (the first variance is zero by construction); or, from `update`, the tree or
        shapes of the gradient are not those of the state.

    Warning:
      Centered, a constant gradient has a variance that really goes to zero (in float32
      to (6e-8 g / (1 - gamma))^2, where the mean stops), and the step grows to
      g / sqrt(eps), or g / eps outside the root. Choose eps as the square of the
      smallest spread of the gradient that should count, or that spread outside the
      root: DQN uses 1e-2, TensorFlow's EfficientNet 1e-3; 1e-6 is far too small for a
      nearly noiseless gradient.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jax_rmsprop import scale_by_rmsprop
      >>> optimizer = optax.chain(scale_by_rmsprop(gamma=0.9), optax.scale(-0.4))
      >>> params = jnp.array([-5.0, -2.0])
      >>> state = optimizer.init(params)
      >>> gradient = params * jnp.array([0.2, 4.0])
      >>> updates, state = optimizer.update(gradient, state)
      >>> x1, x2 = optax.apply_updates(params, updates)
      >>> print(f"x1 {x1:.4f}, x2 {x2:.4f}")
      x1 -3.7351, x2 -0.7351

    References:
      Tieleman and Hinton, Lecture 6.5 - rmsprop, 2012,
      https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf;
      centered: Graves, Generating Sequences With Recurrent Neural Networks, 2013,
      https://arxiv.org/abs/1308.0850.
    """
    options = Options(eps_in_sqrt, centered, bias_correction)
    return build({}, None, options, gamma=gamma, eps=eps, initial_scale=initial_scale)


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
    """RMSProp with learning rate, momentum and weight decay.

    With u from `scale_by_rmsprop`, the parameters x move by

        x = x - learning_rate * u                      without momentum

        b = momentum * b + learning_rate * u           lr_in_momentum=True
        x = x - b

        b = momentum * b + u                           lr_in_momentum=False
        x = x - learning_rate * b

    `nesterov` replaces b in the second line by momentum * b + learning_rate * u
    (momentum * b + u if the learning rate comes after). Decoupled decay also subtracts
    learning_rate * weight_decay * x; coupled decay adds weight_decay * x to the
    gradient first.

    Everything is computed and stored in float32 or wider and rounded once, to the dtype
    of the gradient. Finite gradients and parameters give finite updates.

    Args:
      learning_rate: >= 0, a scalar of any type, a tracer, or a schedule
        from the step (from 0) to the rate.
      gamma: decay of the average, in [0, 1]; scalar, tracer or schedule. The average
        looks back over about 1/(1-gamma) steps.
      eps: keeps the divisor from zero, >= 0.
      eps_in_sqrt: whether `eps` is added inside the root.
      initial_scale: the average's initial value, >= 0.
      centered: divide by the root of the variance rather than of the mean square.
      bias_correction: divide the average by the weight it has collected.
      momentum: in [0, 1]; scalar, tracer or schedule; None for no momentum and no
        buffer.
      nesterov: use Nesterov momentum.
      lr_in_momentum: whether the learning rate enters before the buffer (Optax,
        Keras, TensorFlow) or after it (PyTorch). The two differ when it changes.
      weight_decay: >= 0; scalar, tracer or schedule. `update` needs the parameters
        unless it is the number 0.
      decoupled_weight_decay: apply the decay apart from average and momentum, as AdamW
        does; False: add it to the gradient, as PyTorch does.
      mask: leaves to decay: a tree of bools, or a function from the parameters to one;
        None for all. See `optax.masked`.

    Returns:
      A transformation whose state is an `RMSPropState`; it accepts extra arguments.
      Outside a jit an update is one dispatch, plus one for each schedule, and changing
      any number does not recompile it, except a weight decay in place of 0.

    Raises:
      TypeError, ValueError: as in `scale_by_rmsprop`; `nesterov` without `momentum`;
        `update` without the parameters although there is weight decay.

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
    options = Options(
        eps_in_sqrt,
        centered,
        bias_correction,
        nesterov,
        lr_in_momentum,
        decoupled_weight_decay,
    )
    return build(
        {},
        mask,
        options,
        learning_rate=learning_rate,
        gamma=gamma,
        eps=eps,
        initial_scale=initial_scale,
        momentum=momentum,
        weight_decay=weight_decay,
    )
