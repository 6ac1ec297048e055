"""One compiled call: an Optax transformation whose numbers are operands of a jit.

Optax's own transformations are a dispatch for each operation on each leaf outside a
jit, and hold their numbers as constants inside. Here `init` and `update` are each one
module-level jitted function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_rmsprop import _validate
from jax_rmsprop._dispatch import one_dispatch
from jax_rmsprop._hyperparameters import evaluate_hyperparameters
from jax_rmsprop._sharding import zeros_for_shapes
from jax_rmsprop._validate import NumberOrSchedule

# A function that makes a transformation, and the options with which it does.
_Key = tuple[Callable[..., optax.GradientTransformation], tuple[tuple[str, Any], ...]]


def jit_transformation(
    make: Callable[..., optax.GradientTransformation],
    options: Mapping[str, Hashable],
    hyperparameters: Mapping[str, NumberOrSchedule],
    *,
    get_count: Callable[[Any], jax.Array],
    uses_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Build `make(**hyperparameters, **options)`, each method one dispatch.

    The options decide what is compiled; the hyperparameters are operands, so all
    transformations of the same make and options share one compiled function.

    Args:
      make: a module-level function (so that the result can be pickled).
      options: what `make` takes that is known when it is compiled.
      hyperparameters: what `check_scalar` returned, "gamma" among them. `make` gets
        them as scalar arrays, a schedule's value at the state's count in its place,
        and beside them "one_minus_gamma".
      get_count: the step of a state, at which the schedules are evaluated.
      uses_params: whether `update` reads the parameters. If not, they may be
        anything: Equinox's users pass whole models.
    """
    key = (make, tuple(sorted(options.items())))
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, key, hyperparameters),
        functools.partial(_update, key, hyperparameters, get_count, uses_params),
    )


def _init(
    key: _Key, hyperparameters: Mapping[str, NumberOrSchedule], params: optax.Params
) -> optax.OptState:
    values = evaluate_hyperparameters(hyperparameters, np.int32(0))
    return _checked_call(key, values, "init", zeros_for_shapes(params))


def _update(
    key: _Key,
    hyperparameters: Mapping[str, NumberOrSchedule],
    get_count: Callable[[Any], jax.Array],
    uses_params: bool,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState]:
    try:
        step = get_count(state)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise TypeError(
            "`state` must be what `init` returned, its tuples and classes kept, got "
            f"{type(state).__name__}"
        ) from None
    values = evaluate_hyperparameters(hyperparameters, step)
    return _checked_call(
        key, values, "update", updates, state, params if uses_params else None
    )


def _checked_call(key: _Key, values: dict[str, Any], method: str, *args: Any) -> Any:
    with _validate.check_array_leaves_on_error(*args):
        return _call(key, values, method, *args)


@functools.partial(one_dispatch, static_argnums=(0, 2))
def _call(key: _Key, values: dict[str, Any], method: str, *args: Any) -> Any:
    make, options = key
    # What is no array yet: numbers, where the caller is compiling or has switched jit
    # off.
    values, args = jax.tree.map(jnp.asarray, (values, args))
    return getattr(make(**values, **dict(options)), method)(*args)
