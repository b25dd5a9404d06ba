"""The Fisher information is an expectation over labels; what its natural gradients leave alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv import InvalidInput, jacobian, rescaling_group, tangent_vectors, weight_normalize
from jaxinv.invariance import by_rescaling, equivariance_error
from jaxinv.jacobians import fisher, fisher_product, natural_gradient_direction
from jaxinv.networks import init_mlp, mlp

slow = pytest.mark.slow
LIKELIHOODS = ["softmax", "gaussian", "bernoulli", "poisson"]


def vector(tree):
    return np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in jax.tree.leaves(tree)])


def as_double(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)


def apart(a, b):
    a, b = vector(a), vector(b)
    return np.linalg.norm(a - b) / max(np.linalg.norm(a), np.linalg.norm(b))


def cross_entropy(fn, x, y):
    def loss(w):
        return optax.softmax_cross_entropy_with_integer_labels(fn(w, x), y).mean()

    return loss


# --- F is the expectation of the score's outer product, labels drawn from the model --------


def small(dtype=jnp.float64):
    """A network with a pytree of outputs, one with an axis more: (4, 3) and (4, 2, 3)."""
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 3), "b": (3, 3), "c": (3, 6)}
    w = {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in shapes.items()}

    def fn(w, x):
        h = jnp.tanh(x @ w["a"])
        return {"one": h @ w["b"], "two": (h @ w["c"]).reshape(-1, 2, 3)}

    return fn, w, jnp.asarray(rng.normal(size=(4, 2)), dtype)


def scores_and_weights(likelihood, y):
    """For one independent part of the output: ∂ log p(t|y)/∂y of outcomes t, and p(t|y)."""
    y = np.asarray(y, np.float64)
    if likelihood == "softmax":
        p = np.exp(y - y.max()) / np.exp(y - y.max()).sum()
        return np.eye(len(y)) - p, p
    if likelihood == "bernoulli":
        p = 1 / (1 + np.exp(-y[0]))
        return np.array([[-p], [1 - p]]), np.array([1 - p, p])
    if likelihood == "poisson":
        t = np.arange(400)
        log_p = t * y[0] - np.exp(y[0]) - np.array([math.lgamma(k + 1) for k in t])
        return (t - np.exp(y[0]))[:, None], np.exp(log_p)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)  # exact for degree 9
    return nodes[:, None], weights / weights.sum()


@functools.cache
def outputs_and_jacobians(dtype):
    fn, w, x = small(dtype)
    flat, back = jax.flatten_util.ravel_pytree(w)

    @jax.jit
    def values(flat):
        f = lambda flat: jax.tree.leaves(fn(back(flat), x))  # noqa: E731
        return f(flat), jax.jacfwd(f)(flat)

    return jax.tree.map(np.asarray, values(flat)), flat.size, len(x)


def brute_force(likelihood, dtype):
    """E over labels for the small network, example by example, output part by output part."""
    (outputs, J), size, examples = outputs_and_jacobians(dtype)
    parts = 3 if likelihood == "softmax" else 1
    F = np.zeros((size, size))
    for y, jac in zip(outputs, J, strict=True):
        y, jac = np.reshape(y, (-1, parts)), np.reshape(jac, (-1, parts, size))
        for logits, rows in zip(y, jac, strict=True):
            scores, p = scores_and_weights(likelihood, logits)
            assert p.sum() == pytest.approx(1, abs=1e-12)
            s = scores @ rows
            F += s.T @ (p[:, None] * s)
    return F / examples


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_fisher_is_the_expected_outer_product_of_scores(likelihood, x64):
    fn, w, x = small()
    want = brute_force(likelihood, jnp.float64)
    got = jax.jit(lambda w: fisher(fn, w, x, likelihood))(w)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    v = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), w)
    product = jax.jit(lambda v: fisher_product(fn, w, x, v, likelihood))(v)
    np.testing.assert_allclose(vector(product), want @ vector(v), rtol=1e-10, atol=1e-12)


@slow
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_single_precision_gives_the_same_to_its_rounding(likelihood):
    fn, w, x = small(jnp.float32)
    want = brute_force(likelihood, jnp.float32)
    ones = jax.tree.map(jnp.ones_like, w)

    @jax.jit
    def both(w):
        return fisher(fn, w, x, likelihood, chunk=3), fisher_product(fn, w, x, ones, likelihood)

    got, product = both(w)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-5 * abs(want).max())
    np.testing.assert_allclose(vector(product), want.sum(1), atol=1e-4 * abs(want).max())


def test_score_of_an_independent_log_likelihood_agrees(x64):
    """The brute force itself, against jax.grad of log-likelihoods from jax.scipy.stats."""
    y = jnp.array([0.3, -1.2, 0.7])
    scores, _ = scores_and_weights("softmax", y)
    np.testing.assert_allclose(scores, jax.jacfwd(jax.nn.log_softmax)(y), rtol=1e-12)
    stats = jax.scipy.stats
    for name, log_p in {
        "bernoulli": lambda y, t: stats.bernoulli.logpmf(t, jax.nn.sigmoid(y)),
        "poisson": lambda y, t: stats.poisson.logpmf(t, jnp.exp(y)),
    }.items():
        scores, p = scores_and_weights(name, y[:1])
        logs, want = jax.jit(jax.vmap(jax.value_and_grad(log_p), (None, 0)))(y[0], jnp.arange(2.0))
        np.testing.assert_allclose(scores[:2, 0], want, rtol=1e-9)
        np.testing.assert_allclose(p[:2], np.exp(logs), rtol=1e-9)


def test_products_go_through_loops_and_custom_derivatives():
    @jax.custom_vjp
    def sin(x):
        return jnp.sin(x)

    sin.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))

    def recurrent(w, x):
        def cell(h, x):
            return sin(x @ w["a"] + h @ w["b"]), None

        h, _ = jax.lax.scan(cell, jnp.zeros((len(x), 3)), jnp.swapaxes(x, 0, 1))
        return h @ w["c"]

    _, w, _ = small(jnp.float32)
    x = jax.random.normal(jax.random.key(0), (5, 4, 2))
    ones = jax.tree.map(jnp.ones_like, w)

    @jax.jit
    def both(w):
        return (
            fisher(recurrent, w, x, "softmax"),
            fisher_product(recurrent, w, x, ones, "softmax"),
        )

    F, product = both(w)
    np.testing.assert_allclose(vector(product), F.sum(1), atol=1e-5 * float(abs(F).max()))


# --- the direction ----------------------------------------------------------------------


# Fewer, and more, rows (9 a piece) than the 33 parameters.
@pytest.mark.parametrize(
    "examples, damping, rtol",
    [
        (2, 0.0, None),
        (40, 1e-3, None),
        pytest.param(40, 0.0, None, marks=slow),
        pytest.param(40, 0.0, 0.1, marks=slow),
    ],
)
def test_exact_is_the_pseudo_inverse_of_numpy(examples, damping, rtol, x64):
    fn, w, _ = small()
    x = jax.random.normal(jax.random.key(1), (examples, 2), jnp.float64)
    rng = np.random.default_rng(1)
    g = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), w)  # not in the range
    F = np.asarray(jax.jit(lambda w: fisher(fn, w, x, "softmax"))(w))
    values, U = np.linalg.eigh(F)
    values = values[::-1]
    U = U[:, ::-1]
    kept = values > (rtol**2 if rtol else 1e-13) * values[0]
    inverse = np.where(kept, 1, 0) / np.where(kept, values, 1)
    want = U @ (inverse * (U.T @ vector(g)))
    if damping:
        want = np.linalg.solve(F + damping * np.eye(len(F)), vector(g))
    got = jax.jit(
        lambda w: natural_gradient_direction(
            fn, w, x, g, "softmax", damping=damping, rtol=rtol, solver="exact", chunk=7
        )
    )(w)
    scale = abs(want).max()
    np.testing.assert_allclose(vector(got.v), want, atol=1e-6 * scale)
    assert damping or int(got.rank) == kept.sum()
    left = F @ want + damping * want - vector(g)
    assert float(got.residual) == pytest.approx(
        np.linalg.norm(left) / np.linalg.norm(vector(g)), rel=1e-5, abs=1e-8
    )


SIZES = (64, 32, 32, 10)


@functools.cache
def large():
    """3466 parameters, 32 examples with 10 classes, and the gradient of the cross-entropy."""
    w = init_mlp(jax.random.key(0), SIZES, bias_std=0.1)
    x = jax.random.normal(jax.random.key(1), (32, 64))
    g = jax.jit(jax.grad(cross_entropy(mlp, x, jnp.arange(32) % 10)))(w)
    assert vector(w).size == 3466
    return w, x, g


@pytest.mark.parametrize(
    "damping, dtype, iterations, bound",
    [
        (1e-2, np.float64, 300, 1e-5),
        pytest.param(1e-2, np.float32, 300, 1e-5, marks=slow),
        pytest.param(1.0, np.float64, 50, 1e-5, marks=slow),
        pytest.param(1e-4, np.float64, 2000, 1e-5, marks=slow),
        pytest.param(1.0, np.float32, 50, 1e-5, marks=slow),
        # Rounding times the condition of F + λ; measured 5e-5.
        pytest.param(1e-4, np.float32, 2000, 2e-4, marks=slow),
    ],
)
def test_exact_and_cr_agree_on_3466_parameters(damping, dtype, iterations, bound):
    w, x, g = large()
    exact = _direction(damping, "exact", None, 1, 1e-6)(w, x, g)
    tol = 1e-6 if dtype == np.float32 else 1e-10
    cr = _direction(damping, "cr", dtype, iterations, tol)(w, x, g)
    assert apart(exact.v, cr.v) < bound
    assert int(exact.rank) == 32 * 9  # softmax logits have one direction of no effect
    assert 0 < int(cr.iterations) < iterations
    assert float(exact.residual) < 1e-9 and float(cr.residual) < 100 * tol


@functools.cache
def _direction(damping, solver, dtype, iterations, tol):
    return jax.jit(
        lambda w, x, g: natural_gradient_direction(
            mlp, w, x, g, "softmax", damping=damping, solver=solver, dtype=dtype,
            max_iterations=iterations, rtol=tol,
        )
    )  # fmt: skip


@pytest.mark.parametrize("null_part", [0.0, 1.0])
def test_cr_without_damping_finds_the_least_norm_solution_of_any_gradient(null_part, x64):
    """Plain conjugate gradients diverge when part of the gradient is out of the range of F."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 12)))
    w = jnp.zeros((12, 1))
    F = np.asarray(x.T @ x) / 6
    g = F @ rng.normal(size=(12, 1))
    U = np.linalg.svd(np.asarray(x))[2][6:]
    g = g + null_part * U.T @ rng.normal(size=(6, 1))
    found = natural_gradient_direction(
        lambda w, x: x @ w, w, x, jnp.asarray(g), "gaussian", solver="cr", rtol=1e-10
    )
    want = np.linalg.pinv(F, rcond=1e-10) @ g
    np.testing.assert_allclose(found.v, want, rtol=1e-7, atol=1e-8)
    assert float(found.residual) == pytest.approx(np.linalg.norm(F @ want - g) / np.linalg.norm(g))
    assert int(found.iterations) <= 12
    if null_part:
        v, _ = jax.scipy.sparse.linalg.cg(lambda v: jnp.asarray(F) @ v, jnp.asarray(g), maxiter=100)
        assert not np.linalg.norm(v - want) < np.linalg.norm(want)  # it diverges, or is NaN


