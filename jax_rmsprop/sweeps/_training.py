"""Trace a training: its program for one member, its outputs, its fingerprint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jax_rmsprop._validate import expected, key_name, short_repr
from jax_rmsprop.sweeps._identity import (
    identify,
    key_impl,
    with_key,
    without_key,
)

OutputSpecs = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Training:
    r"""A training of many steps, which `sweep` can stop, save and resume.

    .. math::
        c_0 = \mathrm{init}(h), \qquad (c_{t+1}, y_t) = \mathrm{step}(c_t, h)

    Attributes:
      init: maps the hyperparameters, as keyword arguments, to the carry: parameters,
        optimizer state, random keys, a position in the data; any tree of arrays.
      step: maps the carry, and the hyperparameters by name, to the next carry, of the
        same shapes and dtypes, and the outputs, like those of a `train`. You decide
        what a step is: an epoch, or a thousand steps of an environment. It should
        take some milliseconds or more.

    Raises:
      TypeError: one of them is not a function.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_rmsprop import Training, rmsprop, sweep
      >>> def init(gamma):
      ...     x = jnp.array([-5.0, -2.0])
      ...     return x, rmsprop(0.4, gamma).init(x)
      >>> def step(carry, gamma):
      ...     x, state = carry
      ...     loss, gradient = jax.value_and_grad(lambda x: (x**2).sum())(x)
      ...     updates, state = rmsprop(0.4, gamma).update(gradient, state)
      ...     return (optax.apply_updates(x, updates), state), {"loss": loss}
      >>> curves = sweep(
      ...     Training(init, step), {"gamma": [0.9, 0.99]}, steps=20, progress=False
      ... )
      >>> dict(curves.loss.sizes)
      {'gamma': 2, 'step': 20}
    """

    init: Callable[..., Any]
    step: Callable[..., Any]

    def __post_init__(self) -> None:
        """Check that both are functions."""
        for name, function in vars(self).items():
            if not callable(function):
                raise TypeError(expected(name, "a function", function))


@dataclasses.dataclass(frozen=True)
class Traced:
    """The jaxprs of one member's training; a plain one has no carry and one step.

    Outside the jaxprs, random keys in a carry or closed over are their key data.

    Attributes:
      init: the jaxpr from the numeric hyperparameters, sorted by name, to the
        leaves of the carry.
      step: from those leaves and the hyperparameters to the leaves and the outputs.
      carry: the structure of the carry.
      impls: for each leaf of random keys, their generator; else None.
      outputs: the outputs' shapes and dtypes, by name.
    """

    init: Any  # jax.extend.core.ClosedJaxpr, whose type JAX 0.12 does not export
    step: Any
    carry: Any
    impls: list[Any]
    outputs: OutputSpecs

    @functools.cached_property
    def consts(self) -> list[Any]:
        """The arrays that `init` and `step` close over."""
        return [without_key(x) for x in (*self.init.consts, *self.step.consts)]

    @property
    def carry_specs(self) -> list[Any]:
        """The shape and dtype of each leaf of the carry."""
        return list(self.init.out_avals)

    def begin(self, consts: list[Any], *numbers: Any) -> list[Any]:
        """The first carry, as a function of the closed-over arrays and the numbers."""
        return _with_consts(self.init, consts[: len(self.init.consts)])(*numbers)

    def advance(
        self, consts: list[Any], carry: list[Any], *numbers: Any
    ) -> tuple[list[Any], list[Any]]:
        """The next carry and the outputs of a step."""
        step = _with_consts(self.step, consts[len(self.init.consts) :])
        found = step(*carry, *numbers)
        return found[: len(carry)], found[len(carry) :]

    def tree(self, carry: list[Any]) -> Any:
        """The carry as the training's own tree."""
        return jax.tree.unflatten(self.carry, map(with_key, carry, self.impls))

    @functools.cached_property
    def calls_back(self) -> bool:
        """Whether it calls back to this process."""
        return any(True for _ in _callbacks(self, returning=False))

    @functools.cached_property
    def has_rbg(self) -> bool:
        """Whether it draws what `jax.vmap` draws from the first key of a batch."""
        return any(
            equation.primitive.name == "rng_bit_generator"
            or any("rbg" in str(x.aval) for x in equation.outvars)  # such as key<rbg>
            for equation in equations((self.init, self.step))
        )

    @functools.cached_property
    def has_mesh(self) -> bool:
        """Whether it places arrays on a mesh of its own."""
        names = {"sharding_constraint", "shard_map", "device_put", "reshard"}
        return any(
            equation.primitive.name in names and "mesh" in str(equation.params).lower()
            for equation in equations((self.init, self.step))
        )


def _with_consts(closed: Any, consts: list[Any]) -> Callable[..., Any]:
    """A jaxpr with its closed-over arrays replaced; they may be traced."""
    own = list(map(with_key, consts, map(key_impl, closed.consts)))
    return jax.extend.core.jaxpr_as_fun(closed.replace(consts=own))


