"""Priors, posteriors and their chains; learning coefficients, estimated and exact."""

from jaxinv.bayes.learning_coefficient import (
    LearningCoefficientBounds,
    LocalLearningCoefficient,
    learning_coefficient_bounds,
    local_learning_coefficient,
)
from jaxinv.bayes.priors import (
    gaussian_log_prior,
    jeffreys_log_prior,
    log_incoming_norms,
    log_likelihood,
    log_posterior,
    posterior_predictive,
)
from jaxinv.bayes.rlct import LearningCoefficient, deep_linear, normal_crossing, reduced_rank
from jaxinv.bayes.sampling import (
    Diagnostics,
    Samples,
    diagnostics,
    dispersed_starts,
    sample_nuts,
    sample_sgld,
)

__all__ = [
    "Diagnostics",
    "LearningCoefficient",
    "LearningCoefficientBounds",
    "LocalLearningCoefficient",
    "Samples",
    "deep_linear",
    "diagnostics",
    "dispersed_starts",
    "gaussian_log_prior",
    "jeffreys_log_prior",
    "learning_coefficient_bounds",
    "local_learning_coefficient",
    "log_incoming_norms",
    "log_likelihood",
    "log_posterior",
    "normal_crossing",
    "posterior_predictive",
    "reduced_rank",
    "sample_nuts",
    "sample_sgld",
]
