"""The Jacobian of a network's outputs in its parameters, products with it, and the Fisher
information that is made of it."""

from jaxinv.jacobians.fisher_information import (
    NaturalGradient,
    fisher,
    fisher_product,
    natural_gradient_direction,
    whitened,
)
from jaxinv.jacobians.jacobians import (
    JacobianOperator,
    jacobian,
    jacobian_gram,
    jacobian_operator,
    tangent_kernel,
)

__all__ = [
    "JacobianOperator",
    "NaturalGradient",
    "fisher",
    "fisher_product",
    "jacobian",
    "jacobian_gram",
    "jacobian_operator",
    "natural_gradient_direction",
    "tangent_kernel",
    "whitened",
]
