"""Check input; an error names the argument, its value and what is allowed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[Any], Any]
Number = float | jax.Array
NumberOrSchedule = Number | Schedule


def check_scalar(
    name: str,
    value: Any,
    *,
    high: float = math.inf,
    schedule: bool = False,
) -> Any:
    """Check one hyperparameter, which must lie in [0, `high`] and be finite.

    Args:
      name: the argument's name, for the message.
      value: the caller's value.
      high: the largest allowed value.
      schedule: whether a function step -> number is also allowed.

    Returns:
      A Python float for a concrete value of any type; a tracer unchanged; a schedule as
      a `Scheduled`.

    Raises:
      TypeError: not a scalar number (nor a schedule, if one is allowed).
      ValueError: a concrete value out of range, or NaN.
    """
    allowed = "a finite number >= 0" if high == math.inf else f"in [0, {high:g}]"
    if schedule:
        allowed += " or a schedule (a function from step to number)"
    if schedule and callable(value):
        _takes_a_step(name, value)
        return value if isinstance(value, Scheduled) else Scheduled(name, value)
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if is_array and value.shape != () and _is_real(value.dtype):
        raise TypeError(
            f"`{name}` must be a scalar, got an array of shape {value.shape}; "
            "to run several values at once, use jax.vmap"
        )
    if not (is_array and _is_real(value.dtype)) and type(value) not in (int, float):
        raise TypeError(expected(name, allowed, value))
    if isinstance(value, jax.core.Tracer):
        return value
    try:
        concrete = float(value)
    except OverflowError:  # an integer larger than any float
        concrete = math.inf
    if not (0 <= concrete <= high and math.isfinite(concrete)):
        raise ValueError(expected(name, allowed, concrete))
    return concrete


def _takes_a_step(name: str, schedule: Schedule) -> None:
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        return  # a builtin or the like has none; the call itself raises
    try:
        signature.bind(0)
    except TypeError as error:
        allowed = "a number or a function from step to number"
        raise TypeError(f"{expected(name, allowed, schedule)}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A schedule that names its argument in errors.

    Raises:
      TypeError: when called: it does not return a scalar number, or needs the concrete
        value of a traced step.
    """

    name: str
    schedule: Schedule

    def __call__(self, count: Any) -> Any:
        """The value at a step: a float, or a JAX array of shape ()."""
        try:
            value = self.schedule(count)
        except jax.errors.JAXTypeError as error:
            if not isinstance(count, jax.core.Tracer):
                raise
            raise TypeError(
                f"`{self.name}` must be a schedule of JAX operations inside a jit, but "
                f"it needs the step's value ({type(error).__name__})"
            ) from None
        is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
        if is_array and value.shape == () and _is_real(value.dtype):
            return value if isinstance(value, jax.Array) else float(value)
        if type(value) in (int, float):
            return float(value)
        got = f"an array of shape {value.shape}" if is_array else short_repr(value)
        raise TypeError(
            f"`{self.name}`'s schedule must return a scalar number, got {got}"
        )


def is_zero(value: Any) -> bool:
    """Whether value is a concrete 0 of Python, NumPy or JAX; False for tracers."""
    if isinstance(value, jax.core.Tracer) or callable(value):
        return False
    kinds = int | float | np.ndarray | np.generic | jax.Array
    if not isinstance(value, kinds) or isinstance(value, bool) or np.shape(value):
        return False
    return bool(value == 0)


def check_bool(name: str, value: Any, allowed: str = "True or False") -> bool:
    """Check an option that is on or off.

    Raises:
      TypeError: not a bool, such as a traced one: it decides what is compiled.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(expected(name, allowed, value))
    return bool(value)


def check_int(name: str, value: Any, *, low: int) -> int:
    """Check a count, and return it.

    Raises:
      TypeError: not an int.
      ValueError: below `low`.
    """
    is_array = isinstance(value, np.integer | np.ndarray | jax.Array)
    if is_array and value.shape == () and jnp.issubdtype(value.dtype, jnp.integer):
        value = int(value)
    if type(value) is not int:
        raise TypeError(expected(name, f"an integer >= {low}", value))
    if not low <= value < 2**31:  # larger ones overflow int32
        raise ValueError(expected(name, f"an integer >= {low}", value))
    return value


def expected(name: str, allowed: str, value: Any) -> str:
    """The message of bad input: the argument, what is allowed, and the value."""
    return f"`{name}` must be {allowed}, got {short_repr(value)}"


def short_repr(value: Any) -> str:
    """The repr of a value in one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_extra(name: str, *modules: str) -> None:
    """Check that the modules of an extra are installed.

    Raises:
      ModuleNotFoundError: naming the extra.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error.name} is missing: pip install 'jax-rmsprop[{name}]'",
                name=error.name,
            ) from None


def check_inexact_leaves(params: Any) -> None:
    """Check that every leaf is floating point or complex.

    Raises:
      TypeError: naming the path of the first leaf that is not.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"RMSProp needs floating-point or complex leaves, but "
                f"{key_name(path)} is {dtype}; leave it out with optax.masked "
                "or by filtering the tree"
            )


