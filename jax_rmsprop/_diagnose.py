"""Diagnose from a state whether gamma and eps fit the gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_rmsprop import _validate
from jax_rmsprop._equations import positive, scaled
from jax_rmsprop._precision import cast_keeping_complex
from jax_rmsprop._validate import Number

# Of nu: the extremes, all but a tenth of the elements, and the middle.
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


class Diagnosis(NamedTuple):
    """The findings of `diagnose`: float32 arrays, which a scan stacks.

    Attributes:
      eps_share: in [0, 1], the share of the elements where eps is more of the divisor
        than the average is.
      threshold: the average at which both are equal, in units of g^2.
      window: the steps that the average looks back over, (1 - gamma^t) / (1 - gamma).
      nu: the average's quantiles 0, 5, 50, 95 and 100%, of shape (5,), in units of g^2.
      largest_step: the largest `|u|` of any element; None without the gradient.
    """

    eps_share: jax.Array
    threshold: jax.Array
    window: jax.Array | None
    nu: jax.Array
    largest_step: jax.Array | None


def diagnose(
    state: Any,
    gradient: optax.Updates | None = None,
    *,
    gamma: Number = 0.9,
    eps: Number = 1e-6,
    eps_in_sqrt: bool = True,
) -> Diagnosis:
    """Tell whether the average or eps decides the steps, and over how many it looks.

    An element's step is g / sqrt(nu + eps), or g / (sqrt(nu) + eps). Where nu is far
    above the threshold, eps or eps^2, RMSProp scales each element by its own average;
    where it is far below, all are divided by the same, and it is gradient descent with
    a learning rate of learning_rate / sqrt(eps), or learning_rate / eps. Choose an eps
    such that this is meant where it happens. With bias correction nu is divided by the
    weight that it has collected.

    It reads whole arrays and sorts them, which takes as long as a few steps: call it
    every so many.

    Args:
      state: of `rmsprop`, a convention, or any other Optax transformation that has a
        "nu" in its state; of a state in fewer bits what `dequantize_state` returns.
      gradient: what the last `update` got, for `largest_step`; None for none.
      gamma: as it was given to the optimizer, a number or tracer: for a schedule, its
        value at this step.
      eps: as it was given to the optimizer.
      eps_in_sqrt: whether `eps` is added inside the root.

    Returns:
      A `Diagnosis`, its window None if the state counts no steps. It can be computed
      in a jit, a scan and a vmap.

    Raises:
      TypeError, ValueError: an argument is no number, or out of its range; the state
        has no "nu", or not in full.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import diagnose, rmsprop
      >>> optimizer = rmsprop(0.01, gamma=0.5, eps=1e-4)
      >>> gradient = jnp.array([1e-4, 1.0, 2.0])
      >>> _, state = optimizer.update(gradient, optimizer.init(gradient))
      >>> found = diagnose(state, gradient, gamma=0.5, eps=1e-4)
      >>> print(f"{found.eps_share:.2f} {found.window:.0f} {found.largest_step:.3f}")
      0.33 1 1.414

    References:
      That eps is a hyperparameter, of which the best depends on the problem: Choi et
      al., On Empirical Comparisons of Optimizers for Deep Learning, 2019,
      https://arxiv.org/abs/1910.05446.
    """
    gamma = _validate.check_scalar("gamma", gamma, high=1)
    eps = _validate.check_scalar("eps", eps)
    inside = _validate.check_bool("eps_in_sqrt", eps_in_sqrt)
    _validate.check_array_leaves((state, gradient))
    nu, weight, count = (_found(state, name) for name in ("nu", "weight", "count"))
    leaves = jax.tree.leaves(nu)
    if not leaves:
        raise ValueError(
            "`state` must have a field nu, as that of `rmsprop` has, got "
            f"{_validate.short_repr(jax.tree.structure(state))}"
        )
    for x in leaves:
        if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.finfo(x.dtype).bits < 32:
            raise TypeError(
                "`state` must be in full precision, but its nu is "
                f"{x.dtype}; pass quantization.dequantize_state(state, ...)"
            )
    if weight is not None:
        leaves = [x / positive(weight.astype(x.dtype)) for x in leaves]
    flat = jnp.concatenate([x.ravel().astype(jnp.float32) for x in leaves])
    eps32 = jnp.asarray(eps, jnp.float32)
    threshold = eps32 if inside else eps32**2
    return Diagnosis(
        eps_share=jnp.mean(flat < threshold),
        threshold=threshold,
        window=None if count is None else _window(gamma, count),
        nu=jnp.quantile(flat, jnp.array(QUANTILES), method="nearest"),
        largest_step=None
        if gradient is None
        else _largest_step(gradient, leaves, eps32, inside),
    )


def _found(state: Any, name: str) -> Any:
    """The first field of that name, wherever it is in a state."""
    found = optax.tree.get_all_with_path(state, name)
    return found[0][1] if found else None


def _window(gamma: Any, count: Any) -> jax.Array:
    """(1 - gamma^t) / (1 - gamma), which is t where gamma is 1."""
    gamma = jnp.asarray(gamma, jnp.float32)
    steps = jnp.asarray(count, jnp.float32)
    geometric = (1 - gamma**steps) / positive(1 - gamma)
    return jnp.select([gamma == 1], [steps], geometric)


def _largest_step(
    gradient: optax.Updates, averages: list[jax.Array], eps: jax.Array, inside: bool
) -> jax.Array:
    """The largest `|u|` of a step."""

    def largest(g: jax.Array, nu: jax.Array) -> jax.Array:
        g = cast_keeping_complex(g, nu.dtype)
        u = scaled(g, nu, eps=positive(eps.astype(nu.dtype)), eps_in_sqrt=inside)
        return jnp.max(jnp.abs(u).astype(jnp.float32), initial=0)

    leaves = jax.tree.map(jnp.asarray, jax.tree.leaves(gradient))
    if [g.shape for g in leaves] != [nu.shape for nu in averages]:
        raise ValueError("`gradient` must have the leaves and shapes of the state's nu")
    sizes = [largest(g, nu) for g, nu in zip(leaves, averages, strict=True)]
    return jnp.max(jnp.stack(sizes))
