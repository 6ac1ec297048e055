"""Identify Python values by content, not by address, location or name."""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import os
import sys
import types
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import jax
import numpy as np

_PLAIN = bool | int | float | complex | str | bytes | np.dtype | range | slice


def identify(value: Any) -> str:
    """Digest a value; the digest is the same in every process.

    A function is digested by its code, its defaults, what it closes over and the
    globals that it names; a partial, a dataclass or another object by its parts; an
    object that a library defines by its name there.

    Raises:
      TypeError: a part of it has no content to digest.
    """
    digest = hashlib.sha256()
    for part in _parts(value, frozenset()):
        digest.update(part)
    return digest.hexdigest()[:12]


def key_impl(array: Any) -> Any:
    """The generator of random keys; None for other arrays."""
    dtype = getattr(array, "dtype", np.dtype(float))
    is_key = jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
    return jax.random.key_impl(array) if is_key else None


def without_key(array: Any) -> Any:
    """The array itself, or the key data of random keys."""
    return array if key_impl(array) is None else jax.random.key_data(array)


def with_key(array: Any, impl: Any) -> Any:
    """Invert `without_key`, given the generator."""
    return array if impl is None else jax.random.wrap_key_data(array, impl=impl)


def _parts(value: Any, outside: frozenset[int]) -> Generator[bytes]:
    """The value as bytes that no other value has."""
    yield f"{type(value).__qualname__}(".encode()
    name = _name_in_library(value)
    if name is not None:
        yield name.encode()
    elif value is None or isinstance(value, _PLAIN):
        yield repr(value).encode()
    elif isinstance(value, jax.Array | np.ndarray | np.generic) and value.dtype != "O":
        yield f"{value.dtype}{value.shape}".encode()
        yield np.asarray(without_key(value)).tobytes()
    elif id(value) not in outside:  # else the value contains itself
        for part in _inside(value):
            yield from _parts(part, outside | {id(value)})
    yield b")"


def _inside(value: Any) -> list[Any]:
    if isinstance(value, types.FunctionType):
        code, cells = value.__code__, value.__closure__ or ()
        names = _names(code)
        known = {n: value.__globals__[n] for n in names if n in value.__globals__}
        closed = [cell.cell_contents for cell in cells]
        return [code, value.__defaults__, value.__kwdefaults__, closed, known]
    if isinstance(value, types.CodeType):
        return [value.co_code, list(value.co_consts), list(value.co_names)]
    if isinstance(value, functools.partial):
        return [value.func, list(value.args), value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, enum.Enum):
        return [value.name]
    if isinstance(value, os.PathLike):
        return [os.fspath(value)]
    if isinstance(value, Mapping):
        pairs = [(identify(key), x) for key, x in value.items()]
        return [list(pair) for pair in sorted(pairs, key=lambda pair: pair[0])]
    if isinstance(value, set | frozenset):
        return sorted(map(identify, value))
    if isinstance(value, np.ndarray | list | tuple):
        return list(value)
    if hasattr(value, "__wrapped__"):  # such as of jax.jit
        return [value.__wrapped__]
    slots = {n for c in type(value).__mro__ for n in getattr(c, "__slots__", ())}
    parts = {
        n: x for n, x in getattr(value, "__dict__", {}).items() if _is_own(value, n)
    }
    parts |= {
        n: getattr(value, n) for n in slots if n[:2] != "__" and hasattr(value, n)
    }
    if parts:
        return [parts]
    opaque = type(value).__repr__ is object.__repr__ or isinstance(value, Iterator)
    if not opaque:
        with contextlib.suppress(Exception):  # what cannot be pickled
            return list(value.__reduce_ex__(2))
    raise TypeError(f"a {type(value).__name__} has no content to identify it by")


def _is_own(value: Any, name: str) -> bool:
    """Whether an attribute is content, and not a cache."""
    if isinstance(getattr(type(value), name, None), functools.cached_property):
        return False
    fields = getattr(value, "__dataclass_fields__", None)
    return fields is None or name in fields or name[0] != "_"


def _names(code: types.CodeType) -> set[str]:
    """The names in a function's code and in functions nested in it."""
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _names(const)
    return names


def _name_in_library(value: Any) -> str | None:
    """The name of a module, a class, or an object of an installed package."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    module = getattr(value, "__module__", None) or "numpy"  # ufuncs have none
    found: Any = sys.modules.get(module) if isinstance(module, str) else None
    if not isinstance(name, str) or found is None:
        return None
    file = getattr(found, "__file__", None) or "site-packages"
    for part in name.split("."):
        found = getattr(found, part, None)
    library = "site-packages" in file or file.startswith(sys.base_prefix)
    if found is value and (library or isinstance(value, type)):
        return f"{module}.{name}"
    return None
