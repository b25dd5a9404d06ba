"""How large a network is, by norms of its weights and of its layers."""

from jaxinv.capacity.norms import (
    RescalingInvariance,
    fisher_rao_norm,
    group_norm,
    log_group_norm,
    log_layer_product_norm,
    log_margin_normalized,
    log_unit_norms,
    margins,
    rescaling_invariance,
)
from jaxinv.capacity.spectral import (
    LinearOperator,
    SpectralNorms,
    linear_operators,
    log_spectral_complexity,
    log_spectral_product,
    spectral_norms,
)

__all__ = [
    "LinearOperator",
    "RescalingInvariance",
    "SpectralNorms",
    "fisher_rao_norm",
    "group_norm",
    "linear_operators",
    "log_group_norm",
    "log_layer_product_norm",
    "log_margin_normalized",
    "log_spectral_complexity",
    "log_spectral_product",
    "log_unit_norms",
    "margins",
    "rescaling_invariance",
    "spectral_norms",
]
