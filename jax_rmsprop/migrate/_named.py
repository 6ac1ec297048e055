"""Convert parameters that have names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.tree_util import tree_map_with_path

from jax_rmsprop.migrate._elements import Layout, LayoutIndex
from jax_rmsprop.migrate._state import put_like, to_numpy


def from_named(arrays: Mapping[str, Any], params: Any, *, layout: Layout) -> Any:
    """Convert their parameters to ours: the inverse of `layout`.

    Args:
      arrays: their arrays by name, such as a PyTorch model's `state_dict()` or, if that
        includes buffers or tied weights, `dict(model.named_parameters())`.
      params: our parameters, which give the result its tree, shapes, dtypes and
        placement.
      layout: as the module describes.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: an array is missing, unknown or of another shape.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from jax_rmsprop import migrate
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> layout = lambda tree: {"weight": tree["kernel"].T}
      >>> weight = np.array([[1, 2], [3, 4], [5, 6]])
      >>> migrate.from_named({"weight": weight}, params, layout=layout)
      {'kernel': Array([[1., 3., 5.],
             [2., 4., 6.]], dtype=float32)}
    """
    index = LayoutIndex(layout, params)
    theirs = {index.known(name): to_numpy(x) for name, x in arrays.items()}
    for name in theirs:
        if name not in index.names:
            raise ValueError(
                f"`layout` has no {name!r}, but `arrays` has; if it is a buffer or "
                "the second name of a tied weight, pass dict(model.named_parameters())"
            )
    values = index.ours(theirs, "the parameter")
    for path in index.shapes:
        if path not in values:
            raise ValueError(
                f"`arrays` has no parameter {index.name_of(path, exclude=theirs)!r}"
            )
    return tree_map_with_path(lambda path, old: put_like(old, values[path]), params)
