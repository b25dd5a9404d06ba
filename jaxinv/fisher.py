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

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg

from jaxinv._checks import check_params
from jaxinv._precision import call_in
from jaxinv.errors import InvalidInput
from jaxinv.jacobians import flatten, jacobian, jacobian_gram, shapes_of, unflatten
from jaxinv.typing import Array, Inputs, Network, Outputs, Params, PyTree

Likelihood = Literal["softmax", "gaussian", "bernoulli", "poisson"]
Solver = Literal["auto", "exact", "cg"]

# Up to this many parameters "auto" holds J; beyond, a product at a time.
_DENSE_PARAMETERS = 2000


def _root(y: Array, v: Array, likelihood: str) -> Array:
    """R(y) v, with Λ(y) = RᵀR."""
    if likelihood == "gaussian":
        return v
    if likelihood == "softmax":
        # R = (I − qqᵀ) diag(q) with q = √π, a unit vector.
        q = jnp.sqrt(jax.nn.softmax(y, -1))
        scaled = q * v
        return scaled - q * jnp.sum(q * scaled, -1, keepdims=True)
    if likelihood == "bernoulli":
        return jnp.sqrt(jax.nn.sigmoid(y) * jax.nn.sigmoid(-y)) * v
    return jnp.exp(y / 2) * v


