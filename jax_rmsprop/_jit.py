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
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jax_rmsprop import _validate
from jax_rmsprop._complement import one_minus
from jax_rmsprop._sharding import zeros_for_shapes
from jax_rmsprop._validate import NumberOrSchedule


def jit_transformation(
    make: Callable[..., optax.GradientTransformation],
    options: Mapping[str, Hashable],
    hyperparameters: Mapping[str, NumberOrSchedule],
    *,
    get_count: Callable[[Any], Any],
    uses_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Build `make(**hyperparameters, **options)`, each method one dispatch.

    The options decide what is compiled; the hyperparameters are operands, so all
    transformations of the same make and options share one compiled function.

    Args:
      make: a module-level function (so that the result can be pickled).
      options: what `make` takes that is known when it is compiled.
      hyperparameters: numbers, tracers or schedules; must contain "gamma". `make`
        gets them as scalar arrays, a schedule's value at the state's count in its
        place, and beside them "one_minus_gamma".
      get_count: the step of a state, at which the schedules are evaluated.
      uses_params: whether `update` reads the parameters. If not, they may be
        anything: Equinox's users pass whole models.
    """
    key = (make, tuple(sorted(options.items())))
    # A partial is hashed by its identity, as jit needs, whatever the schedule is.
    hyperparameters = {
        name: functools.partial(x) if callable(x) else x
        for name, x in hyperparameters.items()
    }
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, key, hyperparameters),
        functools.partial(_update, key, hyperparameters, get_count, uses_params),
    )


def _init(key: Any, hyperparameters: Mapping[str, Any], params: Any) -> Any:
    values = _evaluate_hyperparameters(hyperparameters, np.int32(0))
    return _dispatch(key, values, "init", zeros_for_shapes(params))


def _update(
    key: Any,
    hyperparameters: Mapping[str, Any],
    get_count: Callable[[Any], Any],
    uses_params: bool,
    updates: Any,
    state: Any,
    params: Any = None,
    **extra_args: Any,
) -> tuple[Any, Any]:
    del extra_args
    try:
        step = get_count(state)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise TypeError(
            "`state` must be what `init` returned, its tuples and classes kept, got "
            f"{type(state).__name__}"
        ) from None
    values = _evaluate_hyperparameters(hyperparameters, step)
    return _dispatch(
        key, values, "update", updates, state, params if uses_params else None
    )


def _evaluate_hyperparameters(
    hyperparameters: Mapping[str, Any], count: Any
) -> dict[str, Any]:
    """The hyperparameters at a step: Python floats, or arrays not below float32.

    1 - gamma is formed here, where a Python float is still a double: in float32,
    1 - 0.9999 is wrong by 3e-4 of itself.
    """
    values: dict[str, Any] = {}
    for name, x in hyperparameters.items():
        if callable(x):
            value, complement = _at(name, x, count)
        else:
            value, complement = x, one_minus(x) if name == "gamma" else None
        values[name] = _operand(value)
        if name == "gamma":
            values["one_minus_gamma"] = _operand(complement)
    return values


def _operand(x: Any) -> Any:
    return x if isinstance(x, float) else jnp.asarray(x, float)


def _at(name: str, schedule: Callable[[Any], Any], count: Any) -> tuple[Any, Any]:
    """A schedule's value at a step, and what that is short of 1.

    Raises:
      TypeError: the schedule is plain Python, and the step not known yet; or it
        returns something else than a number.
    """
    try:
        return _compiled_both(name, schedule, count)
    except jax.errors.JAXTypeError as error:
        if isinstance(count, jax.core.Tracer):
            raise TypeError(
                f"`{name}` must be a schedule of JAX operations where it is compiled, "
                f"but it asks for the step's value ({type(error).__name__})"
            ) from None
    return _both(name, schedule, count)  # plain Python, of a step that is known


def _both(name: str, schedule: Callable[[Any], Any], count: Any) -> tuple[Any, Any]:
    value: Any = schedule(count)
    _validate.check_scheduled(name, value)
    return value, 1 - value


_compiled_both = functools.partial(jax.jit, static_argnums=(0, 1))(_both)


def _call(key: Any, values: dict[str, Any], method: str, *args: Any) -> Any:
    make, options = key
    # What is no array yet: numbers, where the caller is compiling or has switched jit
    # off.
    values, args = jax.tree.map(jnp.asarray, (values, args))
    return getattr(make(**values, **dict(options)), method)(*args)


_compiled_call = functools.partial(jax.jit, static_argnums=(0, 2))(_call)


def _dispatch(key: Any, values: dict[str, Any], method: str, *args: Any) -> Any:
    """One dispatch or, where the caller is compiling already, part of what it does.

    There a jit within would be traced, lowered and called as a function of its own, for
    nothing.
    """
    call = _call if _validate.currently_jitting() else _compiled_call
    with _validate.check_array_leaves_on_error(*args):
        return call(key, values, method, *args)