@pytest.mark.parametrize("width, kept", [(900, 42), (9000, 5), (80000, 0)])
def test_cr_takes_the_memory_of_ten_and_of_the_directions_that_it_keeps(width, kept):
    """Of 1, 12 and 104 million parameters; nothing is run."""
    w = jax.eval_shape(lambda key: init_mlp(key, (784, width, 512, 10)), jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(w))
    x = jnp.zeros((4, 784))

    def direction(w, g):
        return natural_gradient_direction(mlp, w, x, g, "softmax", damping=1e-3)

    memory = jax.jit(direction).lower(w, w).compile().memory_analysis()
    held = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert held <= 4 * size * (10.5 + kept) and 4 * size * kept < 1.5 * 2**28


@pytest.mark.parametrize(
    "iterations, dtype",
    [
        (10, np.float32),
        (30, np.float64),
        pytest.param(30, np.float32, marks=slow),
        pytest.param(10, np.float64, marks=slow),
    ],
)
def test_cr_does_not_amplify_rounding_errors(iterations, dtype):
    """The recurrence alone multiplied a perturbation of 1e-7 by up to 5e5, not monotonically."""
    sizes, damping = (64, 32, 32, 10), 0.1
    w = init_mlp(jax.random.key(0), sizes, bias_std=0.1)
    x = 5 * jax.random.uniform(jax.random.key(1), (100, 64))
    labels = jax.random.randint(jax.random.key(2), (100,), 0, 10)

    def loss(w, net=mlp):
        return optax.softmax_cross_entropy_with_integer_labels(net(w, x), labels).mean()

    def direction(g, net=mlp):
        return natural_gradient_direction(
            net, w, x, g, "softmax", damping=damping, solver="cr", dtype=dtype,
            max_iterations=iterations,
        )  # fmt: skip

    solve = jax.jit(direction)
    g = jax.grad(loss)(w)
    start = solve(g)
    assert start.iterations == iterations  # it has not converged: the steps are what they are
    keys = optax.tree.split_key_like(jax.random.key(3), g)
    noise = jax.tree.map(lambda a, k: a * jax.random.normal(k, a.shape), g, keys)
    for size in (1e-7, 1e-6, 1e-5):
        moved = optax.tree.add_scale(g, size, noise)
        assert apart(solve(moved).v, start.v) < 50 * size
    again = jax.jit(lambda g: direction(g, jax.checkpoint(mlp)))(g)
    assert apart(again.v, start.v) < 5e-6


