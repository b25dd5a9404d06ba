"""Data-dependent path norms and sensitivities: between the path norm and batch normalisation.

For every unit v with incoming weights w_v, from units u,

    γ²_v = w_vᵀ R_v w_v,      R_v = α·C_v + (1 − α)·diag(γ²_u),

with C_v the second moments (or, `centered`, the covariance) of the units that lead into v, over a
batch. The first part is w_vᵀ C_v w_v = E[z_v²], which needs no matrix: it is read off the unit's
own pre-activation z_v. With γ²_net = Σ_{outputs} γ²_v,

    κ_e = ½ ∂²γ²_net/∂w_e² = (weights enter the paths) + Σ_v c_v E[(∂z_v/∂w_e)²],

c_v = ∂γ²_net/∂E[z_v²], since z_v is piecewise linear in each weight. α = 0 is the path norm and the
κ of Path-SGD. At α = 1 the second term alone is left, over the outputs: the diagonal of
E[JᵀJ], the Fisher information of a Gaussian likelihood.

A unit is a sum of edges: the output of a dense or convolutional layer with the biases and skip
connections added to it. In a convolution every position is a unit. Input elements have γ² = 1.

Reference: Neyshabur, Tomioka, Salakhutdinov, Srebro, "Data-dependent path normalization in neural
networks", ICLR 2016 (arXiv:1511.06747).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinv import _checks
from jaxinv._interpreter import walk
from jaxinv._interpreter.at_once import at_once
from jaxinv._interpreter.batch import TracedNetwork, leading, traced_network
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.errors import InvalidInput
from jaxinv.paths.data_domain import Data, DataDomain, MixingDomain, Unit
from jaxinv.paths.domain import PathDomain
from jaxinv.paths.norms import scaled_kappa
from jaxinv.paths.squared_gradients import mean_squares
from jaxinv.paths.values import Weight, as_paths, start
from jaxinv.typing import Array, ArrayLike, DType, Inputs, Network, Params, PyTree


class Problem(NamedTuple):
    """A network traced for one example, its weights, and the examples."""

    network: TracedNetwork
    leaves: list[Array]
    inputs: list[Array]  # (n, 1, ...): the axis of one is the batch of the trace
    dtype: DType


def prepare(fn: Network, params: Params, x: Inputs, batch_axis: int | None = 0) -> Problem:
    """Check the arguments and trace; half precision is computed in float32."""
    _checks.check_params(params)
    dtype = scaled.working_dtype(jax.tree.leaves(params))
    params = jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), params)
    x = leading(x, batch_axis)
    _checks.check_inputs(x, values=True, finite=True)
    sizes = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(x)}
    if len(sizes) > 1:
        raise InvalidInput(f"the leaves of x have different batch sizes, {sorted(sizes)}.")

    def widened(leaf: Array) -> Array:
        half = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return jnp.expand_dims(leaf.astype(dtype) if half else leaf, 1)

    inputs = [widened(jnp.asarray(leaf)) for leaf in jax.tree.leaves(x)]
    shapes = [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in inputs]
    one = jax.tree.unflatten(jax.tree.structure(x), shapes)
    network = traced_network(fn, params, one, batch_axis, whole=False)
    return Problem(network, jax.tree.leaves(params), inputs, dtype)


def interpret(
    problem: Problem, leaves: list[Array], lengths: list[Scaled], domain: DataDomain
) -> list[Data | Weight | ArrayLike]:
    """Values of the outputs; every input element has γ² = 1."""
    names = problem.network.program.trace.param_names
    weights = [
        Weight(w, length, frozenset([name]), scaled.gauged_axes(w.shape))
        for w, length, name in zip(leaves, lengths, names, strict=True)
    ]
    starts = [Data(start(_ones(a, problem.dtype), a.dtype), a) for a in problem.inputs]
    return problem.network.interpret(weights, starts, domain)


def _ones(array: Array, dtype: DType) -> Scaled:
    return Scaled(jnp.ones(array.shape[1:], dtype), jnp.zeros((), jnp.int32))


def squares(problem: Problem) -> list[Scaled]:
    """w² of every leaf."""
    return [scaled.power(w, 2.0, problem.dtype, sample=True) for w in problem.leaves]


class _Mixed(NamedTuple):
    total: Scaled  # γ²_net
    units: list[Unit]  # (numbers, exponent of the moment) of the units that count


def _mixed(
    problem: Problem,
    leaves: list[Array],
    lengths: list[Scaled],
    alpha: float,
    centered: bool,
    edges_only: bool,
    offsets: list[Array] | None = None,
) -> _Mixed:
    path = PathDomain(2.0, problem.dtype, edges_only)
    outputs: list[Data | Weight | ArrayLike] = []
    if alpha == 1:
        outputs = interpret(problem, leaves, lengths, DataDomain(path))
    # At α = 1 the units before the outputs do not count: their moments need not be known.
    domain = MixingDomain(path, alpha, centered, offsets)
    if not outputs or not all(isinstance(v, Data) and v.open for v in outputs):
        outputs = interpret(problem, leaves, lengths, domain)
    last = walk.output_equation(problem.network.program.trace)
    seen = [domain.seen(v) if isinstance(v, Data) else v for v in outputs]
    sums = [as_paths(path, last, v).sums for v in seen]
    full = [
        Scaled(jnp.broadcast_to(s.mantissa, aval.shape), s.exponent)
        for s, aval in zip(sums, last.outputs, strict=True)
    ]
    return _Mixed(scaled.total(full), domain.units)


def data_dependent_path_norm(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    alpha: float,
    centered: bool = False,
    batch_axis: int | None = 0,
) -> Array:
    """Data-dependent path norm γ_net = (Σ_{outputs v} γ²_v)^{1/2}.

    γ²_v = w_vᵀ R_v w_v with R_v = α·C_v + (1 − α)·diag(γ²_u).

    Args:
        fn: network `fn(params, x) -> y`, of operations that `jaxinv.path_norm` covers, without
            loops over values that depend on x.
        params: pytree of float arrays.
        x: the examples, arrays with a common batch axis; their values count unless α = 0.
        alpha: from 0, the path norm, to 1, the root mean square of the outputs.
        centered: C_v is the covariance of the incoming units rather than their second moments.
            Biases then have no part in C_v.
        batch_axis: as for `jaxinv.path_norm`.

    Returns:
        A scalar; float64 if a parameter is, else float32. Differentiable.

    Raises:
        InvalidInput: as for `jaxinv.path_norm`; alpha outside [0, 1]; x without values, not finite.
        UnsupportedOperation: for an operation that path semantics do not cover.

    References:
        Neyshabur, Tomioka, Salakhutdinov, Srebro, ICLR 2016 (arXiv:1511.06747), eq. 3 and 4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import data_dependent_path_norm
        >>> def net(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"in": jnp.array([[1.0, 3.0], [-2.0, 4.0]]), "out": jnp.array([[2.0], [-1.0]])}
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> # Hidden units: E[z²] = 5/2 and 25/2, paths 5 and 25. Outputs −1 and −4.
        >>> print(f"{data_dependent_path_norm(net, w, x, alpha=1.0) ** 2:.4f}")  # (1 + 16)/2
        8.5000
        >>> print(f"{data_dependent_path_norm(net, w, x, alpha=0.5) ** 2:.4f}")  # (8.5 + 33.75)/2
        21.1250
    """
    alpha = _checks.check_alpha(alpha)
    problem = prepare(fn, params, x, batch_axis)
    given = problem.leaves, problem.inputs
    return at_once(_norm, problem.network, given, problem.dtype, alpha, centered)


def _norm(
    network: TracedNetwork,
    given: tuple[list[Array], list[Array]],
    dtype: DType,
    alpha: float,
    centered: bool,
) -> Array:
    problem = Problem(network, *given, dtype)
    found = _mixed(problem, problem.leaves, squares(problem), alpha, centered, edges_only=False)
    return scaled.root(found.total, 2.0)


def data_dependent_path_kappa(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    alpha: float,
    centered: bool = False,
    probes: int | None = None,
    key: Array | None = None,
    batch_axis: int | None = 0,
) -> PyTree:
    """Sensitivity κ_e = ½ ∂²γ²_net/∂w_e² of the data-dependent path norm to every weight.

    Args:
        fn, params, x, alpha, centered, batch_axis: as for `data_dependent_path_norm`. Every
            parameter must be an edge, as for `jaxinv.path_kappa`.
        probes: None for the exact sum over units: one backward pass per unit (α = 1: per output).
            With an integer, Σ_v c_v E[(∂z_v/∂w_e)²] is estimated without bias from as many
            backward passes in all, each of the sum of the c_v^{1/2} z_v with random signs. Either
            way the gradients of all examples are held at a time.
        key: a jax random key for the signs; needed with `probes`.

    Returns:
        A pytree like params, of float32 (float64 where params hold float64).

    Raises:
        InvalidInput, UnsupportedOperation: as for `data_dependent_path_norm`.

    Notes:
        For a weight used on several edges the path part is the sum over its edges, as for
        `jaxinv.path_kappa`; the part of the data is that of the weight itself.

    References:
        Neyshabur, Tomioka, Salakhutdinov, Srebro, ICLR 2016 (arXiv:1511.06747), §4; the estimate
        of a diagonal by random signs: Bekas, Kokiopoulou, Saad, Applied Numerical Mathematics 2007.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import data_dependent_path_kappa
        >>> def net(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"in": jnp.array([[1.0, 3.0], [-2.0, 4.0]]), "out": jnp.array([[2.0], [-1.0]])}
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> kappa = data_dependent_path_kappa(net, w, x, alpha=1.0)  # E[(∂y/∂w)²]
        >>> kappa["in"].tolist(), kappa["out"].tolist()
        ([[2.0, 0.5], [0.0, 0.5]], [[0.5], [12.5]])
    """
    found = scaled_data_kappa(
        fn,
        params,
        x,
        alpha=alpha,
        centered=centered,
        probes=probes,
        key=key,
        batch_axis=batch_axis,
    )
    kappas = [scaled.value(s) for s in found]
    return jax.tree.unflatten(jax.tree.structure(params), kappas)


def scaled_data_kappa(
    fn: Network,
    params: Params,
    x: Inputs,
    *,
    alpha: float,
    centered: bool,
    probes: int | None,
    key: Array | None,
    batch_axis: int | None = 0,
) -> list[Scaled]:
    """κ of every leaf as mantissa · 2^exponent."""
    alpha = _checks.check_alpha(alpha)
    _checks.check_probes(probes)
    if probes is not None and key is None and alpha > 0:
        raise InvalidInput("probes draws random signs: pass key=jax.random.key(...).")
    if alpha == 0:
        return scaled_kappa(fn, params, x, 2.0, batch_axis=batch_axis)
    problem = prepare(fn, params, x, batch_axis)
    given = problem.leaves, problem.inputs, key
    return at_once(_kappa, problem.network, given, problem.dtype, alpha, centered, probes)


def _kappa(
    network: TracedNetwork,
    given: tuple[list[Array], list[Array], Array | None],
    dtype: DType,
    alpha: float,
    centered: bool,
    probes: int | None,
) -> list[Scaled]:
    leaves, inputs, key = given
    problem = Problem(network, leaves, inputs, dtype)
    lengths = squares(problem)

    def units(leaves: list[Array], inputs: list[Array]) -> list[Unit]:
        part = problem._replace(inputs=inputs)
        return _mixed(part, leaves, lengths, alpha, centered, edges_only=True).units

    shapes = [a.shape[1:] for a, _ in jax.eval_shape(units, problem.leaves, problem.inputs)]

    def norm(
        mantissas: list[Array], offsets: list[Array]
    ) -> tuple[Array, tuple[Array, list[Array]]]:
        parts = [Scaled(m, s.exponent) for m, s in zip(mantissas, lengths, strict=True)]
        found = _mixed(problem, problem.leaves, parts, alpha, centered, True, offsets)
        return found.total.mantissa, (found.total.exponent, [e for _, e in found.units])

    offsets = [jnp.zeros(s, problem.dtype) for s in shapes]
    start = [s.mantissa for s in lengths]
    slope, (exponent, exponents) = jax.grad(norm, (0, 1), has_aux=True)(start, offsets)
    by_path, by_moment = slope
    path_part = [Scaled(g, exponent - s.exponent) for g, s in zip(by_path, lengths, strict=True)]
    slopes = [
        scaled.normalize(Scaled(g, exponent - e)) for g, e in zip(by_moment, exponents, strict=True)
    ]
    # c_v E[z_v²] is a share of γ²_net: in units of γ_net, numbers of any size have a square root.
    unit = exponent >> 1
    roots = [_root(c, unit) for c in slopes]

    def weighted(leaves: list[Array], inputs: list[Array]) -> list[Array]:
        found = units(leaves, inputs)
        return [r * a.astype(r.dtype) for r, (a, _) in zip(roots, found, strict=True)]

    means = mean_squares(
        weighted, problem.leaves, problem.inputs, problem.dtype, centered, probes, key
    )
    data_part = [Scaled(s.mantissa, s.exponent + 2 * unit) for s in means]
    return [scaled.plus(a, b) for a, b in zip(path_part, data_part, strict=True)]


@jax.jit
def _root(s: Scaled, unit: Array) -> Array:
    """√s / 2^unit."""
    odd = s.exponent & 1
    mantissa = jnp.sqrt(jnp.maximum(s.mantissa, 0) * (1 + odd).astype(s.mantissa.dtype))
    return scaled.shift(mantissa, ((s.exponent - odd) >> 1) - unit)


__all__ = ["data_dependent_path_kappa", "data_dependent_path_norm"]
