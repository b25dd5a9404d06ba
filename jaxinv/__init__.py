"""jaxinv: the invariances of neural networks, in pure functional JAX."""

from jaxinv.errors import InvalidInput, JaxinvError, UnsupportedOperation
from jaxinv.paths import (
    log_path_kappa,
    log_path_norm,
    path_kappa,
    path_norm,
    unit_path_norms,
)
from jaxinv.transforms import path_sgd, scale_by_path_kappa, share_params

__version__ = "0.1.0"

__all__ = [
    "InvalidInput",
    "JaxinvError",
    "UnsupportedOperation",
    "log_path_kappa",
    "log_path_norm",
    "path_kappa",
    "path_norm",
    "path_sgd",
    "scale_by_path_kappa",
    "share_params",
    "unit_path_norms",
]
