"""Path norms and path sensitivities: of weights alone, and with the numbers on a batch."""

from jaxinv.paths.data_dependent import data_dependent_path_kappa, data_dependent_path_norm
from jaxinv.paths.norms import log_path_kappa, log_path_norm, path_kappa, path_norm, unit_path_norms

__all__ = [
    "data_dependent_path_kappa",
    "data_dependent_path_norm",
    "log_path_kappa",
    "log_path_norm",
    "path_kappa",
    "path_norm",
    "unit_path_norms",
]
