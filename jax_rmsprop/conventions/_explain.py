"""Print the table of conventions."""

from __future__ import annotations

import inspect
from typing import Any

from jax_rmsprop import _markdown
from jax_rmsprop.conventions import (
    _jax,
    _laprop,
    _mxnet,
    _others,
    _pytorch,
    _tensorflow,
)
from jax_rmsprop.conventions._table import CONVENTIONS, RECIPES

_FUNCTIONS = {
    name: x
    for family in (_pytorch, _tensorflow, _mxnet, _jax, _laprop, _others)
    for name, x in vars(family).items()
    if name in CONVENTIONS and inspect.isfunction(x)
}
_HEADER = [
    "convention",
    "of",
    "gamma",
    "eps, and the root",
    "initial nu",
    "rate enters momentum",
    "weight decay",
]


def explain(name: str | None = None) -> None:
    """Print a convention or a recipe, or the table of all, in Markdown.

    Args:
      name: a key of `CONVENTIONS` or `RECIPES`; None for all.

    Raises:
      ValueError: there is no convention of that name.

    Example:
      >>> explain("d2l")  # doctest: +NORMALIZE_WHITESPACE
      | convention | of           | gamma       | eps, and the root | initial nu
                                           | rate enters momentum | weight decay |
      | ---------- | ------------ | ----------- | ----------------- | ----------
                                           | -------------------- | ------------ |
      | `d2l`      | the textbook | `gamma` 0.9 | 1e-06, inside     | 0
                                           | no momentum          | none         |
    """
    names = [*CONVENTIONS, *RECIPES]
    if name is not None and name not in names:
        raise ValueError(f"`name` must be one of {', '.join(names)}; got {name!r}")
    rows = [_row(each) for each in (names if name is None else [name])]
    print(_markdown.table([_HEADER, *rows]))


def _row(name: str) -> list[str]:
    """The cells of a row, from the table and the defaults of the signature."""
    recipe = RECIPES.get(name)
    row = CONVENTIONS[recipe.convention if recipe else name]
    function = _FUNCTIONS[recipe.convention if recipe else name]
    values = {n: p.default for n, p in inspect.signature(function).parameters.items()}
    of = row.framework
    if recipe:
        values |= recipe.settings
        of = f"{recipe.title}: `{recipe.convention}`"

    gamma, eps = (row.argument_names.get(name, name) for name in ("gamma", "eps"))
    place = _words(row.eps_in_sqrt, "inside", "outside", "")
    rate = _words(row.lr_in_momentum, "before", "after", "no momentum")
    decay = _words(row.decoupled_weight_decay, "decoupled", "coupled", "none")
    if recipe and "momentum" not in recipe.settings:
        rate = "no momentum"
    if recipe and "weight_decay" not in recipe.settings:
        decay = "none"
    return [
        f"`{name}`",
        of,
        f"`{gamma}` {_last(values[gamma]):g}",
        # The textbook's eps is not an argument.
        f"`{eps}` {values[eps]:g}, {place}" if eps in values else f"1e-06, {place}",
        str(row.initial_scale).removesuffix(".0"),
        rate,
        decay,
    ]


def _words(value: bool | str | None, yes: str, no: str, none: str) -> str:
    if isinstance(value, str):
        return value
    return none if value is None else yes if value else no


def _last(value: Any) -> Any:
    """The decay of the squares, also from a pair of decays."""
    return value[-1] if isinstance(value, tuple) else value
