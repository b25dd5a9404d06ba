"""Local learning coefficients, estimated by sampling, and what bounds them.

The learning coefficient λ is the effective dimension of a model around w*, halved: the volume of
{w : L(w) − L(w*) < ε} shrinks like ε^λ. It is d/2 where the Fisher information is regular and less
where parameters are ambiguous. With the posterior tempered to β = 1/log n,

    λ̂ = nβ (E_w^β[L_n(w)] − L_n(w*)),      p(w) ∝ exp(−nβ L_n(w) − γ‖w − w*‖²/2),

which the widely applicable Bayesian information criterion (WBIC) needs as well. Ground truth for
models that are solved is in `jaxinv.bayes.rlct`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxinv import _checks
from jaxinv.bayes.langevin import langevin_step, standard_normal
from jaxinv.errors import InvalidInput
from jaxinv.jacobians.fisher_information import whitened
from jaxinv.ranks.rank import jacobian_rank
from jaxinv.typing import Array, ArrayLike, Constant, Inputs, Likelihood, Network, Params, PyTree

Sampler = Literal["mala", "sgld"]

# What share of proposals MALA accepts where it moves fastest (Roberts, Rosenthal 1998).
_ACCEPTANCE = 0.574


class LocalLearningCoefficient(NamedTuple):
    """An estimate of the local learning coefficient, with what it rests on.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.bayes import local_learning_coefficient
        >>> found = local_learning_coefficient(
        ...     lambda w: (w**2).sum(), jnp.zeros(2), 1000, jax.random.key(0))
        >>> bool(abs(found.value - 1) < 0.1), found.losses.shape  # regular: d/2
        (True, (16, 2000))
    """

    value: Array  # λ̂, the mean over chains; NaN if a chain diverged
    standard_error: Array  # of the mean, from the spread between chains
    wbic: Array  # n·E[L_n], an estimate of the free energy −log of the evidence
    losses: Array  # (chains, steps): L_n along the chains, after the warm-up
    acceptance: Array  # (chains,): share of accepted proposals; 1 for SGLD, which has none
    step_size: Array  # (chains,): as found in the warm-up
    drift: Array  # second half of the chains minus first half, in λ: 0 up to the standard error
    diverged: Array  # (chains,) bool


def local_learning_coefficient(
    loss: Callable[..., Array],
    params: Params,
    num_examples: int,
    key: Array,
    *,
    data: PyTree = None,
    beta: float | None = None,
    localization: float = 1.0,
    sampler: Sampler = "mala",
    batch_size: int | None = None,
    num_chains: int = 16,
    num_steps: int = 2000,
    num_warmup: int = 1000,
    step_size: float | None = None,
    scales: float = 2.0,
) -> LocalLearningCoefficient:
    """Estimate λ̂ = nβ(E[L_n(w)] − L_n(w*)) by chains that start at w*.

    Args:
        loss: `loss(params)`, or `loss(params, data)`, the mean of the negative log-likelihood over
            the examples, or its population value.
        params: w*, a minimum of the loss: a pytree of float arrays.
        num_examples: n; with a population loss any number, the larger, the closer to the limit.
        key: a jax random key.
        data: a pytree of arrays with a leading axis of examples, or None.
        beta: inverse temperature, by default 1/log n.
        localization: γ of the Gaussian around w* that keeps the chains near it.
        sampler: "mala", Metropolis-adjusted Langevin steps on the whole data, without bias; or
            "sgld", stochastic gradients on minibatches, for large data, biased by the step size.
        batch_size: of the minibatches, for "sgld"; their examples are drawn with replacement.
        num_chains, num_steps, num_warmup: chains run side by side under `vmap`.
        step_size: ε of a step w += ε∇log p + (2ε)^{1/2}·noise, as in `jaxinv.bayes.sampling`: for
            "sgld" it is used as given and needed; for "mala" it is where the warm-up starts, by "
            "default
            1/(2(nβ + γ)).
        scales: "mala" draws every step size log-uniformly from this many decades up to ε, since
            singular minima are narrow in some places and wide in others. 0 for one step size.

    Returns:
        A `LocalLearningCoefficient`. Compare its `drift` with its `standard_error`: chains that are
        still on their way out of w* underestimate λ.

    Raises:
        InvalidInput: for bad params, sizes below 1, an unknown sampler, "sgld" without data,
            batch_size or step_size, a loss that is not a scalar.

    Notes:
        λ̂ tends to λ only as fast as 1/log n where the multiplicity m is above 1: expect
        λ − (m − 1)/log n.

    References:
        Lau, Furman, Wang, Murfet, Wei, "The local learning coefficient: a singularity-aware
        complexity measure", AISTATS 2025 (arXiv:2308.12108), §4; Watanabe, "A widely applicable
        Bayesian information criterion", JMLR 14, 2013; Roberts, Tweedie, Bernoulli 2, 1996 (MALA);
        Welling, Teh, ICML 2011 (SGLD).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.bayes import local_learning_coefficient
        >>> def product(w):  # w₁w₂ = 0 has λ = 1/2, and m = 2
        ...     return (w[0] * w[1]) ** 2
        >>> found = local_learning_coefficient(
        ...     product, jnp.zeros(2), 10**6, jax.random.key(0), beta=1.0, num_steps=4000)
        >>> bool(0.35 < found.value < 0.5)
        True
    """
    _checks.check_params(params)
    _check_options(num_examples, num_chains, num_steps, num_warmup, sampler, data, batch_size)
    if sampler == "sgld" and step_size is None:
        raise InvalidInput(
            "sgld needs a step_size: its bias grows with it, so there is no default."
        )
    _check_sampling(beta, localization, step_size, scales)
    beta = 1 / float(np.log(num_examples)) if beta is None else beta
    scale = num_examples * beta
    center, unravel = ravel_pytree(params)

    def value(w: Array, batch: PyTree) -> Array:
        with _checks.calling("loss", unravel(w)):
            found = loss(unravel(w)) if data is None else loss(unravel(w), batch)
        if jnp.shape(found) != ():
            raise InvalidInput(f"loss must return a scalar, not an array of {jnp.shape(found)}.")
        return found.astype(center.dtype)

    def potential(w: Array, batch: PyTree) -> tuple[Array, Array]:
        found = value(w, batch)
        return scale * found + localization * jnp.sum((w - center) ** 2) / 2, found

    at_center = value(center, data)
    if not isinstance(at_center, jax.core.Tracer) and not bool(jnp.isfinite(at_center)):
        raise InvalidInput(f"loss is {at_center} at params, where the chains start.")
    slope = jax.value_and_grad(potential, has_aux=True)
    start = 0.5 / (scale + localization) if step_size is None else step_size
    keys = jax.random.split(key, num_chains)
    if sampler == "mala":
        chain = _mala(lambda w: slope(w, data), center, start, scales, num_warmup, num_steps)
    else:
        assert batch_size is not None
        chain = _sgld(slope, data, batch_size, center, start, num_warmup, num_steps)
    losses, acceptance, steps = jax.jit(jax.vmap(chain))(keys)
    excess = scale * (losses - at_center)
    each, half = excess.mean(axis=1), num_steps // 2
    diverged = ~jnp.isfinite(losses).all(axis=1)
    error = each.std(ddof=1) / num_chains**0.5 if num_chains > 1 else jnp.full((), jnp.nan)
    return LocalLearningCoefficient(
        value=each.mean(),
        standard_error=error,
        wbic=num_examples * losses.mean(),
        losses=losses,
        acceptance=acceptance,
        step_size=steps,
        drift=(excess[:, half:].mean(axis=1) - excess[:, :half].mean(axis=1)).mean(),
        diverged=diverged,
    )


_State = tuple[Array, tuple[Array, Array], Array]  # w, its energy and loss, the gradient


def _mala(
    slope: Callable[..., tuple[tuple[Array, Array], Array]],
    center: Array,
    start: ArrayLike,
    scales: float,
    num_warmup: int,
    num_steps: int,
) -> Callable[[Array], tuple[Array, Array, Array]]:
    """A chain of Langevin proposals, each accepted or not; its step size is found in a warm-up."""
    dtype = center.dtype

    def propose(state: _State, key: Array, log_step: Array) -> tuple[_State, Array]:
        w, (energy, found), gradient = state
        noise_key, accept_key, scale_key = jax.random.split(key, 3)
        # Each size is a kernel that leaves the posterior invariant, and so is their mixture.
        drawn = jax.random.uniform(scale_key, (), dtype) * scales * np.log(10.0)
        step = jnp.exp(log_step - drawn)
        noise = standard_normal(noise_key, w)
        moved = langevin_step(w, -gradient, noise, step)
        (new_energy, new_found), new_gradient = slope(moved)
        back = w - moved + step * new_gradient
        log_ratio = energy - new_energy + jnp.sum(noise**2) / 2 - jnp.sum(back**2) / (4 * step)
        accept_rate = jnp.where(jnp.isfinite(log_ratio), jnp.exp(jnp.minimum(log_ratio, 0)), 0)
        accepted = jax.random.uniform(accept_key, (), dtype) < accept_rate
        new = (moved, (new_energy, new_found), new_gradient)
        return optax.tree.where(accepted, new, state), accept_rate

    def chain(key: Array) -> tuple[Array, Array, Array]:
        warm_key, run_key = jax.random.split(key)
        energy, gradient = slope(center)

        def warm(
            carry: tuple[_State, Array], inputs: tuple[Array, Array]
        ) -> tuple[tuple[_State, Array], None]:
            (state, log_step), (i, key) = carry, inputs
            state, rate = propose(state, key, log_step)
            # Robbins-Monro: the changes tend to 0, their sum does not.
            return (state, log_step + (rate - _ACCEPTANCE) * 2 / (i + 10) ** 0.6), None

        count = jnp.arange(num_warmup, dtype=dtype)
        begin = ((center, energy, gradient), jnp.log(jnp.asarray(start, dtype)))
        inputs = (count, jax.random.split(warm_key, num_warmup))
        (state, log_step), _ = jax.lax.scan(warm, begin, inputs)

        def run(state: _State, key: Array) -> tuple[_State, tuple[Array, Array]]:
            state, rate = propose(state, key, log_step)
            return state, (state[1][1], rate)

        _, (losses, rates) = jax.lax.scan(run, state, jax.random.split(run_key, num_steps))
        return losses, rates.mean(), jnp.exp(log_step)

    return chain


def _sgld(
    slope: Callable[..., tuple[tuple[Array, Array], Array]],
    data: PyTree,
    batch_size: int,
    center: Array,
    step: float,
    num_warmup: int,
    num_steps: int,
) -> Callable[[Array], tuple[Array, Array, Array]]:
    """A chain of Langevin steps on minibatches; the losses are those of the minibatches."""
    count = len(jax.tree.leaves(data)[0])

    def chain(key: Array) -> tuple[Array, Array, Array]:
        def move(w: Array, key: Array) -> tuple[Array, Array]:
            row_key, noise_key = jax.random.split(key)
            rows = jax.random.randint(row_key, (batch_size,), 0, count)
            batch = jax.tree.map(lambda a: a[rows], data)
            (_, found), gradient = slope(w, batch)
            noise = standard_normal(noise_key, w)
            return langevin_step(w, -gradient, noise, step), found

        _, losses = jax.lax.scan(move, center, jax.random.split(key, num_warmup + num_steps))
        one = jnp.ones((), center.dtype)
        return losses[num_warmup:], one, step * one

    return chain


def _check_options(
    num_examples: object,
    num_chains: object,
    num_steps: object,
    num_warmup: object,
    sampler: object,
    data: PyTree,
    batch_size: int | None,
) -> None:
    finite_above_one = lambda n: 1 < n < float("inf")  # noqa: E731
    _checks.real("num_examples", num_examples, finite_above_one, "a number above 1")
    _checks.integer("num_chains", num_chains, 1)
    _checks.integer("num_steps", num_steps, 1)
    _checks.integer("num_warmup", num_warmup, 0)
    _checks.one_of("sampler", sampler, get_args(Sampler))
    if sampler == "sgld":
        if data is None or batch_size is None:
            raise InvalidInput("sgld draws minibatches: pass data and batch_size.")
        _checks.check_usable(data, "data")
        size = len(jax.tree.leaves(data)[0])
        _checks.integer("batch_size", batch_size, 1)
        if not 1 <= batch_size <= size:
            raise InvalidInput(f"batch_size must be from 1 to {size}, not {batch_size}.")


def _check_sampling(beta: object, localization: object, step_size: object, scales: object) -> None:
    def at_least(name: str, value: object, strict: bool) -> None:
        accept = lambda v: (v > 0 if strict else v >= 0) and v < float("inf")  # noqa: E731
        _checks.real(name, value, accept, f"a fixed number {'>' if strict else '>='} 0")

    if beta is not None:
        at_least("beta", beta, True)
    if step_size is not None:
        at_least("step_size", step_size, True)
    at_least("localization", localization, False)
    at_least("scales", scales, False)


class LearningCoefficientBounds(NamedTuple):
    """rank/2 ≤ λ ≤ d/2, with the rank of the Fisher information at w*.

    Example:
        >>> from jaxinv.bayes import LearningCoefficientBounds
        >>> print(LearningCoefficientBounds(rank=2, parameters=3, certain=True))
        1 <= λ <= 3/2 (rank 2 of 3, certain)
    """

    rank: int | Constant  # int: rank of the Fisher information
    parameters: int | Constant  # int: d
    certain: bool | Constant  # bool: is the rank proven from below, see `jaxinv.ranks.rank.Rank`

    def __str__(self) -> str:
        """The bounds, for people."""

        def half(k: int) -> str:
            return f"{k // 2}" if k % 2 == 0 else f"{k}/2"

        rank, count = int(self.rank), int(self.parameters)
        sure = "certain" if self.certain else "not certain"
        return f"{half(rank)} <= λ <= {half(count)} (rank {rank} of {count}, {sure})"


def learning_coefficient_bounds(
    fn: Network, params: Params, x: Inputs, likelihood: Likelihood
) -> LearningCoefficientBounds:
    """Bounds of λ at w*, of a model that realises the truth there: rank/2 ≤ λ ≤ d/2.

    The Fisher information F is the Hessian of K at w*. Along its range K grows quadratically, which
    alone gives rank/2; elsewhere it grows no slower than not at all and, being analytic with
    K ≥ 0, no faster than a quadratic form of all d parameters. Where the parameters that realise
    the truth are a manifold of dimension d − rank around w*, λ = rank/2.

    Args:
        fn, params, x: as for `jaxinv.jacobian_rank`; F is that on the inputs x.
        likelihood: see `jaxinv.jacobians.fisher`.

    Returns:
        A `LearningCoefficientBounds`.

    Raises:
        InvalidInput: as for `jaxinv.jacobian_rank` and `jaxinv.jacobians.whitened`.

    References:
        Watanabe 2009 (see `jaxinv.bayes.rlct`), Theorem 7.2 and Remark 7.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.bayes import learning_coefficient_bounds
        >>> x = jnp.array([[1.0], [2.0]])
        >>> net = lambda w, x: x * w[0] * w[1]
        >>> print(learning_coefficient_bounds(net, jnp.array([2.0, 3.0]), x, "gaussian"))
        1/2 <= λ <= 1 (rank 1 of 2, certain)
        >>> print(learning_coefficient_bounds(net, jnp.zeros(2), x, "gaussian"))
        0 <= λ <= 1 (rank 0 of 2, certain)
    """
    found = jacobian_rank(whitened(fn, likelihood), params, x, method="svd")
    count = optax.tree.size(params)
    return LearningCoefficientBounds(found.rank, count, found.lower == found.rank)
