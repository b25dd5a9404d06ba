"""A function that mixes the examples of a batch is not the function that a batch of one shows."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxinv import UnsupportedOperation, path_kappa, path_norm

W = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 1.0]])
X = jnp.ones((4, 3))

MIXING = {
    "centred": lambda w, x: (x - x.mean(0)) @ w,
    "max over the batch": lambda w, x: x @ w + (x @ w).max(0, keepdims=True),
    "product along the batch": lambda w, x: (jnp.ones((len(x), len(x))) @ x) @ w,
    "running sum": lambda w, x: jnp.cumsum(x @ w, axis=0),
    "sorted": lambda w, x: jnp.sort(x @ w, axis=0),
    "reversed": lambda w, x: (x @ w)[::-1],
    "merged with features": lambda w, x: (x @ w) + jnp.ravel(x @ w).sum(),
    "inside jit": lambda w, x: jax.jit(lambda h: h - h.mean(0))(x) @ w,
    "inside scan": lambda w, x: (
        lax.scan(lambda h, _: (h + h.mean(0), None), x, None, length=2)[0] @ w
    ),
}
APART = {
    "plain": lambda w, x: x @ w,
    "mean over features": lambda w, x: (x @ w).mean(1, keepdims=True),
    "vmapped": lambda w, x: jax.vmap(lambda one: one @ w)(x),
    "batch merged and split again": lambda w, x: jnp.reshape(jnp.reshape(x, (-1,)), (-1, 3)) @ w,
    "sum over the batch as the only output": lambda w, x: (x @ w).sum(0),
    "mixing that is never used": lambda w, x: (x @ w, x.mean(0))[0],
}


@pytest.mark.parametrize("fn", MIXING.values(), ids=MIXING)
@pytest.mark.parametrize("measure", [path_norm, path_kappa])
def test_mixing_examples_is_refused_with_the_line_that_does_it(fn, measure):
    with pytest.raises(UnsupportedOperation, match="along the batch axis") as error:
        measure(fn, W, X)
    assert "test_examples.py" in str(error.value)
    assert "different examples of the batch" in str(error.value)


@pytest.mark.parametrize("fn", APART.values(), ids=APART)
def test_treating_examples_apart_is_accepted(fn):
    assert path_norm(fn, W, X) > 0
