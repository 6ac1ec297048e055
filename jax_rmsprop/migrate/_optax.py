"""Convert the states of Optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_rmsprop import conventions
from jax_rmsprop._rmsprop import scale_by_rmsprop
from jax_rmsprop.migrate._elements import LayoutIndex
from jax_rmsprop.migrate._state import (
    FIELDS,
    build_state,
    check_all_used,
    extract_arrays,
    pop_array,
    put_like,
    to_numpy,
)

_WORDS = {"nu": "nu", "mu": "mu", "momentum": "trace"}
# Names, since Optax does not export all of these classes.
_AVERAGES = {
    "ScaleByRmsState",
    "ScaleByRmsWithCountState",
    "ScaleByRStdDevState",
    "ScaleByRStdDevWithCountState",
}


def from_optax(
    optax_state: Any,
    params: Any,
    *,
    decay: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Any:
    """Convert the state of `optax.rmsprop` to that of `conventions.optax`.

    Or that of `optax.scale_by_rms` or `optax.scale_by_stddev` to `scale_by_rmsprop`'s.
    The trees are the same, so there is no layout.

    Args:
      optax_state: the state.
      params: the parameters.
      decay: the decay of the average; required only with bias correction.
      optimizer: the optimizer of the result; None for one with the same options.

    Returns:
      The state, at Optax's step if that is stored (with a schedule or bias correction),
      else at step 0.

    Raises:
      TypeError: `optax_state` is not such a state.
      ValueError: `decay` is required; or the average is centered and bias-corrected,
        which `rmsprop` does not support.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jax_rmsprop import conventions, migrate
      >>> params = jnp.ones(3)
      >>> state = migrate.from_optax(optax.rmsprop(0.1).init(params), params)
      >>> updates, state = conventions.optax(0.1).update(params, state)

    References:
      https://github.com/google-deepmind/optax/blob/v0.2.8/optax/_src/transform.py
    """
    average, rate, trace = _parts(optax_state)
    corrected, centered = _counts(average), hasattr(average, "mu")
    if corrected and centered:
        raise ValueError(
            "the average is centered and bias-corrected, which rmsprop refuses: the "
            "variance after the first step is zero by construction"
        )
    if corrected and decay is None:
        raise ValueError("`decay` must be given for a bias-corrected average, got None")
    counter = average if corrected else rate
    count = int(counter.count) if _counts(counter) else 0
    if optimizer is None:
        options: dict[str, Any] = {
            "centered": centered,
            "bias_correction": corrected,
        }
        if rate is None:
            optimizer = scale_by_rmsprop(**options)
        else:
            momentum = None if trace is None else 0.9
            optimizer = conventions.optax(0.0, momentum=momentum, **options)
    trees = {"nu": average.nu, "mu": getattr(average, "mu", None), "momentum": trace}
    theirs = {f: {n: to_numpy(x) for n, x in _named(trees[f]).items()} for f in FIELDS}
    # Optax's buffer has the update's sign, ours the gradient's.
    theirs["momentum"] = {name: -b for name, b in theirs["momentum"].items()}
    weight = None if decay is None else 1 - decay**count
    index = LayoutIndex(_named, params)
    return build_state(optimizer, params, index, theirs, _WORDS, count, weight)


def to_optax(state: Any, params: Any, optax_state: Any) -> Any:
    """Convert our state to `optax.rmsprop`'s, `scale_by_rms`'s or `scale_by_stddev`'s.

    Args:
      state: the state of `conventions.optax` or `scale_by_rmsprop`.
      params: the parameters.
      optax_state: the state of the optimizer that is to resume, as from its `init`.

    Returns:
      A state like `optax_state`.

    Raises:
      TypeError: `optax_state` is not such a state.
      ValueError: the state lacks what `optax_state` has, or the other way round.

    References:
      https://github.com/google-deepmind/optax/blob/v0.2.8/optax/_src/transform.py
    """
    average, rate, trace = _parts(optax_state)
    theirs, count = extract_arrays(state, LayoutIndex(_named, params))

    def put(field: str, tree: Any, sign: int = 1) -> Any:
        def put_leaf(path: Any, old: Any) -> jax.Array:
            name = jax.tree_util.keystr(path)
            return put_like(old, sign * pop_array(theirs, field, name, _WORDS))

        return jax.tree_util.tree_map_with_path(put_leaf, tree)

    def at_step(x: Any) -> Any:
        return x._replace(count=jnp.asarray(count, jnp.int32)) if _counts(x) else x

    average = at_step(average._replace(nu=put("nu", average.nu)))
    if hasattr(average, "mu"):
        average = average._replace(mu=put("mu", average.mu))
    if trace is not None:
        trace = optax.TraceState(trace=put("momentum", trace, -1))
    check_all_used(theirs, _WORDS)
    if rate is None:
        return average
    return average, at_step(rate), optax_state[2] if trace is None else trace


def _counts(x: Any) -> bool:
    return hasattr(x, "_fields") and "count" in x._fields


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _parts(state: Any) -> tuple[Any, Any, Any]:
    """The average's state, the learning rate's, and the momentum buffer or None."""
    if type(state).__name__ in _AVERAGES:
        return state, None, None
    first = type(state[0]).__name__ if isinstance(state, tuple) and state else None
    if first in _AVERAGES and len(state) == 3:
        trace = state[2].trace if isinstance(state[2], optax.TraceState) else None
        return state[0], state[1], trace
    raise TypeError(
        "`optax_state` must be the state of optax.rmsprop, optax.scale_by_rms or "
        f"optax.scale_by_stddev, got {type(state).__name__}"
    )
