"""Optimizers that are invariant, as optax gradient transformations."""

from jaxinv.optimizers.kappa_preconditioner import ScaleByPathKappaState
from jaxinv.optimizers.natural import (
    ScaleByNaturalGradientState,
    natural_gradient,
    scale_by_natural_gradient,
)
from jaxinv.optimizers.path_kappa import (
    data_dependent_path_sgd,
    pass_full_params,
    path_sgd,
    scale_by_data_dependent_path_kappa,
    scale_by_path_kappa,
)
from jaxinv.optimizers.path_metric import (
    PathMetricSolution,
    ScaleByPathMetricState,
    path_metric_product,
    path_metric_sgd,
    path_metric_solve,
    scale_by_path_metric,
)

__all__ = [
    "PathMetricSolution",
    "ScaleByNaturalGradientState",
    "ScaleByPathKappaState",
    "ScaleByPathMetricState",
    "data_dependent_path_sgd",
    "natural_gradient",
    "path_metric_product",
    "path_metric_sgd",
    "path_metric_solve",
    "path_sgd",
    "scale_by_data_dependent_path_kappa",
    "scale_by_natural_gradient",
    "scale_by_path_kappa",
    "scale_by_path_metric",
    "pass_full_params",
]
