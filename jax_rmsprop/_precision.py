"""In which precision a step is computed and kept: float32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_rmsprop import _validate
from jax_rmsprop._sharding import shard_new_like


def state_dtype(p: jax.Array) -> Any:
    """The dtype of a leaf's averages: its own, and float32 for what is narrower."""
    return p.dtype if _width(p.dtype) >= 32 else jnp.dtype(jnp.float32)


def cast_keeping_complex(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Cast x to a real dtype or, if x is complex, to its complex counterpart."""
    return x.astype(
        np.result_type(dtype, np.complex64) if jnp.iscomplexobj(x) else dtype
    )


def once_rounded(
    chain: Callable[[Callable[[Any], Any]], optax.GradientTransformation],
    needs_params: str | None,
) -> optax.GradientTransformation:
    """Compute and keep everything in float32 or wider; round once, to the gradient's.

    Args:
      chain: makes the transformation, of which `scale_by_rmsprop` is the second part,
        from a function that it applies to each of its scalars (or None), since Optax
        multiplies each leaf by them as they are: an array of a fixed type becomes no
        wider than any leaf. A scalar that began as a Python float adapts by itself,
        and is cast only where all leaves are of one type.
      needs_params: the argument for which `update` needs the parameters; None: for
        none.
    """

    def made(tree: Any) -> optax.GradientTransformation:
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(tree)}
        reals = [jnp.finfo(dtype).dtype for dtype in dtypes]
        narrowest = min(reals, key=_width, default=jnp.dtype(jnp.float32))
        alike = dtypes <= {narrowest}

        def fit(x: Any) -> Any:
            if x is None or (x.weak_type and not alike):
                return x
            return x.astype(narrowest)

        return chain(fit)

    def init(params: optax.Params) -> Any:
        _validate.check_inexact_leaves(params)
        params = jax.tree.map(lambda p: p.astype(state_dtype(p)), params)
        inner = made(params)
        return optax.tree_utils.tree_map_params(
            inner, shard_new_like, inner.init(params), params
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        if needs_params is not None and params is None:
            raise ValueError(
                f"`params` must be passed to `update` when `{needs_params}` is not 0, "
                "got None"
            )
        nu = state[1].nu
        _validate.check_matches_state(updates, nu)
        wide = jax.tree.map(lambda x, n: cast_keeping_complex(x, n.dtype), updates, nu)
        if params is not None:
            params = jax.tree.map(
                lambda x, n: cast_keeping_complex(x, n.dtype), params, nu
            )
        wide, state = made(wide).update(wide, state, params)
        _validate.check_same_kind(updates, wide)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), wide, updates), state

    return optax.GradientTransformation(init, update)


def _width(dtype: jax.typing.DTypeLike) -> int:
    return jnp.finfo(dtype).bits
