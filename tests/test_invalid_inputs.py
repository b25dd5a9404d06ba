"""Arguments that make no sense: the error names the leaf, what is wrong, and the remedy."""

import jax
import numpy as np
import pytest

from jaxinv import (
    InvalidInput,
    UnsupportedOperation,
    log_path_kappa,
    log_path_norm,
    networks,
    path_kappa,
    path_norm,
    unit_path_norms,
)

FUNCTIONS = [path_norm, log_path_norm, path_kappa, log_path_kappa, unit_path_norms]
W = np.array([[1.0, -2.0, 0.5], [0.5, 3.0, -1.0]], np.float32)
X = np.ones((4, 2), np.float32)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
class TestInvalidArguments:
    def linear(self, w, x):
        return x @ w["kernel"]

    def test_integer_params(self, function):
        with pytest.raises(InvalidInput, match=r"params/a/kernel.*int32.*float"):
            function(self.linear, {"a": {"kernel": np.ones((2, 1), np.int32)}}, X)

    def test_params_that_are_no_arrays(self, function):
        with pytest.raises(InvalidInput, match=r"params/kernel.*str"):
            function(self.linear, {"kernel": "weights"}, X)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_params_that_are_not_finite(self, function, bad):
        kernel = np.array([[bad], [1.0]], np.float32)
        with pytest.raises(InvalidInput, match=r"params/kernel has 1 .*of 2"):
            function(self.linear, {"kernel": kernel}, X)

    @pytest.mark.parametrize("empty", [{}, [], None, {"a": {}}], ids=repr)
    def test_empty_params(self, function, empty):
        with pytest.raises(InvalidInput, match="params has no leaves"):
            function(lambda w, x: x, empty, X)

    def test_empty_x(self, function):
        with pytest.raises(InvalidInput, match="x has no leaves"):
            function(lambda w, x: w, {"kernel": W}, {})

    def test_empty_batch(self, function):
        with pytest.raises(InvalidInput, match=r"x has shape \(0, 2\).*at least one example"):
            function(self.linear, {"kernel": W}, X[:0])

    def test_scalar_x(self, function):
        with pytest.raises(InvalidInput, match="x is a scalar.*batch axis"):
            function(self.linear, {"kernel": W}, np.float32(1))

    def test_scalar_leaf_of_x(self, function):
        x = {"image": X, "temperature": np.float32(1)}
        with pytest.raises(InvalidInput, match="x/temperature is a scalar.*batch axis"):
            function(lambda w, x: x["image"] @ w["kernel"], {"kernel": W}, x)

    @pytest.mark.parametrize("p", [0, 0.5, -2.0, np.nan, np.inf])
    def test_exponent_below_one_or_not_a_number(self, function, p):
        with pytest.raises(InvalidInput, match="p must"):
            function(self.linear, {"kernel": W}, X, p=p)


def test_params_under_jit_are_not_looked_at():
    """A NaN is refused where values are concrete; under jit it shows as NaN, not as an error."""
    params = {"Dense_0": {"kernel": np.full((2, 1), np.nan, np.float32)}}
    assert np.isnan(jax.jit(lambda w: path_norm(networks.mlp, w, X))(params))


def test_units_need_a_batch_axis():
    with pytest.raises(UnsupportedOperation, match="batch axis"):
        unit_path_norms(lambda w, x: (x @ w).sum(axis=0), W, X)
    with pytest.raises(UnsupportedOperation, match="batch axis"):
        unit_path_norms(lambda w, x: (x @ w).sum(), W, X)


def test_numbers_for_p_may_be_integers_or_numpy_scalars():
    expected = path_norm(lambda w, x: x @ w, W, X, p=2.0)
    for p in (2, np.float32(2), np.int64(2)):
        assert path_norm(lambda w, x: x @ w, W, X, p=p) == expected
