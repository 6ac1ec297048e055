"""Diagnose whether gamma and eps fit the gradients."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from jax_rmsprop import _validate
from jax_rmsprop._arithmetic import positive, widen
from jax_rmsprop._equations import scaled
from jax_rmsprop._hyperparameters import Hyperparameters, Options, at_step
from jax_rmsprop._rmsprop import RMSPropState, update

# Of nu: the extremes, all but a tenth of the elements, and the middle.
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


class Diagnosis(NamedTuple):
    """The findings of `diagnose`: float32 arrays, which a scan stacks.

    Attributes:
      eps_share: in [0, 1], the fraction of elements where eps dominates the divisor.
      threshold: the average at which both contribute equally, in units of g^2.
      window: the steps that the average looks back over, (1 - gamma^t) / (1 - gamma).
      nu: the average's quantiles 0, 5, 50, 95 and 100%, of shape (5,), in units of g^2.
      largest_step: the largest `|u|` of any element; None without the gradient.
    """

    eps_share: jax.Array
    threshold: jax.Array
    window: jax.Array
    nu: jax.Array
    largest_step: jax.Array | None


def diagnose(
    optimizer: optax.GradientTransformation,
    state: Any,
    gradient: optax.Updates | None = None,
) -> Diagnosis | dict[str, Diagnosis]:
    """Report whether the average or eps decides the steps.

    The step of an element is g / sqrt(nu + eps), or g / (sqrt(nu) + eps). If nu is far
    above the threshold, eps or eps^2, RMSProp scales each element by its own average.
    If nu is far below, all elements are divided by the same number, and the optimizer
    is gradient descent with a learning rate of learning_rate / sqrt(eps), or
    learning_rate / eps. With bias correction nu is divided by the weight it has
    collected.

    Sorting whole arrays takes as long as a few steps: call it every hundred steps or
    so.

    Args:
      optimizer: the result of `rmsprop`, `scale_by_rmsprop` or a convention, also
        inside Optax's chains, masks, partitions and the like. Gamma and eps are read
        from it, schedules at the step of the state.
      state: its state. For a quantized state pass the result of `dequantize_state`, and
        the optimizer without `quantize_state`.
      gradient: the gradient of the last `update`, for `largest_step`; None to omit it.

    Returns:
      A `Diagnosis`; for several RMSProps, as in `optax.partition`, a dict with one for
      each, by the path of its state. It works inside jit, scan and vmap.

    Raises:
      TypeError: the state is quantized.
      ValueError: the optimizer contains no RMSProp, or the state is not its state, or
        the gradient has other leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_rmsprop import diagnose, rmsprop
      >>> optimizer = rmsprop(0.01, gamma=0.5, eps=1e-4)
      >>> gradient = jnp.array([1e-4, 1.0, 2.0])
      >>> _, state = optimizer.update(gradient, optimizer.init(gradient))
      >>> found = diagnose(optimizer, state, gradient)
      >>> print(f"{found.eps_share:.2f} {found.window:.0f} {found.largest_step:.3f}")
      0.33 1 1.414

    References:
      On tuning eps: Choi et al., On Empirical Comparisons of Optimizers for Deep
      Learning, 2019, https://arxiv.org/abs/1910.05446.
    """
    inside = list(_optimizers(optimizer, set()))
    paths, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_ours)
    states = [(keystr(path), x) for path, x in paths if _is_ours(x)]
    if not inside:
        raise ValueError(
            "`optimizer` must contain an RMSProp of this package, got "
            f"{_validate.short_repr(type(optimizer).__name__)}; with optax.inject_"
            "hyperparams pass the optimizer that it makes, and `state.inner_state`"
        )
    if len(inside) != len(states):
        raise ValueError(
            f"`state` must be the optimizer's: it has {len(states)} states of RMSProp, "
            f"and the optimizer has {len(inside)} RMSProps"
        )
    found = {
        path: _diagnosed(*settings, x, gradient)
        for settings, (path, x) in zip(inside, states, strict=True)
    }
    return next(iter(found.values())) if len(found) == 1 else found


def _optimizers(x: Any, seen: set[int]) -> Iterator[tuple[Options, Hyperparameters]]:
    """What RMSProps were built with, in a transformation or in what it closes over.

    In the order of their states: a tree has the keys of a dict sorted.
    """
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, functools.partial):
        if x.func is update:
            yield x.args[:2]
            return
        parts: Any = [*x.args, *x.keywords.values()]
    elif isinstance(x, optax.GradientTransformation):
        parts = [x.update]
    elif isinstance(x, Mapping):
        parts = [x[key] for key in sorted(x, key=str)]
    elif isinstance(x, tuple | list):
        parts = x
    elif isinstance(x, types.MethodType):
        parts = list(vars(x.__self__).values())
    else:
        parts = [cell.cell_contents for cell in getattr(x, "__closure__", None) or ()]
    for part in parts:
        yield from _optimizers(part, seen)


def _is_ours(x: Any) -> bool:
    return isinstance(x, RMSPropState)


def _diagnosed(
    options: Options, h: Hyperparameters, state: RMSPropState, gradient: Any
) -> Diagnosis:
    now = at_step(h, state.count)
    leaves = jax.tree.leaves(state.nu)
    _validate.check_full_precision(leaves)
    if gradient is not None:
        # Of a partition a group has its own leaves alone.
        masked = jax.tree.structure(state.nu, is_leaf=_is_masked)
        try:
            parts = masked.flatten_up_to(gradient)
        except ValueError:
            parts = []
        kept = jax.tree.leaves(state.nu, is_leaf=_is_masked)
        gradient = [
            jnp.asarray(g)
            for g, nu in zip(parts, kept, strict=False)
            if not _is_masked(nu)
        ]
        if [g.shape for g in gradient] != [nu.shape for nu in leaves]:
            raise ValueError(
                "`gradient` must have the leaves and shapes of the state's nu"
            )
    if state.weight is not None:
        leaves = [x / positive(state.weight.astype(x.dtype)) for x in leaves]
    flat = jnp.concatenate([x.ravel().astype(jnp.float32) for x in leaves])
    eps = jnp.asarray(now.eps, jnp.float32)
    threshold = eps if options.eps_in_sqrt else eps**2
    return Diagnosis(
        eps_share=jnp.mean(flat < threshold),
        threshold=threshold,
        window=_window(now.gamma, state.count),
        nu=jnp.quantile(flat, jnp.array(QUANTILES), method="nearest"),
        largest_step=None
        if gradient is None
        else _largest_step(gradient, leaves, eps, options.eps_in_sqrt),
    )


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _window(gamma: Any, count: Any) -> jax.Array:
    """(1 - gamma^t) / (1 - gamma), which is t where gamma is 1."""
    gamma = jnp.asarray(gamma, jnp.float32)
    steps = jnp.asarray(count, jnp.float32)
    geometric = (1 - gamma**steps) / positive(1 - gamma)
    return jnp.select([gamma == 1], [steps], geometric)


def _largest_step(
    gradients: list[jax.Array], averages: list[jax.Array], eps: jax.Array, inside: bool
) -> jax.Array:
    """The largest `|u|` of a step."""

    def largest(g: jax.Array, nu: jax.Array) -> jax.Array:
        at_least = positive(eps.astype(nu.dtype))
        u = scaled(widen(g, nu), nu, eps=at_least, eps_in_sqrt=inside)
        return jnp.max(jnp.abs(u).astype(jnp.float32), initial=0)

    sizes = [largest(g, nu) for g, nu in zip(gradients, averages, strict=True)]
    return jnp.max(jnp.stack(sizes))
