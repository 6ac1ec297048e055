"""Where an array lies: new arrays of a state lie where their parameters do."""

from __future__ import annotations

import jax
from jax import lax
from jax.experimental.shard_alike import shard_alike
from jax.sharding import AxisType


def place_like(x: jax.Array, p: jax.Array) -> jax.Array:
    """Shard x, which does not depend on p, as p is sharded.

    Under jit and an automatic mesh the compiler would put a constant on one device. On
    an explicit mesh x has its place as a part of its type, but jit drops an argument
    that nothing depends on, and with it the devices.
    """
    if explicit(p):
        return lax.optimization_barrier((x, p))[0]
    return shard_alike(x, p)[0]


def keep_like(x: jax.Array, p: jax.Array) -> jax.Array:
    """Keep x, which is computed from p, where p is.

    An automatic mesh is told, an explicit one knows by the types.
    """
    return x if explicit(p) else shard_alike(x, p)[0]


def explicit(p: jax.Array) -> bool:
    """Whether p is on an explicit mesh, where a sharding is a part of the type."""
    return AxisType.Explicit in jax.typeof(p).sharding.mesh.axis_types
