"""The Fisher information of a network's predictions, and natural gradients.

A likelihood reads the outputs y = fn(params, x) as its natural parameters:

| likelihood | y | Λ(y), the Fisher information in y |
|---|---|---|
| "softmax" | logits, last axis | diag(π) − ππᵀ, π = softmax(y) |
| "gaussian" | mean, variance 1 | I |
| "bernoulli" | logits | diag(σ(1 − σ)), σ = sigmoid(y) |
| "poisson" | log rates | diag(eʸ) |

F = (1/n) Σ_x JᵀΛJ with J = ∂y/∂params. For these likelihoods it is also the generalised
Gauss-Newton matrix of the mean negative log-likelihood. With Λ = RᵀR it is (1/n) ZᵀZ for Z = RJ:
the Jacobian of R y with R held fixed, which is how everything here is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxinv._checks import (
    check_inputs,
    check_like,
    check_natural_options,
    check_network,
    check_params,
    one_of,
)
from jaxinv._interpreter.draws import traced_in
from jaxinv._numerics import scaled as _scaled
from jaxinv._numerics import tolerances as policy
from jaxinv._numerics.lapack import thin_svd, triangle
from jaxinv._numerics.likelihoods import root_product
from jaxinv._numerics.precision import call_in
from jaxinv._numerics.vectors import flatten, unflatten
from jaxinv.errors import InvalidInput
from jaxinv.jacobians.jacobians import fold_rows, jacobian, jacobian_gram
from jaxinv.jacobians.problem import problem_of
from jaxinv.typing import Array, DTypeLike, Inputs, Likelihood, Network, Params, PyTree, Solver

# Up to this many parameters "auto" takes an SVD; beyond, a product at a time.
_DENSE_PARAMETERS = 2000
_RESIDUAL = 1e-6  # relative residual at which "cr" stops by default
# Directions to which "cr" keeps the others orthogonal, and the most memory that they may take.
_KEPT_DIRECTIONS, _KEPT_BYTES = 20, 1 << 28
_EXACT = lax.Precision.HIGHEST


def whitened(fn: Network, likelihood: Likelihood) -> Network:
    """The function R(y)·y, R held fixed, of which the Jacobian Z has F = ZᵀZ/n.

    Everything for Jacobians (rank, Gram matrix, kernel, operator) thereby holds for the Fisher.

    Args:
        fn: network `fn(params, x) -> y`; y may be a pytree.
        likelihood: see the module.

    Returns:
        A network with outputs like fn's. Their values mean nothing; their derivatives do.

    Raises:
        InvalidInput: for an unknown likelihood; when called, for "softmax" of outputs without an
            axis of two or more classes behind the batch axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import jacobian
        >>> from jaxinv.jacobians import whitened
        >>> net = whitened(lambda w, x: x @ w, "bernoulli")
        >>> print(jacobian(net, jnp.zeros((1, 1)), jnp.ones((1, 1))))  # √(½·½)
        [[0.5]]
    """
    check_network(fn)
    one_of("likelihood", likelihood, get_args(Likelihood))

    def one(y: Array) -> Array:
        if likelihood == "softmax" and (jnp.ndim(y) < 2 or y.shape[-1] < 2):
            raise InvalidInput(
                f"softmax is over the last axis, but an output has shape {jnp.shape(y)}: it needs "
                "a batch axis and an axis of at least two classes. One logit is 'bernoulli'."
            )
        return root_product(lax.stop_gradient(y), y, likelihood)

    return lambda params, x: jax.tree.map(one, fn(params, x))


def fisher(
    fn: Network, params: Params, x: Inputs, likelihood: Likelihood, *, chunk: int = 64
) -> Array:
    """Fisher information F = (1/n) Σ_x JᵀΛJ as a matrix.

    Args:
        fn, params, x: as for `jaxinv.jacobian`; n examples.
        likelihood: "softmax", "gaussian", "bernoulli" or "poisson".
        chunk: examples at a time.

    Returns:
        (d, d), columns as `jax.flatten_util.ravel_pytree(params)`.

    Raises:
        InvalidInput: as for `jaxinv.jacobian`, or an unknown likelihood.

    References:
        Amari, "Natural gradient works efficiently in learning", Neural Computation 10, 1998;
        Martens, "New insights and perspectives on the natural gradient method", JMLR 21, 2020
        (arXiv:1412.1193): equality with the generalised Gauss-Newton matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.jacobians import fisher
        >>> x = jnp.array([[1.0], [3.0]])
        >>> print(fisher(lambda w, x: x @ w, jnp.zeros((1, 1)), x, "bernoulli"))  # (1 + 9)/2 · 1/4
        [[1.25]]
    """
    gram = jacobian_gram(whitened(fn, likelihood), params, x, chunk=chunk)
    return gram / jax.tree.leaves(x)[0].shape[0]


def fisher_product(
    fn: Network, params: Params, x: Inputs, v: PyTree, likelihood: Likelihood
) -> PyTree:
    """F v without F: one pass forwards and one backwards over the batch.

    Args:
        fn, params, x, likelihood: as for `fisher`.
        v: pytree like params.

    Returns:
        A pytree like params.

    Raises:
        InvalidInput: as for `fisher`; for v unlike params.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.jacobians import fisher_product
        >>> x = jnp.array([[1.0], [3.0]])
        >>> print(fisher_product(lambda w, x: x @ w, jnp.zeros((1, 1)), x, jnp.full((1, 1), 2.0),
        ...                      "gaussian"))
        [[10.]]
    """
    check_params(params)
    check_like(v, params, "v")
    v = jax.tree.map(lambda a, w: jnp.asarray(a, dtype=w.dtype), v, params)
    return _operator(fn, params, x, likelihood)(v)


def _operator(
    fn: Network, params: Params, x: Inputs, likelihood: Likelihood
) -> Callable[[PyTree], PyTree]:
    examples = problem_of(fn, params, x).examples
    z, pull = jax.vjp(lambda w: whitened(fn, likelihood)(w, x), params)
    # The transpose of reverse mode, not forward mode: a custom_vjp has none.
    push = jax.linear_transpose(lambda c: pull(c)[0], z)

    def product(v: PyTree) -> PyTree:
        (out,) = pull(push(v)[0])
        return jax.tree.map(lambda a: a / examples, out)

    return product


class NaturalGradient(NamedTuple):
    """A natural gradient and what is known of it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.jacobians import natural_gradient_direction
        >>> w, x = jnp.zeros((2, 1)), jnp.array([[1.0, 0.0]])
        >>> found = natural_gradient_direction(
        ...     lambda w, x: x @ w, w, x, jnp.array([[3.0], [0.0]]), "gaussian")
        >>> found.v.ravel().tolist(), int(found.rank)
        ([3.0, 0.0], 1)
    """

    v: PyTree  # like params: (F + damping)⁺ gradient
    rank: Array  # int32: singular values of Z that count; -1 from "cr", which does not know them
    residual: Array  # float: ‖(F + damping) v − gradient‖/‖gradient‖, before v is rounded
    iterations: Array  # int32: of "cr"; 0 from "exact"


def natural_gradient_direction(
    fn: Network,
    params: Params,
    x: Inputs,
    gradient: PyTree,
    likelihood: Likelihood,
    *,
    damping: float | Array = 0.0,
    solver: Solver = "auto",
    rtol: float | None = None,
    max_iterations: int = 100,
    dtype: DTypeLike | None = None,
    chunk: int = 64,
) -> NaturalGradient:
    """v = (F + damping·I)⁺ gradient.

    Without damping, null directions of F (rescalings, dead and hidden parameters) get no update:
    v is the solution of least Euclidean norm. It moves the function as the natural gradient of any
    other parametrisation does; two solutions differ in null directions alone.

    Args:
        fn, params, x: as for `fisher`; the n examples over which F is taken.
        gradient: pytree like params. The part of it outside of the range of F (of weight decay, or
            of a loss on other examples) is ignored without damping, and shows in the residual.
        likelihood: see `fisher`.
        damping: λ ≥ 0, a number or a traced scalar. It breaks the invariance; see
            `jaxinv.equivariance_error`.
        solver: "exact" takes the singular values of Z (n·out × d), or, where it has more rows than
            columns, of the triangle of its QR factorisation, streamed. "cr" is the method of
            conjugate residuals, from 0, with products F v and the memory of some ten copies of
            params: a Krylov method like conjugate gradients, but what it makes smaller in every
            step is the residual. Up to 256 MB more hold the first 20 directions, to which the
            others are kept orthogonal: without them a perturbation of the gradient grows a
            thousandfold. "auto" is "exact" up to 2000 parameters.
        rtol: "exact" without damping counts singular values of Z up to rtol·σ_1 as zero; by default
            8·max(n·out, d) roundings. "cr" stops at a relative residual of rtol, by default 1e-6,
            or when what is left of the gradient is null to F within rtol.
        max_iterations: of "cr". Look at `residual` and `iterations`: an ill-conditioned F without
            damping takes many more than 100.
        dtype: precision inside, float64 (in a scope of its own) or float32. By default float64 for
            "exact"; for "cr" that of params, at least float32.
        chunk: examples at a time in "exact".

    Returns:
        A `NaturalGradient`; v has the dtypes of params. NaN for a traced damping < 0. Derivatives
        of v are those of (F + damping)⁻¹ gradient: right where that is invertible.

    Raises:
        InvalidInput: as for `fisher`; for an unknown solver or dtype, damping or rtol < 0,
            max_iterations < 1, or a gradient unlike params.

    References:
        Amari 1998; Martens 2020 (see `fisher`); Krylov methods on F: Martens,
        "Deep learning via Hessian-free optimization", ICML 2010; conjugate residuals: Stiefel,
        "Relaxationsmethoden bester Strategie zur Lösung linearer Gleichungssysteme", Commentarii
        Mathematici Helvetici 29, 1955; the pseudo-inverse solution from
        minimal residuals: Liu, Milzarek, Roosta, "Obtaining pseudo-inverse solutions with MINRES"
        (arXiv:2309.17096).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.jacobians import natural_gradient_direction
        >>> w, x = networks.init_mlp(jax.random.key(0), (3, 4, 2)), jnp.eye(3)
        >>> gradient = jax.grad(lambda w: (networks.mlp(w, x) ** 2).mean())(w)
        >>> found = natural_gradient_direction(networks.mlp, w, x, gradient, "gaussian")
        >>> int(found.rank), bool(found.residual < 1e-5)  # n·out = 6 directions
        (6, True)
    """
    damping = check_natural_options(likelihood, damping, solver, rtol, max_iterations, dtype)
    check_params(params)
    check_like(gradient, params, "gradient")
    check_inputs(x, values=True, finite=True)
    leaves = jax.tree.leaves(params)
    size = sum(leaf.size for leaf in leaves)
    dense = solver == "exact" or (solver == "auto" and size <= _DENSE_PARAMETERS)
    own = _scaled.working_dtype(leaves)
    if dtype is None:
        dtype = np.float64 if dense else own
    dtype = jnp.dtype(dtype)
    fixed = isinstance(damping, float)
    # In another precision jax.random draws other numbers: those of fn as it is are kept.
    network = fn if dtype == own else traced_in(dtype, fn, params, x)

    def of(params: Params, x: Inputs, gradient: PyTree, *traced: Array) -> NaturalGradient:
        # A number is made an array here, in the scope: outside it would be a float32.
        lam = jnp.asarray(damping, dtype=dtype) if fixed else traced[0]
        if dense:
            found = _exact(network, params, x, gradient, likelihood, lam, rtol, chunk, dtype)
        else:
            product = _operator(network, params, x, likelihood)
            stop = _RESIDUAL if rtol is None else rtol
            found = _conjugate_residuals(product, gradient, lam, max_iterations, stop)
        v = jax.tree.map(lambda a, dtype: a.astype(dtype), found.v, dtypes)
        return found._replace(v=v, residual=found.residual.astype(own))

    def solve(_: object, gradient: PyTree) -> tuple[PyTree, NaturalGradient]:
        found = call_in(dtype, of, params, x, gradient, *([] if fixed else [damping]))
        return found.v, found._replace(v=())

    def damped(v: PyTree) -> PyTree:
        product = fisher_product(fn, params, x, v, likelihood)
        return jax.tree.map(
            lambda a, b: a.astype(b.dtype) + jnp.asarray(damping, dtype=b.dtype) * b, product, v
        )

    gradient = jax.tree.map(jnp.asarray, gradient)
    dtypes = jax.tree.map(lambda a: a.dtype, gradient)
    # The solution of a linear equation is differentiated as such, not step by step.
    v, found = lax.custom_linear_solve(damped, gradient, solve, symmetric=True, has_aux=True)
    return found._replace(v=optax.tree.cast_like(v, params))


def _exact(
    fn: Network,
    params: Params,
    x: Inputs,
    gradient: PyTree,
    likelihood: Likelihood,
    damping: Array,
    rtol: float | None,
    chunk: int,
    dtype: DTypeLike,
) -> NaturalGradient:
    net = whitened(fn, likelihood)
    shapes = problem_of(net, params, x)
    d = shapes.parameters
    if shapes.rows > d:
        # R with RᵀR = ZᵀZ has the singular values and right vectors of Z, and d rows.
        chunk = max(chunk, -(-d // shapes.outputs))
        stack = lambda R, rows: triangle(jnp.concatenate([R, rows]))  # noqa: E731
        Z = fold_rows(net, params, x, jnp.zeros((d, d), dtype), stack, chunk=chunk)
    else:
        Z = jacobian(net, params, x, mode="rev", chunk=chunk)
    Z = Z / float(np.sqrt(shapes.examples))
    g = flatten(gradient, dtype)
    _, s, Vt = thin_svd(Z)
    limit = policy.counts_from(shapes.rows, d, dtype) if rtol is None else rtol
    counts = s > limit * s[0]
    damped = damping > 0
    kept = counts | damped
    inside = jnp.matmul(Vt, g, precision=_EXACT)
    along = jnp.where(kept, inside / jnp.where(kept, s * s + damping, 1), 0)
    v = jnp.matmul(along, Vt, precision=_EXACT)
    # Outside the range of Zᵀ damping gives (1/λ)·g; without damping nothing moves.
    outside = g - jnp.matmul(inside, Vt, precision=_EXACT)
    v = v + jnp.where(damped, outside / jnp.where(damped, damping, 1), 0)
    v = jnp.where(damping >= 0, v, jnp.nan)
    Zv = jnp.matmul(Z, v, precision=_EXACT)
    left = jnp.matmul(Zv, Z, precision=_EXACT) + damping * v - g
    residual = _quotient(jnp.linalg.norm(left), jnp.linalg.norm(g))
    rank = counts.sum(dtype=jnp.int32)
    return NaturalGradient(unflatten(v, params), rank, residual, jnp.zeros((), jnp.int32))


# k, v, r, Ar, directions p, their images Ap, ‖Ap‖², and the largest Rayleigh quotient
_Carry = tuple[Array, PyTree, PyTree, PyTree, PyTree, PyTree, Array, Array]


def _conjugate_residuals(
    product: Callable[[PyTree], PyTree],
    gradient: PyTree,
    damping: Array,
    max_iterations: int,
    rtol: float | Array,
) -> NaturalGradient:
    """Conjugate residuals: v minimises ‖A v − g‖ over the Krylov space of A = F + λ and g.

    On the range of A it does what conjugate gradients do, at one product per step, and unlike them
    it does not diverge where g has a part that A cannot reach. The images of the first directions
    are kept, and all later ones made orthogonal to them. In exact arithmetic they are; with
    rounding that is lost as soon as a large eigenvalue has been found, and the steps then multiply
    a perturbation of g by thousands.
    """
    damping = jnp.where(damping >= 0, damping, jnp.nan)
    copy = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(gradient))
    # One place more, for the newest.
    kept = min(max_iterations, _KEPT_DIRECTIONS, _KEPT_BYTES // (2 * copy)) + 1

    def A(v: PyTree) -> PyTree:
        return _plus(product(v), damping, v)

    def open_(carry: _Carry) -> Array:
        k, _, r, Ar, _, _, _, top = carry
        # `top` is the largest Rayleigh quotient so far, up to λ_max.
        return (k < max_iterations) & (_norm(r) > rtol * size) & (_norm(Ar) > rtol * top * _norm(r))

    def step(carry: _Carry) -> _Carry:
        k, v, r, Ar, P, Q, squares, top = carry
        p, q = r, Ar
        for _ in range(min(kept, 2)):  # twice is enough
            along = _quotient(-_dots(Q, q), squares)
            p, q = _combined(p, along, P), _combined(q, along, Q)
        square, at = _dot(q, q), jnp.minimum(k, kept - 1)
        alpha = _quotient(_dot(q, r), square)
        v, r = _plus(v, alpha, p), _plus(r, -alpha, q)
        P, Q, squares = _with(P, at, p), _with(Q, at, q), squares.at[at].set(square)
        Ar = A(r)
        top = jnp.maximum(top, _quotient(_norm(Ar), _norm(r)))
        return k + 1, v, r, Ar, P, Q, squares, top

    g, size = gradient, _norm(gradient)
    rtol = jnp.asarray(rtol, dtype=size.dtype)
    Ag = A(g)
    start = optax.tree.zeros_like(g)
    top = _quotient(_norm(Ag), size)
    none = jax.tree.map(lambda a: jnp.zeros((kept, *a.shape), a.dtype), g)
    carry = (jnp.zeros((), jnp.int32), start, g, Ag, none, none, jnp.zeros(kept, size.dtype), top)
    k, v, *_ = lax.while_loop(open_, step, carry)
    # The residual of the recurrence drifts off in floating point.
    r = _plus(g, -1, A(v))
    # What is left of g is null to F: take as much of it out of v as is there (Liu et al. 2022).
    # It is null if the residual does not feel it, nor is it the last digits of a solved system.
    Ar = A(r)
    share = _quotient(_dot(r, v), _dot(r, r))
    null = (damping == 0) & (_norm(r) > rtol * size) & (abs(share) * _norm(Ar) <= 0.1 * _norm(r))
    share = jnp.where(null, share, 0)
    v, r = _plus(v, -share, r), _plus(r, share, Ar)
    v = jax.tree.map(lambda a: jnp.where(damping >= 0, a, jnp.nan), v)
    return NaturalGradient(v, jnp.full((), -1, jnp.int32), _quotient(_norm(r), size), k)


_plus = optax.tree.add_scale  # (a, factor, b) -> a + factor·b


def _dot(a: PyTree, b: PyTree) -> Array:
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), a, b)
    return jnp.stack(jax.tree.leaves(products)).sum()


def _dots(stack: PyTree, tree: PyTree) -> Array:
    """The products with each tree of a stack."""
    products = jax.tree.map(lambda a, b: jnp.tensordot(a, b, b.ndim, precision=_EXACT), stack, tree)
    return jnp.stack(jax.tree.leaves(products)).sum(0)


def _combined(tree: PyTree, factors: Array, stack: PyTree) -> PyTree:
    """tree + Σ factors · stack; of a stack of one without a copy of it."""

    def one(a: Array, s: Array) -> Array:
        if len(s) == 1:
            return a + factors[0] * s[0]
        return a + jnp.tensordot(factors, s, 1, precision=_EXACT)

    return jax.tree.map(one, tree, stack)


def _with(stack: PyTree, at: Array, tree: PyTree) -> PyTree:
    """The stack with a tree at one place; a stack of one is replaced."""
    return jax.tree.map(lambda s, a: s.at[at].set(a) if len(s) > 1 else a[None], stack, tree)


def _norm(tree: PyTree) -> Array:
    return jnp.sqrt(_dot(tree, tree))


def _quotient(above: Array, below: Array) -> Array:
    """above/below, and above for 0: here that is 0 as well."""
    return above / jnp.where(below == 0, 1, below)
