"""The metric of the path lift, of which Path-SGD takes the diagonal.

The path lift Φ(w) has one coordinate per path, the product of the weights on it. Steepest descent
in ‖dΦ‖² needs G = (∂Φ/∂w)ᵀ(∂Φ/∂w), with as many terms as there are pairs of edges on paths. With
u = w² and D = diag(w) it is made of derivatives of γ²(u), the squared path norm:

    G = diag(∂γ²/∂u) + D (∂²γ²/∂u²) D,

so a product with G is one derivative of κ = ∂γ²/∂u along D v, and G is never formed. In a network
whose weights occur once per path the diagonal of the Hessian is 0 and that of G is κ. A recurrent
weight occurs n times on a path; both terms together then give the n² that ∂Φ/∂w asks for.

Null directions of G change no path: they are the rescalings, and weights on no path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg

from jaxinv._checks import (
    abstract_batch_of_one,
    check_like,
    check_params,
    check_start,
    integer,
    real,
)
from jaxinv._numerics import scaled as _scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.errors import InvalidInput
from jaxinv.optimizers.descent import descent
from jaxinv.optimizers.masking import of_visible
from jaxinv.paths.norms import power_of_norm
from jaxinv.typing import Array, Inputs, Network, Params, PyTree


class _Metric(NamedTuple):
    """G in the coordinates s = √κ·v, in which its diagonal is 1 (K = κ^{-1/2} G κ^{-1/2})."""

    apply: Callable[[list[Array]], list[Array]]  # K s, lists of arrays
    kappa: list[Scaled]
    structure: jax.tree_util.PyTreeDef


def _metric(fn: Network, params: Params, x: Inputs, batch_axis: int | None) -> _Metric:
    norm, lengths = power_of_norm(fn, params, x, 2.0, batch_axis=batch_axis)
    start = [s.mantissa for s in lengths]
    slope = jax.grad(lambda m: norm(m)[0])
    gradients, push = jax.linearize(slope, start)
    exponent = norm(start)[1]
    # Powers of two cancel: κ_e u_e / γ² is a share of the paths.
    factors = [
        jnp.where(
            k > 0,
            jnp.sign(w).astype(m.dtype) * jnp.sqrt(m) * jax.lax.rsqrt(jnp.where(k > 0, k, 1)),
            0,
        )
        for w, m, k in zip(jax.tree.leaves(params), start, gradients, strict=True)
    ]

    def apply(s: list[Array]) -> list[Array]:
        curved = push([f * v for f, v in zip(factors, s, strict=True)])
        return [
            jnp.where(k > 0, v, 0) + f * c
            for k, v, f, c in zip(gradients, s, factors, curved, strict=True)
        ]

    kappa = [Scaled(k, exponent - s.exponent) for k, s in zip(gradients, lengths, strict=True)]
    return _Metric(apply, kappa, jax.tree.structure(params))


def _checked(tree: PyTree, params: Params, name: str) -> list[Array]:
    check_params(params)
    check_like(tree, params, name)
    return jax.tree.leaves(tree)


def path_metric_product(
    fn: Network, params: Params, x: Inputs, v: PyTree, *, batch_axis: int | None = 0
) -> PyTree:
    """G v with G = (∂Φ/∂w)ᵀ(∂Φ/∂w), the metric of the path lift.

    Args:
        fn: the network `fn(params, x) -> y`, as for `jaxinv.path_kappa`.
        params: pytree of float arrays.
        x: inputs with a batch axis; only shapes are used.
        batch_axis: as for `jaxinv.path_norm`.
        v: pytree like params.

    Returns:
        A pytree like params, float32 (float64 where params hold float64). The cost is about two
        passes for κ on a batch of one.

    Raises:
        InvalidInput, UnsupportedOperation: as for `jaxinv.path_kappa`, or v unlike params.

    References:
        The path lift: Gonon, Brisebarre, Riccietti, Gribonval, ICLR 2024 (arXiv:2310.01225).
        Its diagonal: Neyshabur, Salakhutdinov, Srebro, NeurIPS 2015 (arXiv:1506.02617).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.optimizers import path_metric_product
        >>> w = [jnp.array([[2.0]]), jnp.array([[3.0]])]  # one path, Φ = w₀w₁, ∂Φ = (3, 2)
        >>> v = [jnp.array([[1.0]]), jnp.array([[1.0]])]
        >>> [g.item() for g in path_metric_product(
        ...     lambda w, x: (x @ w[0]) @ w[1], w, jnp.zeros((1, 1)), v)]  # (3, 2)·5
        [15.0, 10.0]
    """
    vectors = _checked(v, params, "v")
    metric = _metric(fn, params, x, batch_axis)
    roots = [_root(k) for k in metric.kappa]
    scaled = [
        _scaled.shift(a.astype(r.mantissa.dtype) * r.mantissa, r.exponent)
        for a, r in zip(vectors, roots, strict=True)
    ]
    # A weight without paths has κ = 0, and G v = 0 there.
    product = [
        _scaled.shift(a * r.mantissa, r.exponent)
        for a, r in zip(metric.apply(scaled), roots, strict=True)
    ]
    return jax.tree.unflatten(metric.structure, product)


@jax.jit
def _root(s: Scaled) -> Scaled:
    """√s, with an odd exponent's factor of two in the mantissa."""
    odd = s.exponent & 1
    mantissa = s.mantissa * (1 + odd).astype(s.mantissa.dtype)
    return Scaled(jnp.sqrt(jnp.maximum(mantissa, 0)), (s.exponent - odd) >> 1)


