"""Where an array lies: new arrays of a state lie where their parameters do."""

from __future__ import annotations

import jax
from jax.experimental.shard_alike import shard_alike
from jax.sharding import AxisType


def place_like(x: jax.Array, p: jax.Array) -> jax.Array:
    """Shard x, which does not depend on p, as p is sharded.

    Under jit and an automatic mesh the compiler would put a constant on one device.
    On an explicit mesh x has the place already, as a part of its type.
    """
    if AxisType.Explicit in jax.typeof(p).sharding.mesh.axis_types:
        return x
    return shard_alike(x, p)[0]
