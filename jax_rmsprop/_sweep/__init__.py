"""Sweeps of any function of hyperparameters."""

from jax_rmsprop._sweep._points import linear, log, log_one_minus, points
from jax_rmsprop._sweep._report import Summary, summary, to_dataframe
from jax_rmsprop._sweep._sweep import load_sweep, sweep

__all__ = [
    "Summary",
    "linear",
    "load_sweep",
    "log",
    "log_one_minus",
    "points",
    "summary",
    "sweep",
    "to_dataframe",
]