def trace(
    train: Callable[..., Any] | Training,
    python: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> Traced:
    """Trace a training for one member.

    Args:
      train: a function of keyword arguments, or a `Training` of two such functions.
      python: the arguments that are known at trace time.
      numbers: the dtypes of the traced arguments.

    Raises:
      TypeError: it cannot be traced or returns anything but arrays.
      RuntimeError: it raises an error of its own.
    """
    arguments = {name: jax.ShapeDtypeStruct((), numbers[name]) for name in numbers}
    names, impls, structure = list[str](), list[Any](), jax.tree.structure(())

    def begin(numbers: Mapping[str, Any]) -> list[Any]:
        nonlocal structure
        if not isinstance(train, Training):
            return []
        tree = _called("init", train.init, **python, **numbers)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not _is_array(leaf):
                raise TypeError(
                    f"`init` must return a tree of arrays, but {key_name(path)} is "
                    f"{short_repr(leaf)}"
                )
        leaves, structure = jax.tree.flatten(tree)
        impls[:] = map(key_impl, leaves)
        leaves = map(without_key, leaves)
        # Not weakly typed, as no step returns them; and something to keep.
        return [
            jax.lax.convert_element_type(x, jnp.result_type(x)) for x in leaves
        ] or [jnp.zeros([], bool)]

    def advance(carry: list[Any], numbers: Mapping[str, Any]) -> list[Any]:
        if isinstance(train, Training):
            before = jax.tree.unflatten(structure, map(with_key, carry, impls))
            found = _called("step", train.step, before, **python, **numbers)
            if not isinstance(found, tuple) or len(found) != 2:
                raise TypeError(
                    "`step` must return a pair, the carry and the outputs, got "
                    f"{_described(found)}"
                )
            carry = [without_key(x) for x in _same_carry(before, found[0])] or carry
            leaves = name_outputs(found[1], "step")
        else:
            tree = _called("train", train, **python, **numbers)
            leaves = name_outputs(tree, "train")
        names[:] = leaves
        return [*carry, *leaves.values()]

    init: Any = jax.make_jaxpr(begin)(arguments)
    carry = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in init.out_avals]
    step: Any = jax.make_jaxpr(advance)(carry, arguments)
    outputs = zip(names, step.out_avals[len(carry) :], strict=True)
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs}
    return Traced(init, step, structure, impls, specs)


def _called(
    name: str, function: Callable[..., Any], /, *carry: Any, **point: Any
) -> Any:
    """Call a user's function; reduce an error it raises to one line."""
    try:
        return function(*carry, **point)
    except Exception as error:
        frame, text = user_frame(error, function), str(error)
        kind = type(error).__name__
        whole = [n for n, x in point.items() if jnp.issubdtype(_dtype(x), jnp.integer)]
        if isinstance(error, jax.errors.TracerArrayConversionError) or any(
            f"`{word}` function" in text for word in ("float", "complex")
        ):
            why = (
                f"{frame} a number is asked for (float, item, np.array), which is not "
                "known while the program is made; return the array"
            )
        elif isinstance(error, jax.errors.JAXTypeError):
            why = (
                f"{kind} {frame}; a hyperparameter that decides shapes or branches "
                "must be an axis of Python values (an array of dtype object)"
            )
        elif isinstance(error, TypeError) and "concrete values" in text and whole:
            why = (
                f"a shape is not known {frame}; make {' or '.join(whole)} an axis of "
                "Python values, such as np.array([16, 32], object)"
            )
        else:
            first = text.splitlines()[0] if text else "without a message"
            raise RuntimeError(f"`{name}` raised {kind} {frame}: {first}") from error
        raise TypeError(f"`{name}` cannot be traced: {why}") from error


def _dtype(x: Any) -> Any:
    """The dtype of a tracer; object for anything else."""
    return x.dtype if isinstance(x, jax.core.Tracer) else np.dtype(object)


def _same_carry(before: Any, after: Any) -> list[Any]:
    """The leaves of the carry that a step returns.

    Raises:
      TypeError: naming the first leaf that differs from the carry it got.
    """
    old, tree = jax.tree_util.tree_flatten_with_path(before)
    try:
        new = tree.flatten_up_to(after)
    except ValueError as error:
        raise TypeError(
            "`step` must return a carry like the one it got, but "
            f"{str(error).splitlines()[0][:200]}"
        ) from None
    for (path, x), y in zip(old, new, strict=True):
        found, wanted = _described(y), _described(x)
        if found != wanted:
            raise TypeError(
                "`step` must return a carry like the one it got, but "
                f"{key_name(path) if path else 'it'} is {found} and was {wanted}"
            )
    return new


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | complex | float | int)


def _described(x: Any) -> str:
    """An array as "float32[2, 3]", other values by their repr."""
    if _is_array(x):
        return f"{jnp.result_type(x)}{list(jnp.shape(x))}"
    return short_repr(x)


