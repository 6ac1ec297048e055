"""`population`: as many trainings side by side as a grid has points, step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, reshard

from jax_rmsprop._sharding import on_explicit_mesh, shard_new_like, zeros_for_shapes
from jax_rmsprop._sweep._grid import is_lost, parse_grid
from jax_rmsprop._sweep._trace import check_signature
from jax_rmsprop._validate import check_bool, short_repr


class PopulationState(NamedTuple):
    """The state of a population.

    Attributes:
      hyperparams: by name, the value of each member, of shape [members]: float32, or
        int32 for integers, whatever the dtype of the parameters. The next step uses
        what is put in their place (`optax.tree.set(state, learning_rate=...)`).
      inner_state: the optimizer's state, each leaf with a leading axis of members.
    """

    hyperparams: dict[str, jax.Array]
    inner_state: Any


def population(
    make_optimizer: Callable[..., optax.GradientTransformation],
    grid: Mapping[str, Any],
    *,
    zipped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""One optimizer for a population of trainings, each with its own hyperparameters.

    For data that do not fit into one compiled loop, so that `sweep` cannot run it:
    parameters, gradients and state have a leading axis of members, and a step of all
    is one call, for member :math:`m` with the hyperparameters :math:`h_m`

    .. math::
        u^{(m)}_t = \mathrm{update}(g^{(m)}_t, s^{(m)}_{t-1}; h_m)

    The hyperparameters are numbers in the state: setting another learning rate compiles
    nothing, and a checkpoint holds them. They stay float32 next to bfloat16 parameters,
    where .999 would be 1; updates have the dtype of their gradients.

    Members do not interact, so the member axis can be sharded over devices.

    Args:
      make_optimizer: a function of the axes' names to an Optax transformation, such as
        `rmsprop`. It gets scalars, float32 tracers.
      grid: for each name its values, finite numbers. The members are all combinations,
        the last axis varying fastest, as in `itertools.product`; for Python's values
        (bools, strings) make a population for each.
      zipped: members pair the axes' values instead, which must be equally many.

    Returns:
      A `optax.GradientTransformationExtraArgs`. `init` takes parameters of which each
      leaf is [members, ...]. Further arguments of `update` are members' own if they
      have an axis, [members, ...], and shared if they are scalars.

    Raises:
      TypeError: an axis of something else than numbers, or one that `make_optimizer`
        does not take.
      ValueError: an axis that is empty or has NaN, zipped axes of unequal lengths, or
        parameters or gradients without a leading axis of that many members.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_rmsprop import population, rmsprop
      >>> optimizer = population(
      ...     rmsprop, {"learning_rate": [0.1, 0.01], "gamma": [0.9, 0.99, 0.999]}
      ... )
      >>> params = jnp.tile(jnp.array([-5.0, -2.0]), (6, 1))  # [members, 2]
      >>> state = optimizer.init(params)
      >>> for batch in range(10):
      ...     gradients = jax.vmap(jax.grad(lambda x: (x**2).sum()))(params)
      ...     updates, state = optimizer.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> state.hyperparams["gamma"].shape
      (6,)
      >>> rates = jnp.full(6, 0.001, "float32")  # without the dtype a weak type: one
      >>> state = optax.tree.set(state, learning_rate=rates)  # compilation more

    References:
      Jaderberg et al.,
      [Population Based Training](https://arxiv.org/abs/1711.09846), 2017
    """
    points = parse_grid(grid, check_bool("zipped", zipped))
    for name, axis in points.axes.items():
        if axis.numbers is None:
            raise TypeError(
                f"`{name}` must be numbers, got {short_repr(axis.values[0])}; for "
                "Python values make a population for each"
            )
        narrow = axis.numbers.astype("float32")
        if is_lost(axis.labels, narrow).any():
            raise ValueError(
                f"`{name}` must be at most 0.99997 or 1, since a population's numbers "
                "are float32, which loses what one nearer to 1 is short of it; `sweep` "
                "keeps that"
            )
    check_signature(make_optimizer, tuple(points.axes), "make_optimizer")
    columns = points.columns
    hyperparams = {
        name: columns[name].astype("float32" if "f" in kind else kind)
        for name, kind in points.kinds.items()
    }
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, make_optimizer, hyperparams),
        functools.partial(_update, make_optimizer),
    )


def _init(
    make_optimizer: Callable[..., Any],
    hyperparams: Mapping[str, Any],
    params: optax.Params,
) -> PopulationState:
    members, params = len(next(iter(hyperparams.values()))), zeros_for_shapes(params)
    check_member_axis(params, members, "params")
    placed = shard_like_members(params, jax.tree.map(jnp.asarray, dict(hyperparams)))

    def init(hyperparams: Mapping[str, Any], params: optax.Params) -> Any:
        return make_optimizer(**hyperparams).init(params)

    inner = jax.vmap(init)(placed, params)
    return PopulationState(placed, shard_like_members(params, inner))


def _update(
    make_optimizer: Callable[..., Any],
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
) -> tuple[optax.Updates, PopulationState]:
    members = len(next(iter(state.hyperparams.values())))
    check_member_axis(updates, members, "updates")

    def update(
        hyperparams: Any,
        updates: optax.Updates,
        state: Any,
        params: Any,
        extra: Any,
    ) -> tuple[optax.Updates, Any]:
        optimizer = optax.with_extra_args_support(make_optimizer(**hyperparams))
        steps, state = optimizer.update(updates, state, params, **extra)
        # A float32 learning rate promotes a bfloat16 step.
        steps = jax.tree.map(lambda u, g: u.astype(g.dtype), steps, updates)
        return steps, state

    axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, extra_args)
    updates, inner = jax.vmap(update, (0, 0, 0, 0, axes))(
        state.hyperparams, updates, state.inner_state, params, extra_args
    )
    return updates, PopulationState(state.hyperparams, inner)


def check_member_axis(tree: Any, members: int, name: str) -> None:
    """Check that every leaf has the axis of members.

    Raises:
      ValueError: naming the first leaf that has not.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.shape(leaf)[:1] != (members,):
            raise ValueError(
                f"`{name}` must have a leading axis of {members} members, but "
                f"{jax.tree_util.keystr(path) or 'it'} has shape {jnp.shape(leaf)}"
            )


def shard_like_members(params: optax.Params, tree: Any) -> Any:
    """The leaves of a tree, their members where the members' parameters are."""
    leaves = [p for p in jax.tree.leaves(params) if p.size]
    if not leaves:
        return tree
    column = leaves[0].reshape(len(leaves[0]), -1)[:, 0]
    place = jax.typeof(column).sharding
    shapes = {p.shape for p in leaves}

    def put(x: jax.Array) -> jax.Array:
        if on_explicit_mesh(column):
            own = jax.typeof(x).sharding.spec
            spec = PartitionSpec(*place.spec[:1], *own[1:])
            return reshard(x, NamedSharding(place.mesh, spec))
        if x.ndim > 1 and x.shape in shapes:
            return x  # the inner optimizer has placed it
        members = column.reshape(-1, *(1 for _ in x.shape[1:]))
        return shard_new_like(x, jnp.broadcast_to(members, x.shape))

    return jax.tree.map(put, tree)
