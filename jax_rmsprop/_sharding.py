"""Keep state on the devices where its parameters are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, reshard


def shard_new_like(x: jax.Array, p: jax.Array) -> jax.Array:
    """Shard x, which does not depend on p, as p is sharded: x, made to depend on p.

    Left alone, a compiler puts a constant on one device, and jit drops an argument that
    nothing depends on, and its devices with it. On an explicit mesh p's place is a part
    of its type, which x is given, and a barrier keeps p. On an automatic mesh neither
    `jax.typeof` nor a tracer knows where p is, but every partitioner passes a sharding
    through an elementwise operation. So a select picks one of two arrays that are the
    same, whatever p is; the barrier keeps the compiler from seeing so.
    """
    if jax.typeof(p).memory_space != jax.typeof(x).memory_space:
        p = jax.device_put(p, jax.typeof(x).memory_space)
    if on_explicit_mesh(p):  # JAX 0.8 cannot batch a select there
        x = reshard(x, jax.typeof(p).sharding)
        return lax.optimization_barrier((x, p))[0]
    return lax.select(p != p, lax.optimization_barrier(x), x)


def place_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Shard x as `like` is, where an explicit mesh makes that a part of its type.

    A state may be spread over more devices than its parameters are: the step is taken
    where the state is, and the update goes back to where the gradient was.
    """
    if (
        not on_explicit_mesh(like)
        or jax.typeof(x).sharding == jax.typeof(like).sharding
    ):
        return x
    return reshard(x, jax.typeof(like).sharding)


def on_explicit_mesh(p: jax.Array) -> bool:
    """Tell whether an axis of p's mesh is explicit, its devices part of its type."""
    return AxisType.Explicit in jax.typeof(p).sharding.mesh.axis_types


def zeros_for_shapes(params: Any) -> Any:
    """Zeros for `jax.ShapeDtypeStruct`s: a state depends on shapes and places alone."""

    def zeros(p: Any) -> Any:
        if not isinstance(p, jax.ShapeDtypeStruct):
            return p
        return jnp.zeros(p.shape, p.dtype, device=p.sharding)

    return jax.tree.map(zeros, params)