def check_array_leaves(tree: Any) -> None:
    """Check that every leaf is an array of numbers, or a number.

    Raises:
      TypeError: naming the path of the first leaf that is not.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        numbers = isinstance(leaf, jax.Array | int | float)
        if isinstance(leaf, np.ndarray | np.generic):
            numbers = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool
        if not numbers:
            raise TypeError(
                f"RMSProp needs arrays for leaves, but {key_name(path)} is "
                f"{short_repr(leaf)}; leave it out, as with "
                "equinox.filter(model, equinox.is_inexact_array)"
            )


@contextlib.contextmanager
def blame_leaves(*trees: Any) -> Generator[None]:
    """Replace errors raised inside by one that names the offending leaf, if any.

    Raises:
      TypeError: a leaf is not an array.
      ValueError: leaves are on different devices, outside a jit.
    """
    try:
        yield
    except (AttributeError, TypeError):
        for tree in trees:
            check_array_leaves(tree)
        raise
    except ValueError as error:
        if "incompatible devices" not in str(error):
            raise
        raise ValueError(
            "the leaves are on different devices: give each device's leaves an "
            "optimizer of their own, as with optax.partition, or shard all over one "
            "mesh"
        ) from None


def check_class(state: Any, kind: type) -> None:
    """Check that a state is of this class.

    Raises:
      TypeError: naming its class.
    """
    if isinstance(state, kind):
        return
    names, advice = str(jax.tree.structure(state)), ""
    if "ScaleByRms" in names or "ScaleByRStdDev" in names:
        advice = "; `migrate.from_optax` makes one of Optax's"
    if "QuantizedState" in names:
        advice = "; `dequantize_state` makes one of a state in fewer bits"
    raise TypeError(
        f"`state` must be the {kind.__name__} that `init` returned, got "
        f"{type(state).__name__}{advice}"
    )


def check_fields(state: Any, **on: tuple[str, bool]) -> None:
    """Check that a state has the fields of its optimizer, and no others.

    Args:
      state: the state.
      on: for each field that may be None, its option and whether that is on.

    Raises:
      ValueError: a field is present but its option is off, or the other way round.
    """
    for field, (option, wanted) in on.items():
        if (getattr(state, field) is not None) != wanted:
            there, not_there = (" no", "") if wanted else ("", " no")
            raise ValueError(
                f"`state` has{there} {field}, but the optimizer has{not_there} "
                f"`{option}`: they must be made with the same options"
            )


def match_parameters(updates: Any, params: Any) -> list[Any]:
    """The parameter of each leaf of the updates that is not None, in order.

    Raises:
      ValueError: the parameters have another tree, or a leaf another shape.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(
        updates, is_leaf=lambda x: x is None
    )
    try:
        parameters = tree.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            "`params` must have the structure of the updates, but "
            + str(error).splitlines()[0][:200]
        ) from None
    pairs = [(p, g, x) for (p, g), x in zip(leaves, parameters, strict=True)]
    for path, g, x in pairs:
        if g is not None and x is not None and np.shape(x) != np.shape(g):
            raise ValueError(
                f"`params` must have the shapes of the updates, but {key_name(path)} "
                f"has {np.shape(x)} and its gradient {np.shape(g)}"
            )
    return [x for _, g, x in pairs if g is not None]


def check_full_precision(leaves: Sequence[Any]) -> None:
    """Check that averages are float32 or wider.

    Raises:
      TypeError: one is not.
    """
    for x in leaves:
        if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.finfo(x.dtype).bits < 32:
            raise TypeError(
                "`state` must be in full precision, but its nu is "
                f"{x.dtype}; pass quantization.dequantize_state(state, ...)"
            )


def check_gradient(updates: Any, nu: Any, mu: Any, momentum: Any) -> None:
    """Check that gradients are floating point or complex, and match the state.

    Raises:
      TypeError: a leaf is neither floating point nor complex.
      ValueError: naming the first leaf that differs, its tree if only one of them has
        it, and both shapes; or gradients are real and the state is complex.
    """
    check_inexact_leaves(updates)
    check_full_precision(jax.tree.leaves(nu))
    for part in (mu, momentum):
        for g, x in zip(jax.tree.leaves(updates), jax.tree.leaves(part), strict=False):
            if jnp.iscomplexobj(x) and not jnp.iscomplexobj(g):
                raise ValueError(
                    "the gradient does not match the optimizer state: the gradient is "
                    f"{g.dtype}, the state is of complex parameters"
                )
    trees = jax.tree.structure(updates), jax.tree.structure(nu)
    if trees[0] == trees[1]:
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(nu), strict=True)
        if all(g.shape == n.shape for g, n in pairs):
            return  # without the names, which are slow for thousands of leaves
    gradient = {
        key_name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(updates)
    }
    state = {key_name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(nu)}
    for path in gradient | state:
        if path not in state:
            what = f"has shape {gradient[path]}, the state has no such leaf"
        elif path not in gradient:
            what = f"has no such leaf, the state has one of shape {state[path]}"
        elif gradient[path] != state[path]:
            what = f"has shape {gradient[path]}, the state has shape {state[path]}"
        else:
            continue
        raise ValueError(
            f"the gradient does not match the optimizer state at {path}: "
            f"the gradient {what}"
        )
    raise ValueError(
        "the gradient does not match the optimizer state: the leaves agree, but the "
        f"containers do not; the gradient is {trees[0]}, the state is {trees[1]}"
    )


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def key_name(path: Any) -> str:
    """Name a leaf by its path."""
    return jax.tree_util.keystr(path) or "the root"
