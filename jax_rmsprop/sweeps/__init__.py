"""Sweeps of any function of hyperparameters."""

from jax_rmsprop.sweeps._halving import successive_halving
from jax_rmsprop.sweeps._points import linear, log, log_one_minus, points
from jax_rmsprop.sweeps._report import Summary, summary, to_dataframe
from jax_rmsprop.sweeps._sweep import drop_carries, load_carry, load_sweep, sweep
from jax_rmsprop.sweeps._training import Training

__all__ = [
    "Summary",
    "Training",
    "drop_carries",
    "linear",
    "load_carry",
    "load_sweep",
    "log",
    "log_one_minus",
    "points",
    "successive_halving",
    "summary",
    "sweep",
    "to_dataframe",
]
