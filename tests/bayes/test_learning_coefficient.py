"""Estimates of learning coefficients against exact ones, closed forms and quadrature."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import InvalidInput
from jaxinv.bayes import (
    deep_linear,
    learning_coefficient_bounds,
    local_learning_coefficient,
    normal_crossing,
    reduced_rank,
    sample_sgld,
)
from jaxinv.bayes.langevin import langevin_step, standard_normal
from jaxinv.experiments.learning_coefficient import DEEP_LINEAR, REDUCED_RANK
from jaxinv.networks import init_mlp, mlp

KEY = jax.random.key(0)


def linear_network(widths, rank):
    """(K, w*): ‖W_L ⋯ W_1 − T‖²/2 with T of the given rank, at parameters that are 0 elsewhere."""

    def unit(rows, columns):
        found = np.zeros((rows, columns), np.float32)
        found[np.arange(rank), np.arange(rank)] = 1
        return jnp.asarray(found)

    layers = [unit(b, a) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    truth = unit(widths[-1], widths[0])

    def loss(layers):
        product = layers[0]
        for layer in layers[1:]:
            product = layer @ product
        return ((product - truth) ** 2).sum() / 2

    return loss, layers


def estimate(loss, params, n=10**4, **options):
    """λ̂ of a population loss: n is the inverse temperature."""
    options = {"num_steps": 20000, "num_warmup": 4000} | options
    return local_learning_coefficient(loss, params, n, KEY, beta=1.0, **options)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", REDUCED_RANK, ids=str)
def test_reduced_rank_regression_within_a_tenth(sizes):
    found = estimate(*linear_network(sizes[:3], sizes[3]))
    exact = float(reduced_rank(*sizes).value)
    assert abs(found.value - exact) < 0.1 * exact
    assert found.standard_error < 0.02 * exact
    assert not found.diverged.any()


def test_the_settings_cover_the_four_cases():
    """Of Aoyagi and Watanabe, with multiplicity one: see the test of multiplicity two."""
    cases = {(m + h < n + r, n + h < m + r, m + n < h + r) for m, h, n, r in REDUCED_RANK}
    assert len(cases) == 4
    assert all(reduced_rank(*sizes).multiplicity == 1 for sizes in REDUCED_RANK)


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "rank"), DEEP_LINEAR)
def test_deep_linear_networks_within_a_tenth(widths, rank):
    exact = deep_linear(widths, rank)
    assert exact.multiplicity == 1
    found = estimate(*linear_network(widths, rank), n=10**5, num_steps=60000)
    assert abs(found.value - float(exact.value)) < 0.1 * float(exact.value)


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "rank"), [((1, 1, 1), 0), ((3, 2, 1, 2), 0), ((2, 3, 3, 2), 0)])
def test_multiplicity_shows_as_one_over_log_n(widths, rank):
    """With m > 1 the estimate is below λ by about (m − 1)/log n, at any n that can be reached."""
    exact = deep_linear(widths, rank)
    assert exact.multiplicity > 1
    found = estimate(*linear_network(widths, rank), n=10**6, num_steps=60000)
    expected = float(exact.value) - (exact.multiplicity - 1) / np.log(10**6)
    assert found.value < float(exact.value)
    assert abs(found.value - expected) < 0.1 * expected


@pytest.mark.parametrize(
    "sizes", [pytest.param((2, 2, 2, 0), marks=pytest.mark.slow), (2, 5, 2, 0)], ids=str
)
def test_singular_models_in_short(sizes):
    found = estimate(*linear_network(sizes[:3], sizes[3]), num_steps=4000, num_warmup=1500)
    exact = float(reduced_rank(*sizes).value)
    assert abs(found.value - exact) < 0.1 * exact


def expected_by_quadrature(exponents, n, localization=1.0):
    """E[n·K] for K = Π |w_i|^{k_i} in two dimensions, by summing over a logarithmic grid."""
    x = np.exp(np.linspace(np.log(1e-9), np.log(8.0), 4000))
    w = x * np.exp(-localization * x**2 / 2)  # dx of a logarithmic grid is x
    energy = n * x[:, None] ** exponents[0] * x[None] ** exponents[1]
    weight = w[:, None] * w[None] * np.exp(-energy)
    return (weight * energy).sum() / weight.sum()


@pytest.mark.parametrize("exponents", [pytest.param((2, 2), marks=pytest.mark.slow), (4, 2)])
def test_normal_crossings_agree_with_quadrature(exponents):
    def loss(w):
        return w[0] ** exponents[0] * w[1] ** exponents[1]

    found = estimate(loss, jnp.zeros(2), n=1000, num_steps=8000)
    expected = expected_by_quadrature(exponents, 1000)
    assert abs(found.value - expected) < 4 * found.standard_error + 0.005
    assert found.standard_error < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("exponents", [(2, 4), (4, 2), (2, 6)])
def test_normal_crossings_within_a_tenth(exponents):
    def loss(w):
        return w[0] ** exponents[0] * w[1] ** exponents[1]

    found = estimate(loss, jnp.zeros(2), n=10**6, num_steps=200000, scales=4.0)
    exact = float(normal_crossing(exponents).value)
    assert abs(found.value - exact) < 0.1 * exact


def test_a_regular_model_in_closed_form():
    """Along an eigenvector of the Hessian h the mean of nβL is nβh/(nβh + γ)/2."""
    h = jnp.array([0.001, 0.1, 1.0, 5.0])
    found = estimate(
        lambda w: (h * w["a"] ** 2).sum() / 2, {"a": jnp.zeros(4)}, n=1000, localization=3.0
    )
    expected = float((1000 * h / (1000 * h + 3)).sum() / 2)
    assert abs(found.value - expected) < 4 * found.standard_error + 0.01
    assert abs(found.drift) < 0.1
    assert ((found.acceptance > 0.3) & (found.acceptance < 0.85)).all()


def regression(n=400, d=3):
    x = jax.random.normal(jax.random.key(1), (n, d))
    y = x @ jnp.arange(1.0, d + 1) + jax.random.normal(jax.random.key(2), (n,))
    best = jnp.linalg.lstsq(x, y)[0]

    def loss(w, data):
        x, y = data
        return ((x @ w - y) ** 2).mean() / 2

    return loss, best, (x, y)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="mala"),
        pytest.param(
            {"sampler": "sgld", "batch_size": 100, "step_size": 1e-4},
            id="sgld",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_linear_regression_counts_its_parameters(options):
    loss, best, data = regression()
    found = local_learning_coefficient(loss, best, 400, KEY, data=data, num_steps=8000, **options)
    assert abs(found.value - 1.5) < 0.15 * 1.5
    expected = 400 * loss(best, data) + found.value * np.log(400)
    np.testing.assert_allclose(found.wbic, expected, rtol=1e-3)


def test_the_same_key_gives_the_same_chains_and_jit_changes_nothing():
    def run(key):
        return local_learning_coefficient(
            lambda w: (w**4).sum(), jnp.zeros(2), 100, key, num_steps=50, num_warmup=20
        )

    a, b = run(KEY), jax.jit(run)(KEY)
    np.testing.assert_allclose(a.losses, b.losses, rtol=1e-4)
    assert (run(KEY).losses == a.losses).all()
    assert not (run(jax.random.key(1)).losses == a.losses).all()


def test_double_precision_is_kept(x64):
    found = local_learning_coefficient(
        lambda w: (w**2).sum(), jnp.zeros(2), 100, KEY, num_steps=50, num_warmup=20
    )
    assert found.value.dtype == jnp.float64


def test_a_chain_that_diverges_is_named_and_spoils_the_mean():
    loss, best, data = regression()
    found = local_learning_coefficient(
        loss, best, 400, KEY, data=data, sampler="sgld", batch_size=50, step_size=1.0, num_steps=400
    )
    assert found.diverged.all()
    assert not jnp.isfinite(found.value)


def test_bounds_of_a_relu_network():
    params = init_mlp(jax.random.key(0), (3, 4, 2), bias_std=0.1)
    x = jax.random.normal(jax.random.key(1), (200, 3))
    bounds = learning_coefficient_bounds(mlp, params, x, "softmax")
    # 26 parameters, 4 rescalings, and softmax does not see a constant added to both logits: 4
    # outgoing weights and a bias count once.
    assert bounds.parameters == 26
    assert bounds.certain
    assert int(bounds.rank) == 26 - 4 - 5
    assert str(bounds).startswith("17/2 <= λ <= 13")


@pytest.mark.slow
def test_a_regular_point_up_to_symmetry_attains_the_lower_bound():
    """Linear regression by two layers of one unit, away from 0: one ambiguity, λ = rank/2."""
    w = [jnp.array([[1.0], [2.0]]), jnp.array([[1.5]])]
    target = w[0] @ w[1]
    x = jax.random.normal(jax.random.key(1), (50, 2))
    bounds = learning_coefficient_bounds(lambda w, x: (x @ w[0]) @ w[1], w, x, "gaussian")
    found = estimate(lambda w: ((w[0] @ w[1] - target) ** 2).sum() / 2, w, localization=10.0)
    assert int(bounds.rank) == 2
    assert abs(found.value - 1) < 0.05


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_examples": 1}, "num_examples"),
        ({"num_chains": 0}, "num_chains"),
        ({"num_steps": 1.5}, "num_steps"),
        ({"num_warmup": -1}, "num_warmup"),
        ({"sampler": "gibbs"}, "sampler"),
        ({"sampler": "sgld", "step_size": 0.1}, "minibatches"),
        ({"sampler": "sgld", "data": jnp.ones(3), "batch_size": 2}, "step_size"),
        ({"sampler": "sgld", "data": jnp.ones(3), "batch_size": 4, "step_size": 1.0}, "batch_size"),
        ({"params": jnp.zeros(2, int)}, "int32"),
        ({"loss": lambda w: w}, "scalar"),
    ],
)
def test_bad_arguments(changed, message):
    arguments = {
        "loss": lambda w: (w**2).sum(), "params": jnp.zeros(2), "num_examples": 9, "key": KEY,
        **changed,
    }  # fmt: skip
    with pytest.raises(InvalidInput, match=message):
        local_learning_coefficient(**arguments)


def test_both_langevin_samplers_have_the_stationary_variance_of_the_discretised_diffusion():
    """On N(0, 1) w ← (1 − ε)w + √(2ε)·n has variance 2ε/(1 − (1 − ε)²) = 2/(2 − ε)."""
    for step in (0.5, 1.0):
        exact = 2 / (2 - step)
        drawn = sample_sgld(
            lambda w, key: -w, jnp.zeros((8, 50)), KEY,
            step_size=step, num_warmup=50, num_samples=500,
        )  # fmt: skip
        np.testing.assert_allclose(drawn.params.var(), exact, rtol=0.02)
        # With nβ = 1 and no localisation the loss ½w² is −log of the density of N(0, 1).
        found = local_learning_coefficient(
            lambda w, data: w[0] ** 2 / 2, jnp.zeros(1), 2, KEY, data=jnp.ones(1), beta=0.5,
            localization=0.0, sampler="sgld", batch_size=1, step_size=step,
            num_chains=400, num_steps=500, num_warmup=50,
        )  # fmt: skip
        np.testing.assert_allclose(2 * found.losses.mean(), exact, rtol=0.02)


def test_the_langevin_step_is_that_of_blackjax():
    blackjax = pytest.importorskip("blackjax")
    w = {"a": jnp.arange(3.0), "b": jnp.ones(2)}
    slope = jax.tree.map(jnp.sin, w)
    theirs = blackjax.sgld(lambda w, batch: batch).step(KEY, w, slope, 0.3)
    ours = langevin_step(w, slope, standard_normal(KEY, w), 0.3)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
