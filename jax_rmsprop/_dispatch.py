"""One compiled call where there would be many, unless the caller is compiling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp


def currently_jitting() -> bool:
    """Tell whether the caller is within a jit or the like: every array is a tracer."""
    return isinstance(jnp.zeros([]), jax.core.Tracer)


def one_dispatch(
    function: Callable[..., Any], static_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Compile a function, unless the caller is compiling already.

    There a jit within would be traced, lowered and called as a function of its own, for
    nothing.
    """
    compiled = jax.jit(function, static_argnums=static_argnums)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return (function if currently_jitting() else compiled)(*args)

    return call