class PathMetricSolution(NamedTuple):
    """A solution of G v = gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.optimizers import path_metric_solve
        >>> solved = path_metric_solve(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.zeros((1, 2)),
        ...                            jnp.array([[3.0], [4.0]]))
        >>> solved.v.ravel().tolist(), bool(solved.residual < 1e-6)
        ([3.0, 4.0], True)
    """

    v: PyTree  # like params
    residual: Array  # ‖G v − gradient‖/‖gradient‖ in the norm of κ^{-1}


def path_metric_solve(
    fn: Network,
    params: Params,
    x: Inputs,
    gradient: PyTree,
    *,
    max_iterations: int = 50,
    rtol: float = 1e-5,
    damping: float | Array = 0.0,
    batch_axis: int | None = 0,
) -> PathMetricSolution:
    """v = G⁺ gradient by conjugate gradients, of least κ-norm Σ_e κ_e v_e².

    Many v solve G v = g, since G has the rescalings as null directions. The one of least κ-norm
    transforms as the weights do under rescalings; that of least Euclidean norm does not. It is
    found by conjugate gradients with κ as preconditioner, started at 0.

    Args:
        fn, params, x, batch_axis: as for `path_metric_product`.
        gradient: pytree like params, of a loss that depends on params through the function alone.
        max_iterations, rtol: of the conjugate gradients; rtol bounds the relative residual.
        damping: solve (G + damping·diag κ) v = gradient. Rescalings are respected at any damping.

    Returns:
        A `PathMetricSolution`. v is 0 for weights on no path.

    Raises:
        InvalidInput, UnsupportedOperation: as for `path_metric_product`; for options out of range.

    Notes:
        A gradient with a part along the null directions (weight decay) has no solution; the
        residual says so.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.optimizers import path_metric_solve
        >>> w = [jnp.array([[2.0]]), jnp.array([[3.0]])]
        >>> gradient = [jnp.array([[3.0]]), jnp.array([[2.0]])]  # of Φ = w₀w₁ itself
        >>> solved = path_metric_solve(
        ...     lambda w, x: (x @ w[0]) @ w[1], w, jnp.zeros((1, 1)), gradient)
        >>> [round(a.item(), 5) for a in solved.v]  # dΦ = 3·v₀ + 2·v₁ = 1, w₀ and w₁ alike
        [0.16667, 0.25]
    """
    _check_solver(max_iterations, rtol, damping)
    slopes = _checked(gradient, params, "gradient")
    metric = _metric(fn, params, x, batch_axis)
    roots = [_root(k) for k in metric.kappa]
    right = [_over_root(g.astype(r.mantissa.dtype), r) for g, r in zip(slopes, roots, strict=True)]

    def apply(s: list[Array]) -> list[Array]:
        return [a + damping * b for a, b in zip(metric.apply(s), s, strict=True)]

    # The equation is linear: of the order of one no norm overflows or vanishes.
    top = jnp.stack([jnp.max(abs(a), initial=0) for a in right]).max()
    unit = jnp.where(top > 0, top, 1)
    right = [a / unit for a in right]
    solved, _ = cg(apply, right, tol=rtol, maxiter=max_iterations)
    left = [a - b for a, b in zip(apply(solved), right, strict=True)]
    size = _norm(right)
    residual = _norm(left) / jnp.where(size > 0, size, 1)
    v = [_over_root(s, r) * unit for s, r in zip(solved, roots, strict=True)]
    return PathMetricSolution(jax.tree.unflatten(metric.structure, v), residual)


@jax.jit
def _over_root(a: Array, root: Scaled) -> Array:
    present = root.mantissa > 0
    quotient = a / jnp.where(present, root.mantissa, 1)
    return jnp.where(present, _scaled.shift(quotient, -root.exponent), 0)


def _norm(tree: list[Array]) -> Array:
    return jnp.sqrt(sum(jnp.sum(a * a) for a in tree))


# --- as an optimizer ------------------------------------------------------------------