@slow
def test_half_precision_parameters_are_solved_in_single():
    fn, w, x = small(jnp.float32)

    @jax.jit
    def direction(w, x):
        ones = jax.tree.map(jnp.ones_like, w)
        return natural_gradient_direction(fn, w, x, ones, "softmax", damping=0.1, solver="cr")

    half, x_half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (w, x))
    same, x_same = jax.tree.map(lambda a: a.astype(jnp.float32), (half, x_half))
    got, want = direction(half, x_half), direction(same, x_same)
    assert {a.dtype for a in jax.tree.leaves(got.v)} == {jnp.dtype(jnp.bfloat16)}
    assert apart(got.v, want.v) < 2**-8
    assert float(got.residual) < 1e-5


def test_damping_reaches_double_precision_unrounded():
    """With 64-bit types off, λ = 0.1 is that of float64: float32 is off by 1.5e-9, times 1/λ."""
    x, w = np.zeros((1, 2), np.float32), np.zeros((2, 1), np.float32)
    g = np.full((2, 1), 3.0, np.float32)

    @jax.jit
    def direction(g):
        return natural_gradient_direction(lambda w, x: x @ w, w, x, g, "gaussian", damping=0.1)

    found = direction(g)
    np.testing.assert_allclose(found.v, 30, rtol=1e-7)
    assert found.residual.dtype == jnp.float32
    with jax.enable_x64(True):
        # The gradient in float64, the parameters not: v is rounded, what it solves is not.
        x, w, g = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, w, g))
        np.testing.assert_allclose(direction(g).v, 3 / 0.1, rtol=1e-15)


