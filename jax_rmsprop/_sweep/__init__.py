"""Sweeps of any function of hyperparameters, and populations of any optimizer."""

from jax_rmsprop._sweep._grid import log_one_minus
from jax_rmsprop._sweep._population import PopulationState, population
from jax_rmsprop._sweep._report import Summary, summary, to_dataframe
from jax_rmsprop._sweep._sweep import load_sweep, sweep

__all__ = [
    "PopulationState",
    "Summary",
    "load_sweep",
    "log_one_minus",
    "population",
    "summary",
    "sweep",
    "to_dataframe",
]
