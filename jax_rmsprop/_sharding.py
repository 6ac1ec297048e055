"""Keep state on the devices where its parameters are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, reshard


def shard_new_like(x: jax.Array, p: jax.Array) -> jax.Array:
    """Shard x, which does not depend on p, like p, by making it depend on p.

    By default a compiler puts a constant on one device, and jit drops an unused
    argument along with its devices. On an explicit mesh p's sharding is a part of its
    type: x gets that sharding, and a barrier keeps p. On an automatic mesh neither
    `jax.typeof` nor a tracer knows p's sharding, but every partitioner propagates
    shardings through elementwise operations. So a select by p chooses between two equal
    arrays; the barrier hides from the compiler that they are equal.
    """
    if jax.typeof(p).memory_space != jax.typeof(x).memory_space:
        p = jax.device_put(p, jax.typeof(x).memory_space)
    if on_explicit_mesh(p):  # JAX 0.8 cannot batch a select on such a mesh
        x = reshard(x, jax.typeof(p).sharding)
        return lax.optimization_barrier((x, p))[0]
    return lax.select(p != p, lax.optimization_barrier(x), x)


def place_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Shard x like `like` if an explicit mesh makes the sharding a part of its type.

    A state may be sharded over more devices than its parameters: the step has the
    state's sharding, and the update that of the gradient.
    """
    if (
        not on_explicit_mesh(like)
        or jax.typeof(x).sharding == jax.typeof(like).sharding
    ):
        return x
    return reshard(x, jax.typeof(like).sharding)


def on_explicit_mesh(p: jax.Array) -> bool:
    """Whether an axis of p's mesh is explicit, so that its sharding is in its type."""
    return AxisType.Explicit in jax.typeof(p).sharding.mesh.axis_types


def zeros_for_shapes(params: Any) -> Any:
    """Replace `jax.ShapeDtypeStruct`s by zeros of their dtype and sharding."""

    def zeros(p: Any) -> Any:
        if not isinstance(p, jax.ShapeDtypeStruct):
            return p
        return jnp.zeros(p.shape, p.dtype, device=p.sharding)

    return jax.tree.map(zeros, params)
