"""Jeffreys' density against closed forms, quadrature and brute-force volumes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats

from jaxinv import InvalidInput, rescale, rescaling_group, weight_normalize
from jaxinv.bayes import (
    gaussian_log_prior,
    jeffreys_log_prior,
    log_incoming_norms,
    log_likelihood,
    log_posterior,
    posterior_predictive,
)
from jaxinv.networks import init_mlp, mlp
from jaxinv.rescaling import log_scales, normalize

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (40, 2))
SIZES = (2, 3, 2, 2)


def product(w, x):
    return (x @ w[0]) @ w[1]


PAIR = [jnp.array([[2.0]]), jnp.array([[3.0]])]
ONE = jnp.ones((1, 1))
PRODUCT_GROUP = rescaling_group(product, PAIR, ONE)


@pytest.fixture(scope="module")
def net():
    """A network of two hidden layers on which no unit is dead, with its group."""
    w = init_mlp(jax.random.key(9), SIZES, bias_std=0.5)
    return w, rescaling_group(mlp, w, X)


def on_plane(log_density, w1, w2):
    """exp(log_density) at all pairs."""
    return np.asarray(
        jax.jit(jax.vmap(lambda a, b: jnp.exp(log_density([a[None], b[None]]))))(w1, w2)
    )


# --- one orbit: everything is known ---------------------------------------------------


def by_ratio(w):
    """The orbit coordinate of which the slice u = 0 is {|w₁| = |w₂|}."""
    return jnp.log(jnp.abs(w[0] / w[1])).ravel() / 2


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_the_slice_density_has_the_same_integral_on_every_slice(likelihood, x64):
    """Over θ = w₁w₂ from 1 to 4: 4 − 1 for "gaussian", ∫ √(σ(1 − σ)) dθ for "bernoulli"."""
    wanted = 3.0
    if likelihood == "bernoulli":  # 2·arctan(e^{θ/2})
        wanted = 2 * (np.arctan(np.exp(2)) - np.arctan(np.exp(0.5)))
    density = {
        name: jeffreys_log_prior(
            product, PRODUCT_GROUP, ONE, likelihood, convention="slice", coordinate=coordinate
        )
        for name, coordinate in (("unit", None), ("equal", by_ratio))
    }
    nodes, weights = np.polynomial.legendre.leggauss(20)
    t = jnp.asarray(2.5 + 1.5 * nodes)[:, None]  # w = (1, t)
    unit = on_plane(density["unit"], jnp.ones_like(t), t) @ weights * 1.5
    np.testing.assert_allclose(unit, wanted, rtol=1e-10)
    t = jnp.asarray(1.5 + 0.5 * nodes)[:, None]  # w = (t, t), of length √2 dt
    equal = on_plane(density["equal"], t, t) @ weights * 0.5 * 2**0.5
    np.testing.assert_allclose(equal, wanted, rtol=1e-10)


@pytest.mark.parametrize("coordinate", [None, by_ratio])
@pytest.mark.parametrize("orbit_scale", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_the_lift_of_a_coin_is_the_beta_law_whatever_the_orbit_law(coordinate, orbit_scale, x64):
    """∫ over the half plane w₁ > 0 is ∫ √(σ(1 − σ)) dθ = π; and the mean of σ² is 3/8."""
    density = jeffreys_log_prior(
        product, PRODUCT_GROUP, ONE, "bernoulli", coordinate=coordinate, orbit_scale=orbit_scale
    )
    # The trapezoidal rule in θ, which misses 0, and in a along the orbits of the coordinate.
    theta, step = jnp.linspace(-75, 75, 600, retstep=True)
    a = jnp.linspace(-12, 12, 241)
    a, theta = (v.reshape(-1, 1) for v in jnp.meshgrid(a, theta))
    root = jnp.sqrt(jnp.abs(theta)) if coordinate is by_ratio else 1
    values = on_plane(density, jnp.exp(a) * root, theta / root * jnp.exp(-a))
    mass = values * step * 0.1  # dw₁dw₂ = dθ da
    sigma = scipy.special.expit(np.asarray(theta[:, 0]))
    np.testing.assert_allclose(mass.sum(), np.pi, rtol=1e-6)
    np.testing.assert_allclose((mass * sigma**2).sum() / np.pi, 3 / 8, rtol=1e-6)


def test_the_pseudo_determinant_lacks_the_volume_of_the_orbit(x64):
    w = [jnp.array([[2.0]]), jnp.array([[3.0]])]
    found = jeffreys_log_prior(
        product, PRODUCT_GROUP, ONE, "gaussian", convention="pseudo-determinant"
    )(w)
    np.testing.assert_allclose(found, np.log(13) / 2, rtol=1e-12)  # F = (3, 2)ᵀ(3, 2)


def test_three_classes_give_the_dirichlet_law(x64):
    """Logits (a, b, 0): det F = π₁π₂π₃."""

    def logits(w, x):
        return x * jnp.append(w, jnp.zeros(1))

    w = jnp.array([0.3, -1.2])
    found = jeffreys_log_prior(logits, None, ONE, "softmax")(w)
    wanted = np.log(jax.nn.softmax(jnp.array([0.3, -1.2, 0.0]))).sum() / 2
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


# --- networks -------------------------------------------------------------------------


def test_density_of_a_network_is_the_volume_of_its_slice(x64):
    """√det S in orthonormal coordinates of the kernel of ∂u/∂w, from differences of `normalize`."""
    w, x = (
        init_mlp(jax.random.key(2), SIZES, bias_std=0.5, dtype=jnp.float64),
        X.astype(jnp.float64),
    )
    group = rescaling_group(mlp, w, x)
    flat, unravel = jax.flatten_util.ravel_pytree(w)
    J = jax.jit(jax.jacobian(lambda f: mlp(unravel(f), x).ravel()))(flat)
    coordinate = jax.jit(lambda f: -normalize(group, unravel(f)).u)
    steps = 1e-5 * np.eye(len(flat))
    U = np.stack([(coordinate(flat + e) - coordinate(flat - e)) / 2e-5 for e in steps], 1)
    N = scipy.linalg.null_space(U)
    volume = np.linalg.slogdet(N.T @ (J.T @ J / len(x)) @ N)[1] / 2
    on_slice = jeffreys_log_prior(mlp, group, x, "gaussian", convention="slice", chunk=16)
    assert np.isfinite(volume)
    np.testing.assert_allclose(jax.jit(on_slice)(w), volume, rtol=1e-6)
    lift = jax.jit(jeffreys_log_prior(mlp, group, x, "gaussian", orbit_scale=0.7))(w)
    law = scipy.stats.norm.logpdf(coordinate(flat), scale=0.7).sum()
    np.testing.assert_allclose(lift, volume + np.linalg.slogdet(U @ U.T)[1] / 2 + law, rtol=1e-6)


def test_the_lift_moves_with_a_rescaling_as_a_density_on_the_quotient_does(net):
    """log p(w·exp(Ba)) = log p(w) + log ν(u + a) − log ν(u) − Σ Ba, from float32 and far away."""
    w, group = net
    log_density = jax.jit(jeffreys_log_prior(mlp, group, X, "gaussian"))
    u = log_incoming_norms(group)(w)
    a = jnp.array([5.0, -6.0, 3.0, -4.0, 7.0])
    law = scipy.stats.norm.logpdf
    volume = sum(
        jnp.sum(s * jnp.ones_like(v))
        for s, v in zip(jax.tree.leaves(log_scales(group, a)), jax.tree.leaves(w), strict=True)
    )
    wanted = log_density(w) + law(u + a, scale=0.5).sum() - law(u, scale=0.5).sum() - volume
    assert np.isfinite(wanted)
    np.testing.assert_allclose(log_density(rescale(group, w, a)), wanted, rtol=1e-4)


def test_plain_and_weight_normalised_networks_have_one_density_of_functions(x64):
    """In coordinates of functions, combinations of outputs: √det S over their volume element."""
    w, x = (
        init_mlp(jax.random.key(2), SIZES, bias_std=0.5, dtype=jnp.float64),
        X.astype(jnp.float64),
    )
    group = rescaling_group(mlp, w, x)
    wn = weight_normalize(mlp, group)
    free = sum(v.size for v in jax.tree.leaves(w)) - group.dim
    mix = jnp.asarray(np.random.default_rng(0).normal(size=(free, 80)))
    found = []
    far = rescale(wn.group, wn.from_params(w), jnp.array([0.1, 0.2, -0.4, 0.5, -0.3]))
    for fn, start, own in ((mlp, w, group), (wn.fn, far, wn.group)):
        flat, unravel = jax.flatten_util.ravel_pytree(start)
        coordinate = log_incoming_norms(own)
        C = jax.jit(jax.jacobian(lambda f: mix @ fn(unravel(f), x).ravel()))(flat)  # noqa: B023
        U = jax.jit(jax.jacobian(lambda f: coordinate(unravel(f))))(flat)  # noqa: B023
        law = jax.scipy.stats.norm.logpdf(coordinate(start), scale=0.5).sum()
        lift = jax.jit(jeffreys_log_prior(fn, own, x, "gaussian"))(start)
        found.append(lift - law - np.linalg.slogdet(np.concatenate([C, U]))[1])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(*found, rtol=1e-8)


@pytest.mark.parametrize("likelihood", ["softmax", pytest.param("poisson", marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_differences(likelihood, x64):
    """Of a likelihood whose Λ moves with the parameters, for float32 parameters too."""

    def fn(w, x):
        y = jax.nn.relu(x @ w[0]) @ w[1]
        return jnp.concatenate([y, jnp.zeros_like(y)], 1) if likelihood == "softmax" else y

    w = [jax.random.normal(k, s, jnp.float64) for k, s in ((KEY, (2, 3)), (KEY, (3, 1)))]
    x = X.astype(jnp.float64)
    log_density = jeffreys_log_prior(fn, rescaling_group(fn, w, x), x, likelihood)
    gradient = jax.jit(jax.grad(log_density))(w)
    direction = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape), w)
    at = jax.jit(lambda t: log_density(jax.tree.map(lambda a, b: a + t * b, w, direction)))
    wanted = (at(1e-5) - at(-1e-5)) / 2e-5
    slope = sum(jnp.vdot(a, b) for a, b in zip(gradient, direction, strict=True))
    np.testing.assert_allclose(slope, wanted, rtol=1e-4)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), w)
    for a, b in zip(jax.jit(jax.grad(log_density))(single), gradient, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_dead_units_have_density_zero_and_no_nan(net):
    w, group = net
    dead = jax.tree.map(jnp.asarray, w)
    dead["Dense_0"]["bias"] = dead["Dense_0"]["bias"].at[0].set(-100.0)
    gone = jax.tree.map(jnp.zeros_like, w)
    both = jax.tree.map(lambda *a: np.stack(a), w, dead, gone)
    values, gradients = jax.jit(
        jax.vmap(jax.value_and_grad(jeffreys_log_prior(mlp, group, X, "gaussian")))
    )(both)
    assert np.isfinite(values[0]) and (values[1:] == -np.inf).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_what_makes_no_sense_is_refused(net):
    w, group = net
    with pytest.raises(InvalidInput, match="Pass more inputs"):
        jeffreys_log_prior(mlp, group, X[:5], "gaussian")(w)
    with pytest.raises(InvalidInput, match="convention must be one of"):
        jeffreys_log_prior(mlp, group, X, "gaussian", convention="slices")
    with pytest.raises(InvalidInput, match="orbit_scale"):
        jeffreys_log_prior(mlp, group, X, "gaussian", orbit_scale=0.0)
    with pytest.raises(InvalidInput, match="not an orbit coordinate"):
        jeffreys_log_prior(
            product, PRODUCT_GROUP, ONE, "gaussian", coordinate=lambda w: w[0].ravel()
        )(PAIR)
    with pytest.raises(InvalidInput, match="scale must be positive"):
        gaussian_log_prior(0.0)


# --- likelihoods ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "y", "law"),
    [
        ("gaussian", [[0.3], [2.0]], lambda y, f: scipy.stats.norm.logpdf(y, f, 0.5)),
        (
            "bernoulli",
            [[1], [0]],
            lambda y, f: scipy.stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-f))),
        ),
        (
            "poisson",
            [[3], [0]],
            lambda y, f: (
                scipy.stats.poisson.logpmf(y, np.exp(f)) + scipy.special.gammaln(np.add(y, 1))
            ),
        ),
    ],
)
def test_likelihoods_are_those_of_scipy(likelihood, y, law):
    w, x = jnp.array([[0.7]]), jnp.array([[1.0], [-2.0]])
    posterior = log_posterior(
        lambda w, x: x @ w, x, jnp.array(y), likelihood, gaussian_log_prior(2.0), noise_scale=0.5
    )
    wanted = law(np.array(y), np.array(x) * 0.7).sum() + scipy.stats.norm.logpdf(0.7, scale=2.0)
    np.testing.assert_allclose(posterior(w), wanted, rtol=1e-5)


def test_softmax_likelihood_and_predictive():
    w, x = jnp.array([[0.5, -0.5]]), jnp.array([[1.0], [2.0]])
    found = log_likelihood(lambda w, x: x @ w, x, jnp.array([0, 1]), "softmax")(w)
    np.testing.assert_allclose(found, -np.log1p(np.exp(-1)) - np.log1p(np.exp(2)), rtol=1e-5)
    draws = jnp.stack([w, 2 * w, 3 * w])[None]
    predictive = posterior_predictive(lambda w, x: x @ w, draws, x, "softmax", batch_size=2)
    assert predictive.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(predictive[0, :, 0, 0], 1 / (1 + np.exp([-1, -2, -3])), rtol=1e-5)
