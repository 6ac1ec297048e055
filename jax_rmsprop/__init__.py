"""RMSProp for JAX, as pure Optax gradient transformations."""

from jax_rmsprop._optimizer import rmsprop
from jax_rmsprop._transform import ScaleByRMSPropState, scale_by_rmsprop

__version__ = "0.1.0"

__all__ = ["ScaleByRMSPropState", "__version__", "rmsprop", "scale_by_rmsprop"]