@slow
@pytest.mark.parametrize("solver", ["exact", "cr"])
def test_vmap_over_an_ensemble_equals_the_loop(solver):
    fn, w, x = small(jnp.float32)
    g = jax.tree.map(jnp.ones_like, w)
    ensemble = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a, -a]), w)

    def direction(w, damping):
        return natural_gradient_direction(fn, w, x, g, "softmax", damping=damping, solver=solver)

    damping, jitted = jnp.array([0.1, 0.2, 0.3]), jax.jit(direction)
    together = jax.jit(jax.vmap(direction))(ensemble, damping)
    for i in range(3):
        alone = jitted(jax.tree.map(lambda a, i=i: a[i], ensemble), damping[i])
        assert apart(jax.tree.map(lambda a, i=i: a[i], together.v), alone.v) < 1e-5
        assert together.rank[i] == alone.rank


@pytest.mark.parametrize("solver", [pytest.param("exact", marks=slow), "cr"])
def test_derivatives_are_those_of_the_damped_inverse(solver, x64):
    fn, w, x = small()
    flat, back = jax.flatten_util.ravel_pytree(w)
    g = jnp.cos(jnp.arange(flat.size, dtype=flat.dtype))

    def direct(flat, damping):
        F = fisher(fn, back(flat), x, "softmax")
        return jnp.linalg.solve(F + damping * jnp.eye(flat.size), g) @ g

    def ours(flat, damping):
        found = natural_gradient_direction(
            fn, back(flat), x, back(g), "softmax", damping=damping, solver=solver, rtol=1e-12
        )
        return jax.flatten_util.ravel_pytree(found.v)[0] @ g

    at = (flat, jnp.asarray(0.1))
    for got, want in zip(
        jax.jit(jax.grad(ours, (0, 1)))(*at), jax.jit(jax.grad(direct, (0, 1)))(*at), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-7 * float(abs(want).max()))


