"""jaxinv: the invariances of neural networks, in pure functional JAX."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from jaxinv._interpreter.batch import batch_first
from jaxinv.bayes import learning_coefficient_bounds, local_learning_coefficient
from jaxinv.capacity import (
    fisher_rao_norm,
    group_norm,
    log_group_norm,
    log_spectral_product,
    margins,
    rescaling_invariance,
    spectral_norms,
)
from jaxinv.errors import InvalidInput, JaxinvError, UnsupportedOperation
from jaxinv.gates import functional_dimension
from jaxinv.invariance import (
    equivariance_error,
    function_invariance_error,
    gradient_orthogonality,
)
from jaxinv.jacobians import jacobian, jacobian_gram, jacobian_operator, tangent_kernel
from jaxinv.optimizers import (
    data_dependent_path_sgd,
    match_gradient_norm,
    natural_gradient,
    pass_full_params,
    path_metric_product,
    path_metric_sgd,
    path_metric_solve,
    path_sgd,
    scale_by_data_dependent_path_kappa,
    scale_by_natural_gradient,
    scale_by_path_kappa,
    scale_by_path_metric,
)
from jaxinv.paths import (
    data_dependent_path_kappa,
    data_dependent_path_norm,
    log_path_kappa,
    log_path_norm,
    path_kappa,
    path_norm,
    unit_path_norms,
)
from jaxinv.ranks import (
    degrees_of_freedom,
    jacobian_rank,
    jacobian_spectrum,
    saturating_inputs,
)
from jaxinv.reparam import (
    batch_norm_as_reparam,
    data_dependent_normalize,
    project_to_unit_norm,
    weight_normalize,
)
from jaxinv.rescaling import (
    balance,
    distance_mod_rescaling,
    normalize,
    path_condition,
    random_rescaling,
    rescale,
    rescale_gradient,
    rescale_state,
    rescaling_group,
    tangent_vectors,
)
from jaxinv.symmetries import discover_symmetries, is_symmetry, symmetry_group

__version__ = "0.1.0"

__all__ = [
    "InvalidInput",
    "JaxinvError",
    "UnsupportedOperation",
    "balance",
    "batch_first",
    "batch_norm_as_reparam",
    "data_dependent_path_kappa",
    "data_dependent_path_norm",
    "data_dependent_path_sgd",
    "data_dependent_normalize",
    "degrees_of_freedom",
    "discover_symmetries",
    "distance_mod_rescaling",
    "equivariance_error",
    "fisher_rao_norm",
    "function_invariance_error",
    "functional_dimension",
    "gradient_orthogonality",
    "group_norm",
    "is_symmetry",
    "jacobian",
    "jacobian_gram",
    "jacobian_operator",
    "jacobian_rank",
    "jacobian_spectrum",
    "learning_coefficient_bounds",
    "local_learning_coefficient",
    "log_group_norm",
    "log_path_kappa",
    "log_path_norm",
    "log_spectral_product",
    "margins",
    "match_gradient_norm",
    "natural_gradient",
    "normalize",
    "pass_full_params",
    "path_condition",
    "path_kappa",
    "path_metric_product",
    "path_metric_sgd",
    "path_metric_solve",
    "path_norm",
    "path_sgd",
    "project_to_unit_norm",
    "random_rescaling",
    "rescale",
    "rescale_gradient",
    "rescale_state",
    "rescaling_group",
    "rescaling_invariance",
    "saturating_inputs",
    "scale_by_data_dependent_path_kappa",
    "scale_by_natural_gradient",
    "scale_by_path_kappa",
    "scale_by_path_metric",
    "spectral_norms",
    "symmetry_group",
    "tangent_kernel",
    "tangent_vectors",
    "unit_path_norms",
    "weight_normalize",
]

if TYPE_CHECKING:
    from jaxinv import adapters as adapters
    from jaxinv import cli as cli
    from jaxinv import experiments as experiments
    from jaxinv import inspection as inspection
    from jaxinv import networks as networks
    from jaxinv import pages as pages
else:  # a type checker would take any name for a module
    _ON_DEMAND = ("adapters", "cli", "experiments", "inspection", "networks", "pages")

    def __getattr__(name: str) -> ModuleType:
        """A module that nothing above needs, imported when it is first asked for."""
        if name in _ON_DEMAND:
            return importlib.import_module(f"jaxinv.{name}")
        raise AttributeError(f"module 'jaxinv' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_ON_DEMAND})
