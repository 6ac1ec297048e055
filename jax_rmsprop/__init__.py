"""RMSProp for JAX, as pure Optax gradient transformations."""

from jax_rmsprop import _versions as _versions  # isort: skip - tells an old JAX first

from jax_rmsprop._diagnose import Diagnosis, diagnose
from jax_rmsprop._rmsprop import RMSPropState, rmsprop, scale_by_rmsprop
from jax_rmsprop.sweeps import (
    Summary,
    Training,
    drop_carries,
    linear,
    load_carry,
    load_sweep,
    log,
    log_one_minus,
    points,
    successive_halving,
    summary,
    sweep,
    to_dataframe,
)

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "RMSPropState",
    "Summary",
    "Training",
    "__version__",
    "diagnose",
    "drop_carries",
    "linear",
    "load_carry",
    "load_sweep",
    "log",
    "log_one_minus",
    "points",
    "rmsprop",
    "scale_by_rmsprop",
    "successive_halving",
    "summary",
    "sweep",
    "to_dataframe",
]