# --- invariance -----------------------------------------------------------------------------

# A step by a natural gradient, in whatever network it is given.


def natural(fn, x, damping=0.0, momentum=None, likelihood="softmax", rate=1.0, rtol=None):
    def update(g, state, params):
        found = natural_gradient_direction(
            fn, params, x, g, likelihood, damping=damping, rtol=rtol, solver="exact"
        )
        return found.v, state

    core = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    trace = optax.identity() if momentum is None else optax.trace(momentum)
    return optax.chain(core, trace, optax.scale(-rate))


def regular():
    """5 parameters, 40 examples, logits against a fixed third: F is not singular."""
    rng = np.random.default_rng(3)
    w = {"a": jnp.asarray(rng.normal(size=(2, 2))), "b": jnp.asarray(rng.normal(size=2))}
    x = jnp.asarray(rng.normal(size=(40, 2)))

    def fn(w, x):
        logits = x @ w["a"] + w["b"]
        return jnp.concatenate([logits, jnp.zeros((len(x), 1))], 1)

    return fn, w, x, jnp.asarray(rng.integers(0, 3, 40))


def singular():
    """A ReLU network: 23 parameters, of which 4 rescalings and the softmax do nothing."""
    w = as_double(init_mlp(jax.random.key(4), (2, 4, 3), bias_std=0.3))
    x = jax.random.normal(jax.random.key(5), (40, 2), jnp.float64)
    return mlp, w, x, jnp.arange(40) % 3


def linear_map(theta, seed=0):
    flat, back = jax.flatten_util.ravel_pytree(theta)
    A = np.random.default_rng(seed).normal(size=(flat.size, flat.size)) / np.sqrt(flat.size)
    return back(jnp.asarray(A + np.eye(flat.size)) @ flat)


def triangular_flow(theta):
    """w_i = θ_i·exp(½ tanh θ_{i−1}) + sin(θ_{i−1}): triangular, so invertible."""
    flat, back = jax.flatten_util.ravel_pytree(theta)
    before = jnp.concatenate([jnp.zeros(1), flat[:-1]])
    return back(flat * jnp.exp(0.5 * jnp.tanh(before)) + jnp.sin(before))


MAPS = {
    "linear": linear_map,
    "sinh": lambda theta: jax.tree.map(jnp.sinh, theta),
    "triangular flow": triangular_flow,
}


def both_steps(problem, reparam):
    """(Δw, (∂w/∂θ)Δθ) of the natural gradient and of SGD, and J at w(θ)."""
    fn, theta, x, y = problem

    def step(make, f, params):
        tx = make(f, x)
        g = jax.grad(cross_entropy(f, x, y))(params)
        return tx.update(g, tx.init(params), params)[0]

    @jax.jit
    def run(theta):
        w = reparam(theta)
        pairs = []
        for make in (natural, lambda f, x: optax.sgd(1.0)):
            dtheta = step(make, lambda t, x: fn(reparam(t), x), theta)
            _, moved = jax.jvp(reparam, (theta,), (dtheta,))
            pairs.append((step(make, fn, w), moved))
        return pairs, jacobian(lambda w, x: jax.nn.softmax(fn(w, x)), w, x)

    pairs, J = run(theta)
    return [(vector(dw), vector(moved)) for dw, moved in pairs], np.asarray(J)


@pytest.mark.parametrize(
    "name",
    ["triangular flow", pytest.param("sinh", marks=slow), pytest.param("linear", marks=slow)],
)
def test_a_regular_fisher_makes_steps_equivariant_and_sgd_is_not(name, x64):
    fn, theta, x, y = regular()
    reparam = MAPS[name]
    loss = cross_entropy(fn, x, y)
    error = equivariance_error(lambda f: natural(f, x), loss, theta, reparam, 1, fn=fn, x=x)
    assert float(error.first_step) < 1e-6
    assert float(equivariance_error(optax.sgd(1.0), loss, theta, reparam, 1).first_step) > 0.1


