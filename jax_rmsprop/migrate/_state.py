"""Build our state from their arrays, and extract their arrays from ours.

The fields are "nu", the average of g^2 as all others store it, "mu" and "momentum".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, tree_leaves_with_path, tree_map_with_path

from jax_rmsprop._rmsprop import RMSPropState
from jax_rmsprop.migrate._elements import LayoutIndex, Ours, Theirs
from jax_rmsprop.quantization import QuantizedState

FIELDS = ("nu", "mu", "momentum")
# The keys of a complex leaf's parts in `optax.contrib.split_real_and_imaginary`.
_PARTS: dict[Any, Callable[[np.ndarray], np.ndarray]] = {
    GetAttrKey("real"): np.real,
    GetAttrKey("imaginary"): np.imag,
}


def to_numpy(x: Any) -> np.ndarray:
    """Convert any framework's array; PyTorch's and Keras's have a method for it."""
    if hasattr(x, "full_tensor"):  # a DTensor: each process has a part
        x = x.full_tensor()
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":  # not in NumPy
            x = x.float()
    return np.asarray(x.numpy() if hasattr(x, "numpy") else x)


def put_like(old: Any, value: np.ndarray) -> jax.Array:
    """The value with an array's dtype and sharding, also across hosts."""
    value = np.asarray(value).astype(old.dtype)
    if not isinstance(old, jax.Array):
        return jnp.asarray(value)
    return jax.make_array_from_callback(
        old.shape, old.sharding, lambda index: value[index]
    )


def build_state(
    optimizer: optax.GradientTransformation,
    params: Any,
    index: LayoutIndex,
    theirs: Mapping[str, Mapping[str, Any]],
    words: Mapping[str, str],
    count: int,
    weight: float | None = None,
    absent: Collection[str] = (),
) -> Any:
    """The optimizer's state, filled with their arrays.

    Args:
      optimizer: any transformation that contains RMSProp, with or without momentum.
      params: the parameters.
      index: maps their elements to ours.
      theirs: their arrays by field and name.
      words: their names of the fields, for messages.
      count: the number of steps taken.
      weight: the weight that a bias-corrected average has collected.
      absent: names of the parameters whose state is initialized as by the optimizer.

    Raises:
      ValueError: an array is missing, unknown, unexpected or of another shape.
    """
    template = optimizer.init(params)
    _check_not_quantized(template)
    initial = extract_arrays(template, index)[0] if absent else {}
    theirs = {
        f: {n: x for n, x in initial.get(f, {}).items() if n in absent}
        | dict(theirs.get(f, {}))
        for f in FIELDS
    }
    fields = {f: index.ours(theirs[f], words[f]) for f in FIELDS}
    for path, mu in fields["mu"].items():
        if path in fields["nu"]:
            fields["nu"][path] = _variance(fields["nu"][path], mu)
    # In order, so that an error names the same array in every run.
    unused = dict.fromkeys((field, path) for field in FIELDS for path in fields[field])

    def put(field: str, tree: Any) -> Any:
        def put_leaf(path: Any, old: Any) -> jax.Array:
            whole, part = _parameter_path(path, index)
            if whole not in fields[field]:
                name = index.name_of(whole, exclude=theirs.get(field, {}))
                raise ValueError(f"the checkpoint has no {words[field]} for {name!r}")
            unused.pop((field, whole), None)
            return put_like(old, part(fields[field][whole]))

        return tree_map_with_path(put_leaf, tree)

    def visit(path: Any, x: Any) -> Any:
        if isinstance(x, RMSPropState):
            return RMSPropState(
                count=put_like(x.count, np.asarray(count)),
                nu=put("nu", x.nu),
                mu=put("mu", x.mu),
                momentum=put("momentum", x.momentum),
                weight=None
                if x.weight is None
                else put_like(x.weight, np.asarray(weight)),
            )
        # The step of another Optax transformation.
        if path[-1:] == (GetAttrKey("count"),):
            return put_like(x, np.asarray(count))
        return x

    state = tree_map_with_path(visit, template, is_leaf=is_ours)
    for field, path in unused:
        raise ValueError(
            f"the checkpoint has {words[field]} for {index.name_of(path)!r}, but the "
            "optimizer keeps none"
        )
    return state


def extract_arrays(state: Any, index: LayoutIndex) -> tuple[dict[str, Theirs], int]:
    """Convert our fields to their arrays, by field and name; also the step count."""
    _check_not_quantized(state)
    fields: dict[str, Ours] = {field: {} for field in FIELDS}
    counts = [0]

    def collect(field: str, tree: Any) -> None:
        for path, x in tree_leaves_with_path(tree):
            whole, part = _parameter_path(path, index)
            value = to_numpy(x)
            if part is np.imag:
                value = 1j * value
            fields[field][whole] = fields[field].get(whole, 0) + value

    for x in jax.tree.leaves(state, is_leaf=is_ours):
        if is_ours(x):
            counts.append(int(x.count))
            for field in FIELDS:
                collect(field, getattr(x, field))
    for path, mu in fields["mu"].items():
        fields["nu"][path] = fields["nu"][path] + _square(mu, fields["nu"][path])
    return {f: index.theirs(fields[f]) for f in FIELDS}, max(counts)


def pop_array(
    theirs: dict[str, Theirs], field: str, name: str, words: Mapping[str, str]
) -> np.ndarray:
    """Remove and return one of their arrays.

    Raises:
      ValueError: the state does not have it.
    """
    if name not in theirs[field]:
        raise ValueError(f"the state has no {words[field]} for {name!r}")
    return theirs[field].pop(name)


def check_all_used(theirs: dict[str, Theirs], words: Mapping[str, str]) -> None:
    """Check that no array of the state is left over.

    Raises:
      ValueError: naming the first that is.
    """
    for field, arrays in theirs.items():
        for name in arrays:
            raise ValueError(
                f"the state has {words[field]} for {name!r}, but the target optimizer "
                "keeps none"
            )


def _check_not_quantized(state: Any) -> None:
    def is_quantized(x: Any) -> bool:
        return isinstance(x, QuantizedState)

    if any(is_quantized(x) for x in jax.tree.leaves(state, is_leaf=is_quantized)):
        raise ValueError(
            "a state in fewer bits cannot be migrated: pass what `dequantize_state` "
            "returns, and an optimizer without `quantize_state`"
        )


def is_ours(x: Any) -> bool:
    """Whether it is the state of this package's RMSProp."""
    return isinstance(x, RMSPropState)


def _parameter_path(path: Any, index: LayoutIndex) -> tuple[Any, Callable[[Any], Any]]:
    """The parameter's path, and the function that takes this part of its value."""
    if path not in index.shapes and path and path[-1] in _PARTS:
        return path[:-1], _PARTS[path[-1]]
    return path, lambda x: x


def _square(mu: np.ndarray, nu: np.ndarray) -> np.ndarray:
    """The square that nu averages: of each part separately if nu is complex."""
    mu = mu.astype(np.complex128 if np.iscomplexobj(mu) else np.float64)
    if np.iscomplexobj(nu):
        return np.real(mu) ** 2 + 1j * np.imag(mu) ** 2
    return np.abs(mu) ** 2


def _variance(nu: np.ndarray, mu: np.ndarray) -> np.ndarray:
    spread = nu - _square(mu, nu)
    if np.iscomplexobj(nu):
        return np.maximum(np.real(spread), 0) + 1j * np.maximum(np.imag(spread), 0)
    return np.maximum(spread, 0)
