"""Optimizers that are invariant, as optax gradient transformations."""

from jaxinv.optimizers.kappa_preconditioner import ScaleByPathKappaState
from jaxinv.optimizers.masking import pass_full_params
from jaxinv.optimizers.matching import MatchGradientNormState, match_gradient_norm
from jaxinv.optimizers.natural import (
    ScaleByNaturalGradientState,
    natural_gradient,
    scale_by_natural_gradient,
)
from jaxinv.optimizers.path_kappa import (
    data_dependent_path_sgd,
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
    "MatchGradientNormState",
    "PathMetricSolution",
    "ScaleByNaturalGradientState",
    "ScaleByPathKappaState",
    "ScaleByPathMetricState",
    "data_dependent_path_sgd",
    "match_gradient_norm",
    "natural_gradient",
    "pass_full_params",
    "path_metric_product",
    "path_metric_sgd",
    "path_metric_solve",
    "path_sgd",
    "scale_by_data_dependent_path_kappa",
    "scale_by_natural_gradient",
    "scale_by_path_kappa",
    "scale_by_path_metric",
]