def rescaling_and_weight_norm(fn, w, x):
    group = rescaling_group(fn, w, x)
    u = jnp.asarray(np.random.default_rng(0).normal(size=group.dim))
    return by_rescaling(group, u), weight_normalize(fn, group).to_params


@pytest.mark.parametrize(
    "name",
    [
        "rescaling",
        "weight norm",
        pytest.param("linear", marks=slow),
        pytest.param("triangular flow", marks=slow),
        pytest.param("sinh", marks=slow),
    ],
)
def test_a_singular_fisher_makes_the_function_move_alike_but_not_the_weights(name, x64):
    fn, w, x, y = singular()
    if name in MAPS:
        reparam = MAPS[name]
    else:
        reparam = rescaling_and_weight_norm(fn, w, x)[name == "weight norm"]
    ((step, moved), sgd), J = both_steps((fn, w, x, y), reparam)
    assert np.linalg.norm(J @ (step - moved)) < 1e-6 * np.linalg.norm(J @ step)
    # What differs lies in the null space of F, and it does differ: the pseudo-inverse takes the
    # least norm, which is another solution in other coordinates.
    assert np.linalg.norm(step - moved) > 1e-2 * np.linalg.norm(step)
    step, moved = sgd
    assert np.linalg.norm(J @ (step - moved)) > 0.1 * np.linalg.norm(J @ step)


def test_rescalings_get_no_update(x64):
    fn, w, x, y = singular()
    g = jax.jit(jax.grad(cross_entropy(fn, x, y)))(w)
    # A gradient with a part along the null space too, as weight decay adds one.
    g = jax.tree.map(lambda a, w: a + 0.1 * w, g, w)
    group = rescaling_group(fn, w, x)
    T = np.asarray(jax.jit(lambda w: tangent_vectors(group, w, dense=True))(w))
    T = T / np.linalg.norm(T, axis=0)
    assert T.shape[1] == 4 and abs(T.T @ vector(g)).max() > 1e-2

    @jax.jit
    def direction(g, damping):
        return natural_gradient_direction(fn, w, x, g, "softmax", damping=damping, solver="exact")

    for damping, bound in ((0.0, 1e-9), (1.0, math.inf)):
        found = direction(g, damping)
        along = abs(T.T @ vector(found.v)).max() / np.linalg.norm(vector(found.v))
        assert along < bound
        if damping:
            assert along > 1e-2


def test_the_more_damping_the_less_equivariant(x64):
    fn, theta, x, y = regular()

    @jax.jit
    def error(damping):
        return equivariance_error(
            lambda f: natural(f, x, damping), cross_entropy(fn, x, y), theta, linear_map, 1,
            fn=fn, x=x,
        ).first_step  # fmt: skip

    errors = [float(error(damping)) for damping in (0.0, 1e-4, 1e-2, 1.0)]
    assert errors[0] < 1e-10 and errors == sorted(errors)
    assert errors[1] > 1e-6 and errors[3] > 0.1
    assert 30 < errors[2] / errors[1] < 300  # first order in λ while λ is small


@functools.cache
def finite(momentum=None, steps=1, reparam=triangular_flow):
    """Distances of weights and of functions after some steps, as a function of the rate."""
    fn, theta, x, y = regular()

    @jax.jit
    def errors(rate):
        error = equivariance_error(
            lambda f: natural(f, x, momentum=momentum, rate=rate),
            cross_entropy(fn, x, y), theta, reparam, steps, fn=fn, x=x,
        )  # fmt: skip
        return jnp.stack([error.weights[-1], error.function[-1]])

    return errors


def test_a_finite_step_is_equivariant_to_first_order_in_its_size(x64):
    rates = (0.1, 0.01, 0.001)
    weights, functions = zip(*(finite()(rate).tolist() for rate in rates), strict=True)
    for errors in (weights, functions):
        for coarse, fine in zip(errors, errors[1:], strict=False):
            assert coarse / fine == pytest.approx(10, rel=0.35)
    assert weights[0] > 1e-3
    assert finite(reparam=linear_map)(0.1)[0] < 1e-9  # no curvature, no error


