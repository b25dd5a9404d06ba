"""jaxinv: the invariances of neural networks, in pure functional JAX."""

from jaxinv.errors import InvalidInput, JaxinvError, UnsupportedOperation
from jaxinv.gauges import balance, distance_mod_rescaling, normalize, path_condition
from jaxinv.invariance import (
    equivariance_error,
    function_invariance_error,
    gradient_orthogonality,
)
from jaxinv.paths import (
    log_path_kappa,
    log_path_norm,
    path_kappa,
    path_norm,
    unit_path_norms,
)
from jaxinv.reparam import project_to_unit_norm, weight_normalize
from jaxinv.rescaling import (
    random_rescaling,
    rescale,
    rescale_gradient,
    rescale_state,
    rescaling_group,
    tangent_vectors,
)
from jaxinv.symmetries import discover
from jaxinv.transforms import path_sgd, scale_by_path_kappa, share_params

__version__ = "0.1.0"

__all__ = [
    "InvalidInput",
    "JaxinvError",
    "UnsupportedOperation",
    "balance",
    "discover",
    "distance_mod_rescaling",
    "equivariance_error",
    "function_invariance_error",
    "gradient_orthogonality",
    "log_path_kappa",
    "log_path_norm",
    "normalize",
    "path_condition",
    "path_kappa",
    "path_norm",
    "path_sgd",
    "project_to_unit_norm",
    "random_rescaling",
    "rescale",
    "rescale_gradient",
    "rescale_state",
    "rescaling_group",
    "scale_by_path_kappa",
    "share_params",
    "tangent_vectors",
    "unit_path_norms",
    "weight_normalize",
]
