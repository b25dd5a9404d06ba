"""Regions of inputs, and the segments drawn in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv.errors import InvalidInput
from jaxinv.gates import box, everywhere, hull, segments
from jaxinv.gates.regions import draw

KEY = jax.random.key(3)


def test_ends_lie_in_the_region(x64):
    corners = np.array([0.0, -1.0, 5.0]), np.array([1.0, 1.0, 6.0])
    for ends in draw(box(*corners), KEY, 200):
        assert (ends >= corners[0]).all() and (ends <= corners[1]).all()
        assert (np.ptp(ends, 0) > 0.9 * (corners[1] - corners[0])).all()
    given = np.random.default_rng(0).normal(size=(5, 3))
    for ends in draw(segments(given), KEY, 50):
        assert (abs(ends[:, None] - given).sum(2).min(1) == 0).all()
    simplex = np.eye(3)
    for ends in draw(hull(simplex), KEY, 50):
        np.testing.assert_allclose(ends.sum(1), 1, rtol=1e-6)
        assert (ends >= 0).all() and (np.sort(ends, 1)[:, 1] > 0).any()


def test_everywhere_reaches_far_and_near(x64):
    start, end = draw(everywhere(jax.ShapeDtypeStruct((7, 4), np.float32)), KEY, 400)
    assert start.shape == end.shape == (400, 4)
    size = np.log10(abs(np.asarray(start)).max(1))
    assert size.min() < -0.8 and size.max() > 0.9
    again, _ = draw(everywhere(np.zeros((1, 4))), KEY, 400)
    np.testing.assert_array_equal(start, again)


def test_inputs_may_be_a_pytree(x64):
    start, _ = draw(everywhere({"a": np.zeros((1, 2)), "b": np.zeros((1, 3, 2))}), KEY, 6)
    assert start["a"].shape == (6, 2) and start["b"].shape == (6, 3, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: everywhere(jnp.zeros((2, 3), jnp.int32)), "between whole numbers"),
        (lambda: box(np.zeros(3), np.array([1.0, 0.0, 1.0])), "low < high"),
        (lambda: box(np.zeros(3), np.ones(2)), "same shapes"),
        (lambda: hull(np.ones((1, 3))), "at least two inputs"),
        (lambda: segments(np.full((3, 2), np.nan)), "not finite|NaN"),
    ],
)
def test_regions_that_make_no_sense(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