def check_signature(train: Any, names: tuple[str, ...]) -> None:
    """Check that a training takes the axes' names and needs no other argument.

    Raises:
      TypeError: naming the axis that it does not take, or the argument it lacks.
    """
    functions: list[tuple[str, Any, tuple[Any, ...]]] = [("train", train, ())]
    if isinstance(train, Training):
        functions = [("init", train.init, ()), ("step", train.step, (None,))]
    elif not callable(train):
        allowed = "a function of the axes, or a Training"
        raise TypeError(expected("train", allowed, train))
    for called, function, carry in functions:
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            continue  # a builtin or the like has none; the call itself raises
        try:
            signature.bind_partial(*carry, **dict.fromkeys(names))  # unknown arguments
            signature.bind(*carry, **dict.fromkeys(names))  # missing arguments
        except TypeError as error:
            after = " after the carry" if carry else ""
            why = str(error).replace("got an unexpected keyword argument", "it has no")
            why = why.replace("missing a required argument:", "no axis is called")
            raise TypeError(
                f"`{called}` must take the axes by name{after}: {why}; its arguments "
                f"are ({', '.join(signature.parameters)}), the axes {', '.join(names)}"
            ) from None


def fingerprint(traced: Traced) -> str:
    """Fingerprint a training by its programs, the arrays and the callbacks in them.

    Programs are hashed as StableHLO, as they are compiled: a jaxpr prints sets in the
    order of this process' hashes, and only the shape of an array. The arrays that the
    training closes over are the program's arguments and are hashed separately, also
    those in nested jaxprs. A callback counts if it returns something.

    Raises:
      TypeError: such a callback cannot be identified.
    """
    digest = hashlib.sha256()
    numbers = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in traced.init.in_avals]
    carry = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in traced.carry_specs]
    if carry:
        begin = jax.jit(traced.begin, keep_unused=True)
        digest.update(begin.lower(traced.consts, *numbers).as_text().encode())
    advance = jax.jit(traced.advance, keep_unused=True)
    program = advance.lower(traced.consts, carry, *numbers)
    digest.update(program.as_text().encode())
    for inner in inner_jaxprs((traced.init, traced.step)):
        for array in _arrays(inner):
            digest.update(np.asarray(without_key(array)).tobytes())
    for function in _callbacks(traced):
        try:
            digest.update(identify(function).encode())
        except TypeError as error:
            raise TypeError(
                "`train` calls back a function that a store cannot tell apart from "
                f"another: {error}"
            ) from None
    return digest.hexdigest()[:16]


def _callbacks(traced: Traced, returning: bool = True) -> Generator[Any]:
    """The functions of this process that a training calls back."""
    for equation in equations((traced.init, traced.step)):
        function = equation.params.get("callback")
        if function is not None and (equation.outvars or not returning):
            yield getattr(function, "callback_func", function)


def inner_jaxprs(value: Any) -> Generator[Any]:
    """A jaxpr and all jaxprs nested in it, of any class."""
    if hasattr(value, "eqns"):
        yield value
        for equation in value.eqns:
            yield from inner_jaxprs(tuple(equation.params.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from inner_jaxprs(part)


def equations(jaxprs: Any) -> Generator[Any]:
    """The equations of jaxprs and of all nested in them."""
    for inner in inner_jaxprs(jaxprs):
        yield from inner.eqns


def _arrays(jaxpr: Any) -> Generator[Any]:
    """The arrays that a jaxpr closes over or has as operands of its equations."""
    yield from getattr(jaxpr, "consts", ())
    for equation in jaxpr.eqns:
        for operand in equation.invars:
            value: Any = getattr(operand, "val", 0)
            if np.ndim(value):
                yield value


def name_outputs(tree: Any, called: str) -> dict[str, Any]:
    """The leaves by path; the name of a bare array is "value"."""
    leaves: dict[str, Any] = {}
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    for path, leaf in found:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        kind, wrong = TypeError, ""
        a_file = "/" in name or name in (".", "..", "zarr.json")
        if name in leaves or a_file or not name.isprintable():
            kind = ValueError
            wrong = f"names that differ, printable and without a /; got {name!r}"
        elif not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            wrong = "an array or a tree of arrays, "
            wrong += (f"but {name} is " if path else "got ") + short_repr(leaf)
        elif jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            wrong = f"numbers, but {name} is {leaf.dtype}; jax.random.key_data makes "
            wrong += "numbers of random keys"
        elif not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            wrong = f"numbers, but {name} is of dtype {leaf.dtype}"
        elif 0 in leaf.shape:
            kind = ValueError
            wrong = f"arrays with elements, but {name} has shape {leaf.shape}"
        if wrong:
            raise kind(f"`{called}` must return {wrong}")
        leaves[name] = leaf
    if not leaves:
        wrong = f"an array or a tree of arrays, got {short_repr(tree)}"
        raise TypeError(f"`{called}` must return {wrong}")
    return leaves


def user_frame(error: BaseException, function: Any) -> str:
    """The last line of the caller's own code that an error passed through.

    It is in the function's file, if the error passed there; else in the last file that
    is neither JAX's nor ours.
    """
    library = str(Path(jax.__file__).parent)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((library, str(Path(__file__).parent)))
    ]
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = [f for f in frames if code is not None and f.filename == code.co_filename]
    frames = own or frames
    return f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
