"""The transformation: its state, and the equations applied to every leaf of a tree."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_rmsprop import _equations, _validate
from jax_rmsprop._hyperparameters import check_hyperparameters, check_options
from jax_rmsprop._jit import jit_transformation
from jax_rmsprop._precision import cast_keeping_complex, state_dtype
from jax_rmsprop._sharding import shard_new_like
from jax_rmsprop._validate import Number, NumberOrSchedule


class ScaleByRMSPropState(NamedTuple):
    """The state of `scale_by_rmsprop`, the same class for every option.

    Attributes:
      count: the number of updates so far, int32 of shape ().
      nu: the average of squared gradients, or their variance if `centered`; never
        negative. The tree and shapes of the parameters; real; float32 for leaves
        of lower precision.
      mu: the average of gradients, if `centered`; else None. As `nu`, but complex
        for complex leaves.
      weight: what the averages' weights sum to, if `bias_correction`; else None.
        A float of shape ().
    """

    count: Any  # a tuple has a method of that name, with which an Array does not agree
    nu: optax.Updates
    mu: optax.Updates | None
    weight: jax.Array | None


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

        nu = nu + (1 - gamma) * (|g|^2 - nu)
        u  = g / sqrt(nu + eps)  or  g / (sqrt(nu) + eps)

    and if `centered`, with the average mu of the gradient, and the variance as nu:

        d  = g - mu
        mu = mu + (1 - gamma) * d
        nu = nu + (1 - gamma) * (gamma * |d|^2 - nu)

    which is the average of the square less the square of the average, kept in a form
    that cannot become negative. The update has the gradient's sign: chain with
    `optax.scale(-learning_rate)`, or use `rmsprop`.

    Arithmetic and state are float32 or wider whatever the leaf's dtype; an update has
    its gradient's dtype. A component of the gradient beyond 2^62 (2^510 in float64),
    or infinite, counts as that bound, so its square cannot overflow. Not centered,
    and unless gamma is 1, a component of the update exceeds 1/sqrt(1 - gamma) by no
    more than rounding: TPUs and GPUs multiply by an approximate reciprocal of the root.
    A gradient of zero gives an update of zero, also with `eps=0`.

    Args:
      gamma: decay of the average, in [0, 1]; the average looks back over about
        1/(1-gamma) steps. A scalar of any type, a tracer, or a schedule from the
        step (from 0) to the decay. With 1 the average keeps its initial value.
      eps: what keeps the divisor from zero, >= 0; added to the square (the units
        of g^2) if `eps_in_sqrt`, else to the root (the units of g).
      eps_in_sqrt: where `eps` enters: True inside the root (the textbook, Keras,
        TensorFlow, Optax), False outside (PyTorch).
      initial_scale: the average's initial value, >= 0: 0, or 1 in TensorFlow 1.
      centered: divide by the root of the variance rather than of the mean square.
      bias_correction: divide the average by the weight it has collected, so that
        its first values are not drawn toward its initial 0, also under a gamma
        schedule. An `initial_scale` other than 0 counts as an average of full
        weight: then there is nothing to correct.

    Returns:
      A transformation whose state is a `ScaleByRMSPropState`. It takes the parameters
      and any extra arguments in `update`, and needs neither. Outside a jit an update
      is one dispatch, and other values of gamma and eps compile nothing anew.

    Raises:
      TypeError: an argument is no number, or `params` has a leaf that is neither
        floating-point nor complex (when `init` is called).
      ValueError: a concrete argument is out of its range; `centered` with
        `bias_correction` (the first variance is zero by construction); or a
        gradient's tree or shapes are not the state's (when `update` is called).

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
    return jit_transformation(
        uncompiled_scale_by_rmsprop,
        check_options(
            eps_in_sqrt=eps_in_sqrt, centered=centered, bias_correction=bias_correction
        ),
        check_hyperparameters(gamma=gamma, eps=eps, initial_scale=initial_scale),
        get_count=operator.attrgetter("count"),
    )


def uncompiled_scale_by_rmsprop(
    gamma: jax.Array,
    one_minus_gamma: jax.Array,
    eps: jax.Array,
    initial_scale: jax.Array,
    *,
    eps_in_sqrt: bool,
    centered: bool,
    bias_correction: bool,
) -> optax.GradientTransformation:
    """The transformation itself; its numbers are scalar arrays."""

    def init(params: optax.Params) -> Any:
        _validate.check_inexact_leaves(params)

        def nu(p: jax.Array) -> jax.Array:
            real = jnp.finfo(state_dtype(p)).dtype
            return shard_new_like(jnp.full_like(p, initial_scale, real), p)

        def mu(p: jax.Array) -> jax.Array:
            return shard_new_like(jnp.zeros_like(p, state_dtype(p)), p)

        return ScaleByRMSPropState(
            count=jnp.zeros([], jnp.int32),
            nu=jax.tree.map(nu, params),
            mu=jax.tree.map(mu, params) if centered else None,
            # An initial value that was asked for is an average already: weight 1.
            weight=(initial_scale > 0).astype(float) if bias_correction else None,
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        _validate.check_inexact_leaves(updates)
        _validate.check_matches_state(updates, state.nu)
        weight = state.weight
        if weight is not None:
            weight += one_minus_gamma.astype(weight.dtype) * (1 - weight)

        @functools.cache
        def scalars(dtype: Any) -> dict[str, Any]:
            # In an array's own type, which they so never change.
            old, new = gamma.astype(dtype), one_minus_gamma.astype(dtype)
            total = weight if weight is None else weight.astype(dtype)
            return {
                "decay": _equations.decay(old, new),
                "eps": _equations.positive(eps.astype(dtype)),
                "weight": total if total is None else _equations.positive(total),
            }

        g, tree = jax.tree.flatten(updates)
        nu = tree.flatten_up_to(state.nu)
        mu = tree.flatten_up_to(state.mu) if centered else [None] * len(g)
        new = [
            _step(*leaf, **scalars(leaf[1].dtype), eps_in_sqrt=eps_in_sqrt)
            for leaf in zip(g, nu, mu, strict=True)
        ]
        return tree.unflatten([u for u, _, _ in new]), ScaleByRMSPropState(
            count=optax.safe_increment(state.count),
            nu=tree.unflatten([nu for _, nu, _ in new]),
            mu=tree.unflatten([mu for _, _, mu in new]) if centered else None,
            weight=weight,
        )

    return optax.GradientTransformation(init, update)


# Compiled by itself, a thousand leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnames="eps_in_sqrt")
def _step(
    g: jax.Array,
    nu: jax.Array,
    mu: jax.Array | None,
    decay: _equations.Decay,
    eps: jax.Array,
    weight: jax.Array | None,
    *,
    eps_in_sqrt: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The equations on one leaf: the update, the new nu and the new mu."""
    wide = cast_keeping_complex(g, nu.dtype)
    if mu is None:
        nu = _equations.mean_square(nu, wide, decay)
    else:
        mu, nu = _equations.mean_and_variance(mu, nu, wide, decay)
    corrected = nu if weight is None else nu / weight
    u = _equations.scaled(wide, corrected, eps=eps, eps_in_sqrt=eps_in_sqrt)
    return u.astype(g.dtype), nu, mu
