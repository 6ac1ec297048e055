"""RMSProp for JAX, as pure Optax gradient transformations."""

from jax_rmsprop import _versions as _versions  # isort: skip - tells an old JAX first

from jax_rmsprop._diagnose import Diagnosis, diagnose
from jax_rmsprop._optimizer import rmsprop
from jax_rmsprop._sweep import (
    PopulationState,
    Summary,
    linear,
    load_sweep,
    log,
    log_one_minus,
    points,
    population,
    summary,
    sweep,
    to_dataframe,
)
from jax_rmsprop._transform import ScaleByRMSPropState, scale_by_rmsprop

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "PopulationState",
    "ScaleByRMSPropState",
    "Summary",
    "__version__",
    "diagnose",
    "linear",
    "load_sweep",
    "log",
    "log_one_minus",
    "points",
    "population",
    "rmsprop",
    "scale_by_rmsprop",
    "summary",
    "sweep",
    "to_dataframe",
]