def whitened(fn: Network, likelihood: Likelihood) -> Network:
    """The function R(y)·y, R held fixed, of which the Jacobian Z has F = ZᵀZ/n.

    Everything for Jacobians (rank, Gram matrix, kernel, operator) thereby holds for the Fisher.

    Args:
        fn: network `fn(params, x) -> y`; y may be a pytree.
        likelihood: see the module.

    Returns:
        A network with outputs like fn's. Their values mean nothing; their derivatives do.

    Raises:
        InvalidInput: for an unknown likelihood.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import jacobian
        >>> from jaxinv.fisher import whitened
        >>> net = whitened(lambda w, x: x @ w, "bernoulli")
        >>> print(jacobian(net, jnp.zeros((1, 1)), jnp.ones((1, 1))))  # √(½·½)
        [[0.5]]
    """
    if likelihood not in get_args(Likelihood):
        raise InvalidInput(f"likelihood must be one of {get_args(Likelihood)}, not {likelihood!r}.")

    def root(params: Params, x: Inputs) -> Outputs:
        return jax.tree.map(lambda y: _root(jax.lax.stop_gradient(y), y, likelihood), fn(params, x))

    return root


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
        >>> from jaxinv.fisher import fisher
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

    Args, errors and references as for `fisher`; v is a pytree like params.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.fisher import fisher_product
        >>> x = jnp.array([[1.0], [3.0]])
        >>> print(fisher_product(lambda w, x: x @ w, jnp.zeros((1, 1)), x, jnp.full((1, 1), 2.0),
        ...                      "gaussian"))
        [[10.]]
    """
    return _operator(fn, params, x, likelihood)(v)


def _operator(fn: Network, params: Params, x: Inputs, likelihood: Likelihood) -> Any:
    examples = shapes_of(fn, params, x).examples
    z, push = jax.linearize(lambda w: whitened(fn, likelihood)(w, x), params)
    pull = jax.linear_transpose(push, params)
    del z

    def product(v: PyTree) -> PyTree:
        (out,) = pull(push(v))
        return jax.tree.map(lambda a: a / examples, out)

    return product


class NaturalGradient(NamedTuple):
    """A natural gradient and what is known of it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.fisher import natural_gradient_direction
        >>> w, x = jnp.zeros((2, 1)), jnp.array([[1.0, 0.0]])
        >>> found = natural_gradient_direction(
        ...     lambda w, x: x @ w, w, x, jnp.array([[3.0], [0.0]]), "gaussian")
        >>> found.v.ravel().tolist(), int(found.rank)
        ([3.0, 0.0], 1)
    """

    v: PyTree  # like params: (F + damping)⁺ gradient
    rank: Array  # int32: directions kept; -1 from "cg", which does not count them
    residual: Array  # ‖(F + damping) v − gradient‖/‖gradient‖


def natural_gradient_direction(
    fn: Network,
    params: Params,
    x: Inputs,
    gradient: PyTree,
    likelihood: Likelihood,
    *,
    damping: float = 0.0,
    solver: Solver = "auto",
    rtol: float | None = None,
    max_iterations: int = 100,
    tol: float = 1e-6,
    dtype: Any = np.float64,
    chunk: int = 64,
) -> NaturalGradient:
    """v = (F + damping·I)⁺ gradient.

    Without damping, null directions of F (rescalings, dead and hidden parameters) get no update:
    v is the solution of least Euclidean norm. It moves the function as the natural gradient of any
    other parametrisation does; two solutions differ in null directions alone.

    Args:
        fn, params, x: as for `fisher`; the n examples over which F is taken.
        gradient: pytree like params.
        likelihood: see `fisher`.
        damping: λ ≥ 0. It breaks the invariance; see `jaxinv.equivariance_error`.
        solver: "exact" takes the singular values of Z (n·out × d), in float64 by default; "cg"
            runs conjugate gradients from 0 with products F v, in the dtype of params and with the
            memory of some ten copies of them; "auto" is "exact" up to 2000 parameters.
        rtol: "exact" counts singular values of Z up to rtol·σ_1 as zero; by default 8·max(n·out, d)
            roundings.
        max_iterations, tol: of "cg"; tol bounds the relative residual.
        dtype: of "exact".
        chunk: examples at a time in "exact".

    Returns:
        A `NaturalGradient`.

    Raises:
        InvalidInput: as for `fisher`; for an unknown solver or damping < 0.

    References:
        Amari 1998; Martens 2020 (see `fisher`), §6 for damping; conjugate gradients on F: Martens,
        "Deep learning via Hessian-free optimization", ICML 2010.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.fisher import natural_gradient_direction
        >>> w, x = networks.init_mlp(jax.random.key(0), (3, 4, 2)), jnp.eye(3)
        >>> gradient = jax.grad(lambda w: (networks.mlp(w, x) ** 2).mean())(w)
        >>> found = natural_gradient_direction(networks.mlp, w, x, gradient, "gaussian")
        >>> int(found.rank), bool(found.residual < 1e-5)  # n·out = 6 directions
        (6, True)
    """
    if solver not in get_args(Solver):
        raise InvalidInput(f"solver must be one of {get_args(Solver)}, not {solver!r}.")
    if isinstance(damping, int | float) and damping < 0:
        raise InvalidInput(f"damping must be >= 0, not {damping}.")
    check_params(params)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (gradient, params)]
    if structures[0] != structures[1]:
        raise InvalidInput("gradient must be a pytree like params.")
    whitened(fn, likelihood)  # the error for an unknown likelihood, before any work
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if solver == "exact" or (solver == "auto" and size <= _DENSE_PARAMETERS):
        exact = partial(_exact, fn=fn, likelihood=likelihood, rtol=rtol, chunk=chunk)
        v, rank, residual = call_in(
            jnp.dtype(dtype), exact, params, x, gradient, jnp.asarray(damping, dtype="float32")
        )
        like = lambda a, w: a.astype(w.dtype)  # noqa: E731
        return NaturalGradient(jax.tree.map(like, unflatten(v, params), params), rank, residual)
    product = _operator(fn, params, x, likelihood)

    def damped(v: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: a + jnp.asarray(damping, b.dtype) * b, product(v), v)

    v, _ = cg(damped, gradient, tol=tol, maxiter=max_iterations)
    left = jax.tree.map(lambda a, b: a - b, damped(v), gradient)
    return NaturalGradient(v, jnp.int32(-1), _relative(left, gradient))


def _relative(left: PyTree, right: PyTree) -> Array:
    def norm(tree: PyTree) -> Array:
        return jnp.sqrt(sum(jnp.sum(a.astype(jnp.float32) ** 2) for a in jax.tree.leaves(tree)))

    size = norm(right)
    return norm(left) / jnp.where(size > 0, size, 1)


def _exact(
    params: Params,
    x: Inputs,
    gradient: PyTree,
    damping: Array,
    *,
    fn: Network,
    likelihood: Likelihood,
    rtol: float | None,
    chunk: int,
) -> tuple[Array, Array, Array]:
    Z = jacobian(whitened(fn, likelihood), params, x, chunk=chunk)
    g = flatten(gradient, Z.dtype)
    examples = jax.tree.leaves(x)[0].shape[0]
    Z = Z / jnp.sqrt(jnp.asarray(examples, Z.dtype))
    _, s, Vt = jnp.linalg.svd(Z, full_matrices=False)
    limit = 8 * max(Z.shape) * float(jnp.finfo(Z.dtype).eps) if rtol is None else rtol
    kept = s > limit * s[0]
    inside = jnp.where(kept, Vt @ g, 0)
    along = jnp.where(kept, inside / jnp.where(kept, s * s + damping, 1), 0)
    # Damped directions outside the range of Zᵀ are (1/λ)·g; without damping they are left out.
    outside = g - Vt.T @ inside
    outside = jnp.where(damping > 0, outside / jnp.where(damping > 0, damping, 1), 0)
    v = Vt.T @ along + outside
    left = Z.T @ (Z @ v) + damping * v - g
    size = jnp.linalg.norm(g)
    return v, kept.sum(dtype=jnp.int32), jnp.linalg.norm(left) / jnp.where(size > 0, size, 1)
