"""Trace a training: its program for one member, its outputs, its fingerprint."""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jax_rmsprop._validate import short_repr

OutputSpecs = dict[str, jax.ShapeDtypeStruct]


class Traced(NamedTuple):
    """A training of one member, as JAX sees it.

    Attributes:
      jaxpr: from the numeric hyperparameters, by name in sorted order, to the outputs.
      outputs: their shapes and dtypes, by name.
    """

    jaxpr: Any  # jax.extend.core.ClosedJaxpr, whose type JAX 0.12 does not export
    outputs: OutputSpecs

    def member(self, consts: list[Any], *numbers: Any) -> list[Any]:
        """The training as a function of the arrays, too, that it closes over."""
        closed = self.jaxpr.replace(consts=consts)
        return jax.extend.core.jaxpr_as_fun(closed)(*numbers)


def trace(
    train: Callable[..., Any], python: Mapping[str, Any], numbers: Mapping[str, Any]
) -> Traced:
    """Trace `train` for one member.

    Args:
      train: a function of keyword arguments.
      python: those that are known while it is traced.
      numbers: the dtypes of those that are not.

    Raises:
      TypeError: `train` cannot be traced or returns something else than arrays.
      RuntimeError: `train` raises an error of its own.
    """
    names: list[str] = []

    def outputs(numbers: Mapping[str, Any]) -> list[Any]:
        try:
            tree = train(**python, **numbers)
        except jax.errors.JAXTypeError as error:
            raise TypeError(
                f"`train` cannot be traced: {type(error).__name__} {user_frame(error)}"
                "; a hyperparameter that decides shapes or branches must be an axis of "
                "Python values (an array of dtype object)"
            ) from error
        except Exception as error:
            raise RuntimeError(
                f"`train` raised {type(error).__name__} {user_frame(error)}: "
                f"{str(error).splitlines()[0] if str(error) else 'without a message'}"
            ) from error
        leaves = name_outputs(tree)
        names[:] = leaves
        return list(leaves.values())

    arguments = {name: jax.ShapeDtypeStruct((), numbers[name]) for name in numbers}
    jaxpr: Any = jax.make_jaxpr(outputs)(arguments)
    return Traced(
        jaxpr,
        {
            name: jax.ShapeDtypeStruct(aval.shape, aval.dtype)
            for name, aval in zip(names, jaxpr.out_avals, strict=True)
        },
    )


def check_signature(
    function: Any, names: tuple[str, ...], called: str = "train"
) -> None:
    """Check that a function can be called with the axes' names, and with nothing else.

    Raises:
      TypeError: naming the axis that it does not take, or the argument it lacks.
    """
    if not callable(function):
        raise TypeError(
            f"`{called}` must be a function of the axes, got {short_repr(function)}"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin or the like has none; calling it will tell
    try:
        signature.bind_partial(**dict.fromkeys(names))  # what it does not take
        signature.bind(**dict.fromkeys(names))  # what it lacks
    except TypeError as error:
        raise TypeError(
            f"`{called}` must take the axes of the grid by name: {error}; the axes are "
            f"{', '.join(names)}, its arguments ({', '.join(signature.parameters)})"
        ) from None


def fingerprint(traced: Traced) -> str:
    """Fingerprint a training by its program and the arrays in it.

    The program is the one that is compiled, as StableHLO: a jaxpr prints a set in the
    order of this process' hashes, and of an array its shape. The arrays that the
    training closes over are the program's arguments and are hashed beside it, also
    those that JAX may come to take out of it at a greater depth. What a callback to
    the host does is not seen, only that it is called.
    """
    closed = traced.jaxpr
    numbers = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in closed.in_avals]
    member = jax.jit(traced.member, keep_unused=True)
    program = member.lower(list(closed.consts), *numbers)
    digest = hashlib.sha256(program.as_text().encode())
    for inner in inner_jaxprs(closed):
        for array in _arrays(inner):
            digest.update(np.asarray(without_key(array)).tobytes())
    return digest.hexdigest()[:16]


def inner_jaxprs(value: Any) -> Generator[Any]:
    """A jaxpr and all those within it, whatever class they are of."""
    if hasattr(value, "eqns"):
        yield value
        for equation in value.eqns:
            yield from inner_jaxprs(tuple(equation.params.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from inner_jaxprs(part)


def is_key(array: Any) -> bool:
    """Whether it is of random keys."""
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def without_key(array: Any) -> Any:
    """The numbers of an array: of random keys their data."""
    return jax.random.key_data(array) if is_key(array) else array


def _arrays(jaxpr: Any) -> Generator[Any]:
    """The arrays that a jaxpr closes over, and those among its equations' operands."""
    yield from getattr(jaxpr, "consts", ())
    for equation in jaxpr.eqns:
        for operand in equation.invars:
            value: Any = getattr(operand, "val", 0)
            if np.ndim(value):
                yield value


def name_outputs(tree: Any) -> dict[str, Any]:
    """The leaves by their paths; a bare array is called "value"."""
    leaves: dict[str, Any] = {}
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    for path, leaf in found:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if name in leaves or "/" in name or not name.isprintable():
            raise ValueError(
                "`train` must return names that differ, printable and without a /; got "
                f"{name!r}"
            )
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(
                f"`train` must return a tree of arrays, but {name} is "
                f"{short_repr(leaf)}"
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(
                f"`train` must return numbers, but {name} is {leaf.dtype}; "
                "jax.random.key_data makes numbers of random keys"
            )
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            raise TypeError(
                f"`train` must return numbers, but {name} is of dtype {leaf.dtype}"
            )
        if 0 in leaf.shape:
            raise ValueError(
                f"`train` must return arrays with elements, but {name} has shape "
                f"{leaf.shape}"
            )
        leaves[name] = leaf
    if not leaves:
        raise TypeError(f"`train` must return a tree of arrays, got {short_repr(tree)}")
    return leaves


def user_frame(error: BaseException) -> str:
    """The last line of the caller's own code that an error passed through."""
    library = str(Path(jax.__file__).parent)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((library, str(Path(__file__).parent)))
    ]
    return f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
