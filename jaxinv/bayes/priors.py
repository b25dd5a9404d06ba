"""Priors and posteriors of networks; Jeffreys' prior where parameters are ambiguous.

Jeffreys' density √det F is the volume of the model: the same measure on functions whatever the
parameters are. With rescalings w·exp(Bu) the Fisher information F is singular along the orbits, so
the volume lives on the quotient, the set of orbits. With coordinates s of the quotient it is

    √det S ds,      S = (∂w/∂s)ᵀ F (∂w/∂s),

and does not depend on the slice through the orbits that s parametrises. Here is how to have it as a
density of parameters. Let u(w) be an orbit coordinate, u(w·exp(Ba)) = u(w) + a, such as the logs of
the norms of the units' incoming weights, and U = ∂u/∂w. Then S and F + UᵀU have determinants that
differ by the squared volume element of (s, u) ↦ w alone, so

| convention | density | with respect to |
|---|---|---|
| "lift" | √det(F + UᵀU) · ν(u(w)) | Lebesgue measure on parameters |
| "slice" | √det(F + UᵀU) / √det(UUᵀ) | surface measure on the slice {u = const} through w |
| "pseudo-determinant" | √pdet F, over the complement of the orbit | none that is invariant |

The lift is Jeffreys' measure on the quotient times a normal law ν of the orbit coordinate, which
integrates out: whatever ν and u, what is sampled from the lift has Jeffreys' law as a function. It
lets any sampler for R^d work on the quotient. The pseudo-determinant lacks the volume of the orbit
and is not a density on the quotient: it is here for comparison. Without rescalings all three are
√det F.

Jeffreys' prior of a network is improper as a rule. With Gaussian noise of known size the posterior
is the Gaussian around the data restricted to the set of the model's outputs, with the volume of
that set; it is proper where the volume grows polynomially, as that of piecewise polynomial networks
does. With other likelihoods check: where the maximum likelihood is at infinity (separable classes)
it depends on how F decays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxinv._checks import check_params, one_of, real
from jaxinv._numerics.determinants import log_det
from jaxinv._numerics.likelihoods import root_product
from jaxinv._numerics.precision import as_dtype, call_in
from jaxinv._numerics.vectors import flatten, unflatten
from jaxinv.errors import InvalidInput
from jaxinv.jacobians.fisher_information import whitened
from jaxinv.jacobians.problem import problem_of
from jaxinv.rescaling.group import RescalingGroup, checked_leaves, rescale, tangent_vectors
from jaxinv.rescaling.units import units_of
from jaxinv.typing import Array, DTypeLike, Inputs, Likelihood, Network, Outputs, Params, PyTree

Convention = Literal["lift", "slice", "pseudo-determinant"]
LogDensity = Callable[[Params], Array]
"""A function of parameters to a scalar, -inf where the density is 0."""
OrbitCoordinate = Callable[[Params], Array]
"""u(w) of shape (dim,), with u(rescale(group, w, a)) = u(w) + a."""

_EXACT = lax.Precision.HIGHEST
# U T = I must hold this well, T the tangents of the orbit: relative to a rounding of float32.
_EQUIVARIANT = 1e-3


def log_incoming_norms(group: RescalingGroup) -> OrbitCoordinate:
    """The orbit coordinate of the normalised gauge: w = rescale(group, normalize(w), u(w)).

    In a network of one hidden layer u_j = log ‖incoming weights of unit j‖; deeper in, the norm is
    that after the units before have been normalised. Differentiable, unlike `jaxinv.normalize`.

    Args:
        group: as `jaxinv.rescaling_group` returns it, outside `jit`.

    Returns:
        A function of params to u, (dim,). 0 for a unit without any incoming weight but 0.

    Raises:
        InvalidInput: if a weight is an incoming weight of several units; when called, if params do
            not fit the group.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.bayes import log_incoming_norms
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = [jnp.array([[3.0], [4.0]]), jnp.ones((1, 1))]
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], w, jnp.ones((1, 2)))
        >>> print(jnp.exp(log_incoming_norms(group)(w)).round(4))
        [5.]
    """
    units = units_of(group)

    def coordinate(params: Params) -> Array:
        leaves = checked_leaves(group, params, "params")
        dtype = jnp.result_type(*leaves)
        params = as_dtype(params, dtype)

        def step(u: Array, _: object) -> tuple[Array, None]:
            moved = jax.tree.leaves(rescale(group, params, -u))
            squares = units.sums([leaf**2 for leaf in moved])
            return u + jnp.log(jnp.where(squares > 0, squares, 1)) / 2, None

        # A round puts right all units whose sources are right.
        return lax.scan(step, jnp.zeros(group.dim, dtype), None, length=units.depth)[0]

    return coordinate


def jeffreys_log_prior(
    fn: Network,
    group: RescalingGroup | None,
    x: Inputs,
    likelihood: Likelihood,
    *,
    convention: Convention = "lift",
    coordinate: OrbitCoordinate | None = None,
    orbit_scale: float = 0.5,
    chunk: int = 64,
    dtype: DTypeLike = np.float64,
) -> LogDensity:
    """log of Jeffreys' density of a network's parameters, modulo its rescalings.

    Args:
        fn: network `fn(params, x) -> y`, differentiable.
        group: its rescalings, as `jaxinv.rescaling_group(fn, ...)` returns them; or None if it has
            none, and then this is ½ log det F.
        x: the inputs that define the Fisher information F = (1/n) Σ_x JᵀΛJ.
        likelihood: see `jaxinv.jacobians.fisher`. A Gaussian variance other than 1 changes a
            constant alone.
        convention: see the module.
        coordinate: the orbit coordinate u(w), by default `log_incoming_norms(group)`.
        orbit_scale: standard deviation of each u_j under ν. It changes nothing but how a sampler
            moves along the orbits.
        chunk: examples at a time.
        dtype: precision inside, float64 in a scope of its own, or float32, which takes a Fisher
            information of condition above 10⁶ for singular.

    Returns:
        `log_density(params)`, a scalar in the dtype of params, known up to no constant but that of
        F: -inf where F has null directions besides the orbit to rounding (dead units, say), with a
        gradient of 0 there. It jits, vmaps and has gradients; second derivatives only where params
        have `dtype`.

    Raises:
        InvalidInput: for an unknown likelihood, convention or dtype, orbit_scale <= 0; when called,
            for bad params, inputs too few for F to have full rank, or a coordinate of which
            ∂u/∂w · T is not the identity (NaN instead where params are traced).

    Notes:
        A value costs 2·n·out·d² + d³/3 flops and d² + chunk·out·d numbers of memory, its gradient
        a few times as much.

    References:
        Jeffreys, "An invariant form for the prior probability in estimation problems", Proc. Royal
        Society A 186, 1946.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.bayes import jeffreys_log_prior
        >>> from jaxinv.rescaling import rescaling_group
        >>> def product(w, x):  # y = x w₁w₂
        ...     return (x @ w[0]) @ w[1]
        >>> w, x = [jnp.array([[2.0]]), jnp.array([[3.0]])], jnp.ones((1, 1))
        >>> group = rescaling_group(product, w, x)
        >>> on_slice = jeffreys_log_prior(product, group, x, "gaussian", convention="slice")
        >>> print(jnp.exp(on_slice(w)).round(4))  # |w₁|: the step of w₁w₂ where w₁ is fixed
        2.0
    """
    whitened(fn, likelihood)
    one_of("convention", convention, get_args(Convention))
    _check_scale("orbit_scale", orbit_scale)
    dtype = jnp.dtype(dtype)
    one_of("dtype", dtype.name, ("float32", "float64"))
    given = coordinate is not None
    if group is not None and group.dim == 0:
        group = None
    if group is not None and coordinate is None:
        coordinate = log_incoming_norms(group)

    def value(params: Params, x: Inputs) -> Array:
        w = flatten(params, dtype)
        shapes, dim = problem_of(fn, params, x), 0 if group is None else group.dim
        if shapes.rows < shapes.parameters - dim:
            raise InvalidInput(
                f"{shapes.examples} inputs with {shapes.outputs} outputs each leave the Fisher "
                f"information of {shapes.parameters} parameters with {dim} rescalings singular: "
                "Jeffreys' density is 0 everywhere. Pass more inputs."
            )
        information = _information(fn, params, x, likelihood, chunk)
        if group is None or coordinate is None:
            return log_det(information) / 2
        T = tangent_vectors(group, params, dense=True)
        if convention == "pseudo-determinant":
            extended = _log_det_extended(information, T.T, w)
            return (extended - log_det(jnp.matmul(T.T, T, precision=_EXACT))) / 2
        u, U = _value_and_rows(coordinate, params)
        extended = _log_det_extended(information, U, w) / 2
        if given:
            off = jnp.abs(jnp.matmul(U, T, precision=_EXACT) - jnp.eye(group.dim, dtype=dtype))
            _refuse(off.max())
            extended = jnp.where(off.max() <= _EQUIVARIANT, extended, jnp.nan)
        if convention == "slice":
            return extended - log_det(jnp.matmul(U, U.T, precision=_EXACT)) / 2
        return (
            extended + jax.scipy.stats.norm.logpdf(u, scale=jnp.asarray(orbit_scale, dtype)).sum()
        )

    return _in_dtype(value, x, dtype)


def _refuse(off: Array) -> None:
    if not isinstance(off, jax.core.Tracer) and not off <= _EQUIVARIANT:
        raise InvalidInput(
            "coordinate is not an orbit coordinate: u(rescale(group, w, a)) must be u(w) + a, but "
            f"∂u/∂w times the tangents of the orbit is off the identity by {float(off):.2g}."
        )


def _in_dtype(
    value: Callable[[Params, Inputs], Array],
    x: Inputs,
    dtype: DTypeLike,
) -> LogDensity:
    """value(params, x) in `dtype`, with a gradient where params have another."""

    def log_density(params: Params) -> Array:
        check_params(params)
        leaves = jax.tree.leaves(params)
        own, dtypes = jnp.result_type(*leaves), [leaf.dtype for leaf in leaves]
        if own == dtype:
            return value(params, as_dtype(x, dtype))

        def rounded(params: Params, x: Inputs) -> Array:
            return value(params, x).astype(own)

        def slopes(params: Params, x: Inputs) -> tuple[Array, list[Array]]:
            found, slope = jax.value_and_grad(value)(params, x)
            parts = zip(jax.tree.leaves(slope), dtypes, strict=True)
            return found.astype(own), [g.astype(dtype) for g, dtype in parts]

        @jax.custom_jvp
        def scoped(params: Params) -> Array:
            return call_in(dtype, rounded, params, x)

        @scoped.defjvp
        def _jvp(primals: tuple[Params], tangents: tuple[Params]) -> tuple[Array, Array]:
            # Reverse mode through the scope's own vmap rule does not exist: the gradient is part
            # of what is computed inside.
            found, slope = call_in(dtype, slopes, *primals, x)
            products = [
                jnp.vdot(g, t).astype(own)
                for g, t in zip(slope, jax.tree.leaves(tangents[0]), strict=True)
            ]
            return found, sum(products[1:], products[0])

        return scoped(params)

    return log_density


def _information(fn: Network, params: Params, x: Inputs, likelihood: str, chunk: int) -> Array:
    """F, differentiable: `jaxinv.jacobians.fisher` holds the root of Λ fixed, here it moves with
    params.
    """
    shapes = problem_of(fn, params, x)
    dtype, d = shapes.dtype, shapes.parameters
    w = flatten(params, dtype)

    def rows(x: Inputs) -> Array:
        def outputs(w: Array) -> Outputs:
            return fn(unflatten(w, params), x)

        ys = outputs(w)
        size = sum(y.size for y in jax.tree.leaves(ys))
        slopes = (jax.jacrev if size < d else jax.jacfwd)(outputs)(w)
        blocks = []
        for y, slope in zip(jax.tree.leaves(ys), jax.tree.leaves(slopes), strict=True):
            root = jax.vmap(lambda v, y=y: root_product(y, v, likelihood), -1, -1)(slope)
            blocks.append(root.reshape(-1, d))
        return jnp.concatenate(blocks).astype(dtype)

    def gram(x: Inputs) -> Array:
        one = lambda example: rows(jax.tree.map(lambda a: a[None], example))  # noqa: E731
        found = (jax.vmap(one)(x) if shapes.apart else rows(x)).reshape(-1, d)
        return jnp.matmul(found.T, found, precision=_EXACT)

    whole = shapes.examples // chunk if shapes.apart else 0
    if whole == 0 or shapes.examples == chunk:
        return gram(x) / shapes.examples
    chunks = jax.tree.map(lambda a: a[: whole * chunk].reshape(whole, chunk, *a.shape[1:]), x)
    # Reverse mode would keep the rows of all chunks.
    add = jax.checkpoint(lambda total, x: (total + gram(x), None))
    total, _ = lax.scan(add, jnp.zeros((d, d), dtype), chunks)
    if whole * chunk < shapes.examples:
        total = total + gram(jax.tree.map(lambda a: a[whole * chunk :], x))
    return total / shapes.examples


def _value_and_rows(coordinate: OrbitCoordinate, params: Params) -> tuple[Array, Array]:
    """u and U = ∂u/∂w, (dim, d)."""
    w, unravel = ravel_pytree(params)
    u = coordinate(params)
    return u, jax.jacrev(lambda w: coordinate(unravel(w)))(w)


def _log_det_extended(information: Array, rows: Array, w: Array) -> Array:
    """log det(F + RᵀR) for h rows R.

    Scaled so that RᵀR is of the size of F, measured as a rescaling leaves it, by log-parameters:
    det(F + c²RᵀR) = c^{2h} det(F + RᵀR) where F has rank d − h.
    """
    diagonal, own = jnp.diagonal(information), (rows**2).sum(0)
    squares = lax.stop_gradient(w) ** 2
    sizes = [lax.stop_gradient((squares * a).sum()) for a in (diagonal, own)]
    ratio = sizes[0] / sizes[1]
    c = jnp.where((ratio > 0) & jnp.isfinite(ratio), ratio, 1)
    found = log_det(information + c * jnp.matmul(rows.T, rows, precision=_EXACT))
    return found - len(rows) * jnp.log(c)


# --- the rest of a posterior ----------------------------------------------------------


def gaussian_log_prior(scale: float = 1.0) -> LogDensity:
    """Independent normal parameters of standard deviation `scale`: what weight decay stands for.

    It depends on the parametrisation: the same law on another network's parameters, rescaled or
    normalised, say, is another law on functions.

    Args:
        scale: standard deviation.

    Returns:
        `log_density(params)`, normalised.

    Raises:
        InvalidInput: for scale <= 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.bayes import gaussian_log_prior
        >>> print(f"{gaussian_log_prior()(jnp.zeros(2)):.4f}")  # −log 2π
        -1.8379
    """
    _check_scale("scale", scale)

    def log_density(params: Params) -> Array:
        logs = [
            jax.scipy.stats.norm.logpdf(leaf, scale=jnp.asarray(scale, leaf.dtype)).sum()
            for leaf in map(jnp.asarray, jax.tree.leaves(params))
        ]
        return sum(logs[1:], logs[0])

    return log_density


def log_likelihood(
    fn: Network, x: Inputs, y: Array, likelihood: Likelihood, *, noise_scale: float = 1.0
) -> LogDensity:
    """Σ_examples log p(y | fn(params, x)).

    Args:
        fn: network with one array as output.
        x, y: n examples. y: real numbers of the shape of the outputs for "gaussian"; class numbers
            (n,) for "softmax"; 0 or 1 for "bernoulli" and counts for "poisson", of the outputs'
            shape.
        likelihood: see `jaxinv.jacobians.fisher`.
        noise_scale: standard deviation, for "gaussian".

    Returns:
        `log_density(params)`; "poisson" lacks the constant −Σ log y!.

    Raises:
        InvalidInput: for an unknown likelihood, noise_scale <= 0; when called, for y that does not
            fit the outputs.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.bayes import log_likelihood
        >>> f = log_likelihood(lambda w, x: x * w, jnp.ones((1, 1)), jnp.array([1]), "bernoulli")
        >>> try:
        ...     f(jnp.zeros(1))
        ... except ValueError as error:
        ...     print(error)
        y has shape (1,), but outputs of shape (1, 1) need (1, 1).
    """
    whitened(fn, likelihood)
    _check_scale("noise_scale", noise_scale)
    y = jnp.asarray(y)

    def log_density(params: Params) -> Array:
        out = fn(params, x)
        wanted = out.shape[:-1] if likelihood == "softmax" else out.shape
        if y.shape != wanted:
            raise InvalidInput(
                f"y has shape {y.shape}, but outputs of shape {out.shape} need {wanted}."
            )
        if likelihood == "softmax":
            chosen = jnp.take_along_axis(jax.nn.log_softmax(out), y[..., None], -1)
            return chosen.sum()
        target = y.astype(out.dtype)
        if likelihood == "gaussian":
            scale = jnp.asarray(noise_scale, out.dtype)
            return jax.scipy.stats.norm.logpdf(target, out, scale).sum()
        if likelihood == "bernoulli":
            return (target * out - jax.nn.softplus(out)).sum()
        return (target * out - jnp.exp(out)).sum()

    return log_density


def log_posterior(
    fn: Network,
    x: Inputs,
    y: Array,
    likelihood: Likelihood,
    log_prior: LogDensity,
    *,
    noise_scale: float = 1.0,
) -> LogDensity:
    """log p(params | data) up to a constant: log likelihood + log prior.

    Args:
        fn, x, y, likelihood, noise_scale: as for `log_likelihood`.
        log_prior: for example `jeffreys_log_prior(...)` or `gaussian_log_prior(...)`.

    Returns:
        `log_density(params)`.

    Raises:
        InvalidInput: as for `log_likelihood`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.bayes import gaussian_log_prior, log_posterior
        >>> log_density = log_posterior(lambda w, x: x * w, jnp.ones((1, 1)), jnp.ones((1, 1)),
        ...                             "gaussian", gaussian_log_prior())
        >>> print(jax.grad(log_density)(jnp.array([0.5])))  # the mean of two normal laws
        [0.]
    """
    fit = log_likelihood(fn, x, y, likelihood, noise_scale=noise_scale)
    return lambda params: fit(params) + log_prior(params)


def posterior_predictive(
    fn: Network, params: PyTree, x: Inputs, likelihood: Likelihood, *, batch_size: int = 256
) -> Outputs:
    """E[y | params, x] for every draw of the parameters; its mean is the predictive mean.

    Args:
        fn: network.
        params: draws, leaves (chains, draws, ...).
        x: inputs.
        likelihood: see `jaxinv.jacobians.fisher`: "softmax" gives class probabilities.
        batch_size: draws at a time.

    Returns:
        Outputs with the two axes in front, (chains, draws, n, ...).

    Raises:
        InvalidInput: for an unknown likelihood.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.bayes import posterior_predictive
        >>> draws = jnp.zeros((4, 10, 2, 3))
        >>> found = posterior_predictive(lambda w, x: x @ w, draws, jnp.ones((1, 2)), "softmax")
        >>> found.shape, round(float(found[0, 0, 0, 0]), 4)
        ((4, 10, 1, 3), 0.3333)
    """
    whitened(fn, likelihood)
    means: dict[str, Callable[[Array], Array]] = {
        "gaussian": lambda y: y,
        "softmax": lambda y: jax.nn.softmax(y, -1),
        "bernoulli": jax.nn.sigmoid,
        "poisson": jnp.exp,
    }
    lead = jax.tree.leaves(params)[0].shape[:2]
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), params)
    found = lax.map(
        lambda w: jax.tree.map(means[likelihood], fn(w, x)), flat, batch_size=batch_size
    )
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), found)


def _check_scale(name: str, scale: object) -> None:
    real(name, scale, lambda s: 0 < s < float("inf"), "positive and finite")
