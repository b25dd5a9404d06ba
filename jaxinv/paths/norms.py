"""Path norms and path sensitivities of any `fn(params, x)`.

A path runs along edges of the network from an input element, or from a bias (an edge from a node
that is constantly 1), to an output element. Its length is the product of the |weights| on it.

* γ_p = (Σ_paths Π_{e∈path} |w_e|^p)^{1/p} is the path norm;
* κ_e = ∂γ_p^p / ∂|w_e|^p = Σ_{paths∋e} Π_{e'∈path∖e} |w_e'|^p measures how much of the network
  hangs on one weight, and is what Path-SGD divides by.

Both are invariant under node-wise rescalings (κ_e transforms like |w_e|^-p). They cost one forward
pass, and one backward pass for κ, on a batch of *one*, whatever the batch used for training.

References: Neyshabur, Tomioka, Srebro, "Norm-based capacity control in neural networks", COLT 2015
(arXiv:1503.00036), §3 for γ_p; Neyshabur, Salakhutdinov, Srebro, "Path-SGD", NeurIPS 2015
(arXiv:1506.02617), eq. 6–8 for κ; Neyshabur, Wu, Salakhutdinov, Srebro, "Path-normalized
optimization of recurrent neural networks", NeurIPS 2016 (arXiv:1605.07154), eq. 7 for κ⁽¹⁾ of
shared weights; Gonon, Brisebarre, Riccietti, Gribonval, "A path-norm toolkit for modern networks",
ICLR 2024 (arXiv:2310.01225) for biases, pooling and skip connections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxinv import _checks
from jaxinv._interpreter import walk
from jaxinv._interpreter.at_once import at_once
from jaxinv._interpreter.batch import TracedNetwork, leading, traced_network
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.paths import runs as _path_runs
from jaxinv.paths.domain import PathDomain
from jaxinv.paths.values import Weight, as_paths, start
from jaxinv.typing import Array, Constant, DType, Inputs, Network, Params, PyTree

# Slopes of mantissas are shares of γ^p and so at most of the order of one: they start from this
# power of two, which leaves float32 room for shares down to 2^-216.
_HEADROOM = 90

T = TypeVar("T")


class _Problem(NamedTuple):
    """What one forward pass needs: the trace and the lengths |w|^p of the parameters."""

    network: TracedNetwork
    leaves: list[Constant]
    lengths: list[Scaled]
    dtype: DType
    sample: bool


def _checked(
    fn: Network, params: Params, x: Inputs, p: float, batch_axis: int | None
) -> tuple[TracedNetwork, list[Constant]]:
    """The program of the network, and its weights."""
    _checks.check_exponent(p)
    _checks.check_params(params, complex_numbers=True)
    network = traced_network(fn, params, leading(x, batch_axis), batch_axis, whole=False)
    return network, jax.tree.leaves(params)


def _problem(
    network: TracedNetwork, leaves: list[Constant], p: float, sample: bool = False
) -> _Problem:
    dtype = scaled.working_dtype(leaves)
    lengths = [scaled.power(jnp.asarray(a), p, dtype, sample=sample) for a in leaves]
    return _Problem(network, leaves, lengths, dtype, sample)


def _forward(
    problem: _Problem, mantissas: list[Array], p: float, edges_only: bool, streaming: bool = False
) -> list[Scaled]:
    """Sums over the paths into every output element, for given mantissas of the |w|^p."""
    network, leaves, lengths, dtype, sample = problem
    trace = network.program.trace
    domain = PathDomain(float(p), dtype, edges_only, streaming, sample)
    weights = [
        Weight(
            jnp.asarray(value),
            Scaled(m, length.exponent),
            frozenset([name]),
            scaled.gauged_axes(m.shape),
        )
        for value, m, length, name in zip(
            leaves, mantissas, lengths, trace.param_names, strict=True
        )
    ]
    starts = []
    for s in network.program.inputs:
        ones, runs = _path_runs.ones(s.shape, dtype)
        starts.append(start(ones, s.dtype, runs))
    outputs = network.interpret(weights, starts, domain)
    last = walk.output_equation(trace)
    return [
        Scaled(jnp.broadcast_to(sums.mantissa, aval.shape), sums.exponent)
        for sums, aval in zip(
            [as_paths(domain, last, v).sums for v in outputs], last.outputs, strict=True
        )
    ]


def _unit_sums(
    network: TracedNetwork, leaves: list[Constant], p: float, streaming: bool
) -> list[Scaled]:
    problem = _problem(network, leaves, p)
    start = [s.mantissa for s in problem.lengths]
    return _forward(problem, start, p, edges_only=False, streaming=streaming)


def _streamed(
    function: Callable[[TracedNetwork, list[Constant], float, bool], T],
) -> Callable[[TracedNetwork, list[Constant], float], T]:
    """`function` with `streaming`, and without where it is differentiated."""

    def call(network: TracedNetwork, leaves: list[Constant], p: float) -> T:
        @jax.custom_jvp
        def of(*leaves: Constant) -> T:
            return function(network, list(leaves), p, True)

        @of.defjvp
        def _(given: tuple[Constant, ...], tangents: tuple[Array, ...]) -> tuple[T, T]:
            plain = lambda *leaves: function(network, list(leaves), p, False)  # noqa: E731
            found: tuple[T, T] = jax.jvp(plain, given, tangents)
            return found

        return of(*map(jnp.asarray, leaves))

    return call


@_streamed
def _norm(network: TracedNetwork, leaves: list[Constant], p: float, streaming: bool) -> Array:
    return scaled.root(scaled.total(_unit_sums(network, leaves, p, streaming)), p)


@_streamed
def _log_norm(network: TracedNetwork, leaves: list[Constant], p: float, streaming: bool) -> Array:
    return scaled.log(scaled.total(_unit_sums(network, leaves, p, streaming))) / p


@_streamed
def _unit_norms(
    network: TracedNetwork, leaves: list[Constant], p: float, streaming: bool
) -> list[Array]:
    sums = _unit_sums(network, leaves, p, streaming)
    return [scaled.root(scaled.moved(lambda array: array[0], out), p) for out in sums]


@_streamed
def _kappa(
    network: TracedNetwork, leaves: list[Constant], p: float, streaming: bool
) -> list[Array]:
    return [scaled.value(s) for s in _scaled_kappa(network, leaves, p, streaming)]


@_streamed
def _log_kappa(
    network: TracedNetwork, leaves: list[Constant], p: float, streaming: bool
) -> list[Array]:
    return [scaled.log(s) for s in _scaled_kappa(network, leaves, p, streaming)]


class PowerOfNorm(NamedTuple):
    """γ_p^p as a function of the |w|^p of every leaf, all of them as mantissa · 2^exponent."""

    function: Callable[
        [list[Array]], tuple[Array, Array]
    ]  # mantissas -> (mantissa, exponent) of γ_p^p
    lengths: list[Scaled]  # |w|^p


def power_of_norm(
    fn: Network, params: Params, x: Inputs, p: float, *, batch_axis: int | None = 0
) -> PowerOfNorm:
    """γ_p^p to be differentiated as often as needed.

    Derivatives are those of the mantissa, at a constant exponent.
    """
    return _power_of_norm(*_checked(fn, params, x, p, batch_axis), p, streaming=False)


def _power_of_norm(
    network: TracedNetwork,
    leaves: list[Constant],
    p: float,
    streaming: bool,
    sample: bool = False,
) -> PowerOfNorm:
    """With `streaming` to be differentiated once, in reverse mode."""
    problem = _problem(network, leaves, p, sample)

    def norm(mantissas: list[Array]) -> tuple[Array, Array]:
        outputs = _forward(problem, mantissas, p, edges_only=True, streaming=streaming)
        total = scaled.total(outputs)
        return total.mantissa, total.exponent

    return PowerOfNorm(norm, problem.lengths)


def scaled_kappa(
    fn: Network,
    params: Params,
    x: Inputs,
    p: float,
    *,
    batch_axis: int | None = 0,
    streaming: bool = False,
) -> list[Scaled]:
    """κ of every leaf as mantissa · 2^exponent: exact under power-of-two rescaling, no overflow.

    With `streaming` large dense layers are read as few times as possible, and their exponents are
    read off a sample, which a training loop needs; the result is NaN, not wrong, if the weights of
    one array span more than float32 can.
    """
    network, leaves = _checked(fn, params, x, p, batch_axis)
    return at_once(_scaled_kappa, network, leaves, float(p), streaming, streaming)


def _scaled_kappa(
    network: TracedNetwork,
    leaves: list[Constant],
    p: float,
    streaming: bool,
    sample: bool = False,
) -> list[Scaled]:
    norm, lengths = _power_of_norm(network, leaves, p, streaming, sample)
    start = [s.mantissa for s in lengths]
    mantissa, pull_back, exponent = jax.vjp(norm, start, has_aux=True)
    seed = jnp.where(jnp.isfinite(mantissa), 2.0**_HEADROOM, jnp.nan).astype(mantissa.dtype)
    (gradients,) = pull_back(seed)
    shift = exponent - _HEADROOM
    return [Scaled(g, shift - s.exponent) for g, s in zip(gradients, lengths, strict=True)]


def path_norm(
    fn: Network, params: Params, x: Inputs, *, p: float = 2.0, batch_axis: int | None = 0
) -> Array:
    """Path norm γ_p = (Σ_paths Π_{e∈path} |w_e|^p)^{1/p}.

    Args:
        fn: network `fn(params, x) -> y`, made of operations that are positively homogeneous of
            degree one along a path.
        params: pytree of float arrays. The length of a complex weight is its absolute value.
        x: inputs with a batch axis, or `jax.ShapeDtypeStruct`s: only shapes are used.
        p: exponent, any real p >= 1.
        batch_axis: the axis of every input that counts examples, 0 by default; None if x is one
            input without such an axis (a whole graph, one sequence).

    Returns:
        A scalar; float64 if a parameter is, else float32 (bfloat16 and float16 parameters are
        summed in float32). It is `inf` where γ_p overflows: see `log_path_norm`.
        Differentiable, and usable as a regulariser.

    Raises:
        InvalidInput: for integer, NaN or missing params, x without a batch axis, p < 1.
        UnsupportedOperation: for an operation that path semantics do not cover.

    Notes:
        Exponents are kept beside mantissas, one for each unit and one for each row and column of
        a weight: depth and the scale of layers never overflow, and units rescaled by any power of
        two give the same bits. Beside its row and column, in float32 a weight below 2^(-126/p)
        times the others (10^-19 times, for p = 2) counts as 0. Where all that runs into a unit was
        so small the answer is NaN; use float64 parameters then.
        `fn` must treat the examples of a batch apart: whatever is not known to is refused by name
        (statistics over the batch, positions in it, its size).

    References:
        Neyshabur, Tomioka, Srebro, COLT 2015 (arXiv:1503.00036), §3;
        Gonon et al., ICLR 2024 (arXiv:2310.01225), Definition 3.1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import path_norm
        >>> def net(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"in": jnp.array([[1.0, 3.0], [-2.0, 4.0]]), "out": jnp.array([[2.0], [-1.0]])}
        >>> print(path_norm(net, w, jnp.zeros((5, 2))))  # sqrt(5·4 + 25·1)
        6.708204
    """
    return at_once(_norm, *_checked(fn, params, x, p, batch_axis), float(p))


def log_path_norm(
    fn: Network, params: Params, x: Inputs, *, p: float = 2.0, batch_axis: int | None = 0
) -> Array:
    """Natural logarithm of the path norm, log γ_p; finite where γ_p itself overflows.

    Args, errors and references as for `path_norm`. Returns a scalar, -inf if no path has weight.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import log_path_norm, path_norm
        >>> def deep(ws, x):
        ...     for w in ws:
        ...         x = jax.nn.relu(x @ w)
        ...     return x
        >>> ws = [jnp.full((10, 10), 10.0) for _ in range(30)]
        >>> print(path_norm(deep, ws, jnp.zeros((1, 10)), p=1))
        inf
        >>> print(f"{log_path_norm(deep, ws, jnp.zeros((1, 10)), p=1):.3f}")  # log 10^61
        140.458
    """
    return at_once(_log_norm, *_checked(fn, params, x, p, batch_axis), float(p))


def path_kappa(
    fn: Network, params: Params, x: Inputs, *, p: float = 2.0, batch_axis: int | None = 0
) -> PyTree:
    """Path sensitivity κ_e = ∂γ_p^p/∂|w_e|^p = Σ_{paths∋e} Π_{e'∈path∖e} |w_e'|^p of every weight.

    For a weight used on several edges (convolution, recurrence, tied layers) the sum over its
    edges, κ⁽¹⁾ of Neyshabur et al. 2016. Path-SGD divides the gradient by κ^{2/p}.

    Args:
        fn, params, x, p, batch_axis: as for `path_norm`. Every parameter must be an edge: a kernel
            that is a nonlinear function of parameters (weight normalisation) has no κ and is
            refused.

    Returns:
        A pytree like params, of float32 (float64 where params hold float64). 0 for a weight on no
        path; `inf` where κ overflows: see `log_path_kappa`.

    Raises:
        InvalidInput, UnsupportedOperation: as for `path_norm`.

    Notes:
        The bias of a unit whose path sums are above 2^166 times the size of the bias (in float32)
        has lost its κ, which is NaN then. A weight whose paths make up less than 10^-65 of γ_p^p
        counts as on no path. Use float64 for both.

    References:
        Neyshabur, Salakhutdinov, Srebro, NeurIPS 2015 (arXiv:1506.02617), eq. 6–8;
        Neyshabur et al., NeurIPS 2016 (arXiv:1605.07154), eq. 7.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import path_kappa
        >>> def net(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"in": jnp.array([[1.0, 3.0], [-2.0, 4.0]]), "out": jnp.array([[2.0], [-1.0]])}
        >>> kappa = path_kappa(net, w, jnp.zeros((5, 2)))
        >>> kappa["in"].tolist(), kappa["out"].tolist()
        ([[4.0, 1.0], [4.0, 1.0]], [[5.0], [25.0]])
    """
    kappas = at_once(_kappa, *_checked(fn, params, x, p, batch_axis), float(p))
    return jax.tree.unflatten(jax.tree.structure(params), kappas)


def log_path_kappa(
    fn: Network, params: Params, x: Inputs, *, p: float = 2.0, batch_axis: int | None = 0
) -> PyTree:
    """Natural logarithm of κ, -inf where κ = 0; finite where κ overflows.

    Args, errors and references as for `path_kappa`. Returns a pytree like params.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import log_path_kappa
        >>> log_kappa = log_path_kappa(lambda w, x: (x @ w[0]) @ w[1],
        ...                            [jnp.full((1, 1), 1e30), jnp.full((1, 1), 1e-30)],
        ...                            jnp.zeros((1, 1)))
        >>> [f"{k.item():.3f}" for k in log_kappa]  # ± 60·log 10
        ['-138.155', '138.155']
    """
    logs = at_once(_log_kappa, *_checked(fn, params, x, p, batch_axis), float(p))
    return jax.tree.unflatten(jax.tree.structure(params), logs)


def unit_path_norms(
    fn: Network, params: Params, x: Inputs, *, p: float = 2.0, batch_axis: int | None = 0
) -> PyTree:
    """Path norm of every output unit: γ_p of the network that keeps that output alone.

    γ_p(v) = (Σ_{paths ending in v} Π_{e∈path} |w_e|^p)^{1/p}, so Σ_v γ_p(v)^p = γ_p^p.
    One forward pass gives all units. For hidden units pass an `fn` that returns them.

    Args, errors and references as for `path_norm`.

    Returns:
        A pytree like fn's output for one example, without the batch axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import unit_path_norms
        >>> w = jnp.array([[3.0, 1.0], [4.0, 0.0]])
        >>> unit_path_norms(lambda w, x: x @ w, w, jnp.zeros((8, 2))).tolist()
        [5.0, 1.0]
    """
    network, leaves = _checked(fn, params, x, p, batch_axis)
    norms = at_once(_unit_norms, network, leaves, float(p))
    return jax.tree.unflatten(network.program.trace.output_tree, norms)


__all__ = [
    "log_path_kappa",
    "log_path_norm",
    "path_kappa",
    "path_norm",
    "power_of_norm",
    "scaled_kappa",
    "unit_path_norms",
]
