"""Rescaling symmetries: the group, what it does to parameters, gradients and optimizer states,
and gauges, which single out one member of an orbit."""

from jaxinv.rescaling.action import RescalingGroup
from jaxinv.rescaling.gauges import (
    Gauge,
    balance,
    distance_mod_rescaling,
    normalize,
    path_condition,
)
from jaxinv.rescaling.group import (
    TangentVectors,
    log_scales,
    random_rescaling,
    rescale,
    rescale_gradient,
    rescale_state,
    rescaling_group,
    tangent_vectors,
)

__all__ = [
    "Gauge",
    "RescalingGroup",
    "TangentVectors",
    "balance",
    "distance_mod_rescaling",
    "log_scales",
    "normalize",
    "path_condition",
    "random_rescaling",
    "rescale",
    "rescale_gradient",
    "rescale_state",
    "rescaling_group",
    "tangent_vectors",
]