class ScaleByPathMetricState(NamedTuple):
    """State of `scale_by_path_metric`: diagnostics of the last solve, no memory.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.optimizers import scale_by_path_metric
        >>> tx = scale_by_path_metric(lambda w, x: x @ w, jnp.zeros((1, 2)))
        >>> tx.init(jnp.ones((2, 1))).count.item()
        0
    """

    count: Array  # type: ignore[assignment]  # int32 scalar: updates so far
    residual: Array  # float scalar: of the last solve, see `PathMetricSolution`


def scale_by_path_metric(
    fn: Network,
    x: Inputs,
    *,
    max_iterations: int = 50,
    rtol: float = 1e-5,
    damping: float | Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Turn each gradient g into G⁺g: steepest descent in the metric of the path lift.

    `scale_by_path_kappa` divides by the diagonal of G; this solves with all of it, by conjugate
    gradients, at the price of about two passes on a batch of one per iteration.

    Args:
        fn: the network `fn(params, x) -> y`, deterministic.
        x: inputs with a leading batch axis (else see `jaxinv.batch_first`); only shapes and dtypes
            are kept.
        max_iterations, rtol, damping: see `path_metric_solve`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; `update` needs `params`. Extra arguments are
        ignored, except `full_params` (`jaxinv.pass_full_params`): inside `optax.masked` or
        `optax.partition` G is that of the unmasked parameters, the others held fixed.

    Raises:
        InvalidInput, UnsupportedOperation: as for `path_metric_solve`; at `update`, if params are
            missing.

    Notes:
        G has many small eigenvalues, in which a noisy gradient is amplified; damping (a share of
        the diagonal, so that rescalings are still respected) bounds that. damping → ∞ is Path-SGD
        with the learning rate divided by it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.optimizers import scale_by_path_metric
        >>> def net(w, x):
        ...     return (x @ w[0]) @ w[1]
        >>> w = [jnp.array([[2.0]]), jnp.array([[3.0]])]
        >>> tx = scale_by_path_metric(net, jnp.zeros((1, 1)))
        >>> v, state = tx.update([jnp.array([[3.0]]), jnp.array([[2.0]])], tx.init(w), w)
        >>> [round(a.item(), 5) for a in v]
        [0.16667, 0.25]
    """
    shapes = abstract_batch_of_one(x)
    _check_solver(max_iterations, rtol, damping)

    def init_fn(params: Params) -> ScaleByPathMetricState:
        check_start(params)
        dtype = _scaled.working_dtype(jax.tree.leaves(params))
        return ScaleByPathMetricState(jnp.zeros((), jnp.int32), jnp.zeros((), dtype))

    def update_fn(
        updates: PyTree,
        state: ScaleByPathMetricState,
        params: Params | None = None,
        *,
        full_params: Params | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, ScaleByPathMetricState]:
        del extra_args
        if params is None:
            raise InvalidInput(
                "The path metric needs the parameters: G is a function of all weights. "
                "Call update(gradients, state, params)."
            )
        solved = path_metric_solve(
            of_visible(fn, params, full_params),
            params,
            shapes,
            updates,
            max_iterations=max_iterations,
            rtol=rtol,
            damping=damping,
        )
        v = optax.tree.cast_like(solved.v, updates)
        residual = solved.residual.astype(state.residual.dtype)
        return v, ScaleByPathMetricState(optax.safe_increment(state.count), residual)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def path_metric_sgd(
    learning_rate: optax.ScalarOrSchedule,
    fn: Network,
    x: Inputs,
    *,
    momentum: float | None = None,
    nesterov: bool = False,
    damping: float | Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Steepest descent in the path metric: Δw = −η (G + damping·diag κ)⁺ ∂L/∂w.

    Args:
        learning_rate: η, a number or a schedule.
        fn, x, damping: see `scale_by_path_metric`, whose other options are for chains.
        momentum, nesterov: see `jaxinv.path_sgd`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; the state is that of the chained parts.

    Raises:
        InvalidInput, UnsupportedOperation: as for `scale_by_path_metric`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.optimizers import path_metric_sgd
        >>> w = [jnp.array([[2.0]]), jnp.array([[3.0]])]
        >>> tx = path_metric_sgd(0.1, lambda w, x: (x @ w[0]) @ w[1], jnp.zeros((1, 1)))
        >>> updates, _ = tx.update([jnp.array([[3.0]]), jnp.array([[2.0]])], tx.init(w), w)
        >>> [round(a.item(), 5) for a in updates]  # −0.1 times that of `path_metric_solve`
        [-0.01667, -0.025]
    """
    precondition = scale_by_path_metric(fn, x, damping=damping)
    return descent(precondition, learning_rate, momentum, nesterov)


def _check_solver(max_iterations: object, rtol: object, damping: object) -> None:
    integer("max_iterations", max_iterations, 1)
    for name, value in (("rtol", rtol), ("damping", damping)):
        if not isinstance(value, jax.core.Tracer):
            real(name, value, lambda v: 0 <= v < float("inf"), "a finite number >= 0")
