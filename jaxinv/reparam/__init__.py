"""Other parametrisations: rescalings removed, or replaced by statistics of the data."""

from jaxinv.reparam.data_dependent import (
    NormalizedNetwork,
    UnitStatistics,
    batch_norm_as_reparam,
    data_dependent_normalize,
    moving_average,
)
from jaxinv.reparam.gauge_fixed import (
    WeightNormalized,
    in_gauge,
    incoming_norms,
    project_to_unit_norm,
    tangent_gradient,
    weight_normalize,
)

__all__ = [
    "NormalizedNetwork",
    "UnitStatistics",
    "WeightNormalized",
    "batch_norm_as_reparam",
    "data_dependent_normalize",
    "in_gauge",
    "incoming_norms",
    "moving_average",
    "project_to_unit_norm",
    "tangent_gradient",
    "weight_normalize",
]
