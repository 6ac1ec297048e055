"""Map elements of foreign arrays to elements of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

Layout = Callable[[Any], Mapping[str, Any]]
# Arrays by the paths of our parameters, and by the names of theirs.
Ours = dict[Any, np.ndarray]
Theirs = dict[str, np.ndarray]

# Parts that DataParallel, torch.compile, FSDP, activation checkpointing and DeepSpeed
# add to a name.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}


class LayoutIndex:
    """A layout as indices: the positions of each foreign array's elements in ours.

    The layout is applied once to arrays like the parameters whose elements are numbered
    consecutively. The result indexes in both directions.
    """

    def __init__(self, layout: Layout, params: Any) -> None:
        """Apply the layout once.

        Raises:
          TypeError: it does not return a dict.
          ValueError: an element is missing, duplicated or changed.
        """
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        self.shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves}
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        self._ends = np.cumsum(sizes)
        self._size = sum(sizes)
        # JAX's functions would truncate int64 to int32.
        dtype = np.int32 if self._size < 2**31 else np.int64
        numbers = np.arange(self._size, dtype=dtype)
        named: Any = layout(tree.unflatten(self._leaves(numbers).values()))
        if not isinstance(named, Mapping):
            raise TypeError(
                "`layout` must return a dict of arrays by name, got "
                f"{type(named).__name__}"
            )
        self._places = {name: np.asarray(place) for name, place in named.items()}
        flat = np.concatenate(
            [numbers[:0], *(p.ravel() for p in self._places.values())]
        )
        if not np.array_equal(np.sort(flat), numbers):
            raise ValueError(
                "`layout` must return each element of `params` once and unchanged, but "
                f"{self._first_bad_leaf(flat)}"
            )

    def _first_bad_leaf(self, flat: np.ndarray) -> str:
        for path, numbers in self._leaves(np.arange(self._size)).items():
            found = flat[np.isin(flat, numbers)]
            if not np.array_equal(np.sort(found), numbers.ravel()):
                return f"not those of {jax.tree_util.keystr(path) or 'the root'}"
        return "adds some of its own"

    @property
    def names(self) -> list[str]:
        """The names of their arrays, in the layout's order."""
        return list(self._places)

    def known(self, name: str) -> str:
        """The layout's name for a parameter that a wrapper may have renamed.

        DistributedDataParallel adds `module.`, `torch.compile` adds `_orig_mod.`.
        """
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        return name if name in self._places or plain not in self._places else plain

    def name_of(self, path: Any, exclude: Collection[str] = ()) -> str:
        """The first of their arrays, not in `exclude`, with elements of our leaf."""
        numbers = self._leaves(np.arange(self._size))[path]
        for name, place in self._places.items():
            if name not in exclude and np.isin(place, numbers).any():
                return name
        return jax.tree_util.keystr(path)

    def ours(self, arrays: Mapping[str, Any], field: str) -> Ours:
        """Our leaves that are fully covered by their arrays.

        Raises:
          ValueError: a name or a shape is not the layout's.
        """
        for name, array in arrays.items():
            if name not in self._places:
                raise ValueError(
                    f"`layout` has no {name!r}, but the checkpoint has ({field})"
                )
            if array.shape != self._places[name].shape:
                raise ValueError(
                    f"{field} of {name!r} has shape {array.shape} in the checkpoint, "
                    f"but {self._places[name].shape} in `layout`"
                )
        ours: Ours = {}
        for alike in _by_kind(arrays):
            flat, known = self._flat(alike.values())
            for name, array in alike.items():
                flat[self._places[name]] = array
                known[self._places[name]] = True
            whole = self._leaves(known)
            found = {p: x for p, x in self._leaves(flat).items() if whole[p].all()}
            ours = found | ours  # without elements it is in both, and real
        return ours

    def theirs(self, arrays: Ours) -> Theirs:
        """Their arrays that are fully covered by our leaves."""
        theirs: Theirs = {}
        for alike in _by_kind(arrays):
            flat, known = self._flat(alike.values())
            into, filled = self._leaves(flat), self._leaves(known)
            for path, array in alike.items():
                into[path][...] = array
                filled[path][...] = True
            places = self._places.items()
            theirs |= {n: flat[at] for n, at in places if known[at].all()}
        return theirs

    def _flat(self, arrays: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """A buffer for all elements, and a mask of those that are known."""
        dtype = np.result_type(np.float32, *(a.dtype for a in arrays))
        return np.zeros(self._size, dtype), np.zeros(self._size, bool)

    def _leaves(self, flat: np.ndarray) -> dict[Any, np.ndarray]:
        """Views of the elements as leaves, by path."""
        parts = np.split(flat, self._ends)
        return {
            path: part.reshape(shape)
            for (path, shape), part in zip(self.shapes.items(), parts, strict=False)
        }


def _by_kind(arrays: Mapping[Any, np.ndarray]) -> list[dict[Any, np.ndarray]]:
    """Split arrays into real and complex ones, which would else all become complex."""
    kinds: list[dict[Any, np.ndarray]] = [{}, {}]
    for key, array in arrays.items():
        kinds[np.iscomplexobj(array)][key] = array
    return [kind for kind in kinds if kind]
