"""The search space: ranges of hyperparameters, and points spread over them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from jax_rmsprop._validate import check_int, expected


class ShortOfOne(np.ndarray):
    """Numbers whose distance to 1 matters, such as gammas."""


class Points(dict[str, Any]):
    """Paired axes: `sweep` does not form their product."""

    def __or__(self, other: Any) -> Points:
        """Add axes of the same length."""
        return Points({**self, **other})

    def __ror__(self, other: Any) -> Points:
        """Add them to other axes."""
        return Points({**other, **self})

    def copy(self) -> Points:
        """Points, too."""
        return Points(self)


_METHODS = ("sobol", "random", "latin")
# The allowed ends of a range on each scale; beyond 1e300 a float64 may overflow.
_ENDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "linear": ("a finite number", lambda x: -1e300 < x < 1e300),
    "log": ("above 0 and finite", lambda x: 1e-300 < x < 1e300),
    "log_one_minus": ("in [0, 1)", lambda x: 0 <= x < 1),
}


@dataclasses.dataclass(frozen=True)
class Range:
    """The values between two ends, evenly spaced on some scale, for `points`.

    Attributes:
      low: the first value.
      high: the last value.
      scale: "linear", "log" or "log_one_minus".
    """

    low: float
    high: float
    scale: str

    def at(self, fraction: np.ndarray) -> np.ndarray:
        """The values at these fractions of the way from one end to the other."""
        if self.scale == "linear":
            return self.low + fraction * (self.high - self.low)
        if self.scale == "log":
            values = self.low * (self.high / self.low) ** fraction
        else:
            short, least = 1 - self.low, 1 - self.high
            values = 1 - short * (least / short) ** fraction
        # Return the ends exactly, without rounding by the logarithms.
        values = np.where(fraction == 0, self.low, values)
        values = np.where(fraction == 1, self.high, values)
        return values.view(ShortOfOne) if self.scale == "log_one_minus" else values

    def grid(self, num: int) -> np.ndarray:
        """`num` values, from end to end."""
        return self.at(np.linspace(0, 1, num))


@overload
def log_one_minus(low: float, high: float) -> Range: ...
@overload
def log_one_minus(low: float, high: float, num: int) -> np.ndarray: ...
def log_one_minus(low: float, high: float, num: int | None = None) -> Any:
    r"""Gammas spaced evenly in log(1 - gamma).

    An average with decay gamma spans about 1/(1 - gamma) steps, so the distance to 1
    is what counts: .9, .99 and .999 are a factor of ten apart.

    .. math::
        \gamma_i = 1 - (1-low)^{1-i/(num-1)} (1-high)^{i/(num-1)}, \quad
        i = 0 \dots num-1

    Args:
      low: the first gamma, in [0, 1).
      high: the last one, in [0, 1).
      num: the number of values, at least 2; None returns a range for `points`.

    Returns:
      A float64 array of shape [num], an axis of `sweep`; without `num` a range.

    Raises:
      TypeError: `num` is not an integer.
      ValueError: an argument out of its range.

    Example:
      >>> from jax_rmsprop import log_one_minus
      >>> print(log_one_minus(0.9, 0.9999, 4))
      [0.9    0.99   0.999  0.9999]

    References:
      [Zhang et al., Dive into Deep Learning](https://d2l.ai/chapter_optimization/rmsprop.html)
    """
    return _range_or_grid("log_one_minus", low, high, num)


@overload
def log(low: float, high: float) -> Range: ...
@overload
def log(low: float, high: float, num: int) -> np.ndarray: ...
def log(low: float, high: float, num: int | None = None) -> Any:
    r"""Values spaced evenly in their logarithm, such as learning rates.

    .. math::
        x_i = low^{1-i/(num-1)} high^{i/(num-1)}, \quad i = 0 \dots num-1

    Args:
      low: the first value, above 0 and finite.
      high: the last one, above 0 and finite.
      num: the number of values, at least 2; None returns a range for `points`.

    Returns:
      A float64 array of shape [num], an axis of `sweep`; without `num` a range.

    Raises:
      TypeError: `num` is not an integer.
      ValueError: an argument out of its range.

    Example:
      >>> from jax_rmsprop import log
      >>> print(log(0.001, 1, 4))
      [0.001 0.01  0.1   1.   ]

    References:
      [numpy.geomspace](https://numpy.org/doc/stable/reference/generated/numpy.geomspace.html)
    """
    return _range_or_grid("log", low, high, num)


@overload
def linear(low: float, high: float) -> Range: ...
@overload
def linear(low: float, high: float, num: int) -> np.ndarray: ...
def linear(low: float, high: float, num: int | None = None) -> Any:
    r"""Evenly spaced values.

    .. math::
        x_i = low + \frac{i}{num-1} (high - low), \quad i = 0 \dots num-1

    Args:
      low: the first value, finite.
      high: the last one, finite.
      num: the number of values, at least 2; None returns a range for `points`.

    Returns:
      A float64 array of shape [num], an axis of `sweep`; without `num` a range.

    Raises:
      TypeError: `num` is not an integer.
      ValueError: `low` or `high` is not finite, or `num` is below 2.

    Example:
      >>> from jax_rmsprop import linear
      >>> print(linear(0, 0.9, 4))
      [0.  0.3 0.6 0.9]

    References:
      [numpy.linspace](https://numpy.org/doc/stable/reference/generated/numpy.linspace.html)
    """
    return _range_or_grid("linear", low, high, num)


def _range_or_grid(scale: str, low: Any, high: Any, num: int | None) -> Any:
    allowed, is_allowed = _ENDS[scale]
    for name, value in (("low", low), ("high", high)):
        if not isinstance(value, float | int | np.number):
            raise TypeError(expected(name, allowed, value))
        if np.iscomplexobj(value) or not is_allowed(value):
            raise ValueError(expected(name, allowed, value))
    values = Range(float(low), float(high), scale)
    return values if num is None else values.grid(check_int("num", num, low=2))


def points(
    space: Mapping[str, Any], n: int, *, method: str = "sobol", seed: int = 0
) -> Points:
    r"""Points spread over a space of hyperparameters, for `sweep`.

    A grid of 8 x 8 tries 8 values of each hyperparameter; 64 points try 64 of each.
    A point :math:`u` of the unit cube becomes, on each axis, the value that far along
    its range, or value number :math:`\lfloor k u \rfloor` in a list of :math:`k`.

    "sobol" (scrambled, most even if n is a power of two) and "random" are nested: the
    first 64 of 128 points are the same 64, so a search with a store can grow: repeat
    the call with more points. A Latin hypercube divides each axis into n parts, so
    another n is another design.

    Args:
      space: for each axis a range (`linear`, `log` or `log_one_minus` without `num`)
        or a sequence of values, as in `sweep`.
      n: the number of points, at least 1.
      method: "sobol", "random" or "latin".
      seed: seed of the scrambling or sampling, at least 0.

    Returns:
      n values for each axis: float64 for a range, else of the sequence's own type; a
      dict that `sweep` pairs, also when extended by more axes: `points(...) | more`.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: an empty space or axis, or an unknown method.

    Example:
      >>> from jax_rmsprop import log, log_one_minus, points, sweep
      >>> space = {"gamma": log_one_minus(0.5, 0.999), "learning_rate": log(1e-4, 1)}
      >>> def train(gamma, learning_rate):
      ...     return {"loss": gamma * learning_rate}
      >>> curves = sweep(train, points(space, 64), progress=False)
      >>> dict(curves.loss.sizes)
      {'member': 64}

    References:
      Bergstra and Bengio, [Random Search for Hyper-Parameter
      Optimization](https://jmlr.org/papers/v13/bergstra12a.html), 2012;
      [scipy.stats.qmc](https://docs.scipy.org/doc/scipy/reference/stats.qmc.html)
    """
    from scipy.stats import qmc

    _check_space(space)
    if method not in _METHODS:
        raise ValueError(expected("method", f"one of {', '.join(_METHODS)}", method))
    count = check_int("n", n, low=1)
    random = np.random.default_rng(check_int("seed", seed, low=0))
    if method == "random":
        cube = random.random((count, len(space)))
    else:
        sampler = qmc.Sobol if method == "sobol" else qmc.LatinHypercube
        with warnings.catch_warnings():
            # The docstring says that a power of two is most even.
            warnings.filterwarnings("ignore", "The balance properties of Sobol'")
            cube = sampler(len(space), rng=random).random(count)
    pairs = zip(space.items(), cube.T, strict=True)
    return Points({name: _take(values, u) for (name, values), u in pairs})


def _check_space(space: Any) -> None:
    if not isinstance(space, Mapping) or not space:
        allowed = "a mapping of at least one axis to a range or to values"
        raise TypeError(expected("space", allowed, space))
    for name, values in space.items():
        if isinstance(values, Range):
            continue
        is_array = hasattr(values, "__array__") and np.ndim(values) == 1
        if isinstance(values, str) or not (is_array or isinstance(values, Sequence)):
            allowed = "a range, such as log(1e-4, 1), or a sequence of values"
            raise TypeError(expected(name, allowed, values))
        if len(values) == 0:
            raise ValueError(f"`{name}` must have at least one value, got none")


def _take(values: Any, fraction: np.ndarray) -> Any:
    if isinstance(values, Range):
        return values.at(fraction)
    which = (fraction * len(values)).astype(int)
    if hasattr(values, "__array__"):
        return np.asarray(values)[which]
    return [values[i] for i in which]