def test_momentum_is_equivariant_under_linear_maps_only(x64):
    assert finite(momentum=0.9, steps=5, reparam=linear_map)(0.05)[0] < 1e-8
    coarse, fine = (float(finite(momentum=0.9, steps=5)(rate)[0]) for rate in (1e-3, 1e-4))
    assert coarse > 1e-2
    assert coarse / fine == pytest.approx(10, rel=0.35)


# --- clear errors ---------------------------------------------------------------------------

W, X = {"k": jnp.ones((2, 3))}, jnp.ones((4, 2))


def net(w, x):
    return x @ w["k"]


@pytest.mark.parametrize(
    "options, text",
    [
        ({"likelihood": "cauchy"}, "likelihood must be one of.*'cauchy'"),
        ({"solver": "lu"}, "solver must be one of.*'lu'"),
        ({"damping": -1.0}, "damping must be finite and >= 0, not -1.0"),
        ({"damping": float("nan")}, "damping must be finite and >= 0, not nan"),
        ({"damping": jnp.ones(2)}, r"damping must be a scalar, not of shape \(2,\)"),
        ({"rtol": -1.0}, "rtol must be >= 0"),
        ({"max_iterations": 0}, "max_iterations must be a fixed integer >= 1"),
        ({"dtype": np.float16}, "dtype must be float32 or float64, not float16"),
        ({"params": {"k": jnp.ones((2, 3), jnp.int32)}}, "params/k has dtype int32"),
        ({"params": {"k": jnp.full((2, 3), jnp.nan)}}, "params/k has 6 non-finite"),
        ({"x": jnp.ones((0, 2))}, "Pass at least one example"),
        ({"gradient": {"other": jnp.ones((2, 3))}}, "gradient must be a pytree like params"),
        ({"gradient": {"k": jnp.ones((3, 2))}}, r"gradient/k has shape \(3, 2\)"),
        ({"gradient": {"k": jnp.ones((2, 3), jnp.int32)}}, "gradient/k has dtype int32"),
        ({"fn": lambda w, x: (x @ w["k"])[:, 0]}, "softmax is over the last axis"),
        ({"fn": lambda w, x: (x @ w["k"])[:, :1]}, "One logit is 'bernoulli'"),
    ],
)
@pytest.mark.parametrize("solver", ["exact", "cr"])
def test_bad_arguments_are_named(options, text, solver):
    given = {"fn": net, "params": W, "x": X, "gradient": W, "likelihood": "softmax"} | options
    given = {"solver": solver} | given
    with pytest.raises(InvalidInput, match=text):
        natural_gradient_direction(**given)


def test_products_and_matrices_check_their_arguments_too():
    with pytest.raises(InvalidInput, match="likelihood must be one of"):
        fisher(net, W, X, "cauchy")
    with pytest.raises(InvalidInput, match="likelihood must be one of"):
        fisher_product(net, W, X, W, "cauchy")
    with pytest.raises(InvalidInput, match=r"v/k has shape \(2,\)"):
        fisher_product(net, W, X, {"k": jnp.ones(2)}, "softmax")
    with pytest.raises(InvalidInput, match="params/k has dtype int32"):
        fisher(net, {"k": jnp.ones((2, 3), jnp.int32)}, X, "softmax")


@functools.cache
def _of_net(solver):
    return jax.jit(
        lambda x, g, damping: natural_gradient_direction(
            net, W, x, g, "softmax", damping=damping, solver=solver
        )
    )


@pytest.mark.parametrize("solver", ["exact", "cr"])
def test_a_traced_negative_damping_shows_as_nan(solver):
    assert np.isnan(vector(_of_net(solver)(X, W, -0.5).v)).all()


@pytest.mark.parametrize("solver", ["exact", "cr"])
def test_a_zero_gradient_and_a_dead_network_give_zero(solver):
    zero = jax.tree.map(jnp.zeros_like, W)
    found = _of_net(solver)(X, zero, 0.0)
    assert not vector(found.v).any() and float(found.residual) == 0
    found = _of_net(solver)(0 * X, W, 0.0)
    assert not vector(found.v).any() and float(found.residual) == 1
