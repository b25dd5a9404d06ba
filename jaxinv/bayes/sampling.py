"""Markov chains for posteriors of networks: many under `vmap`, in blocks that survive a crash.

NUTS is blackjax's and the diagnostics are arviz's: `pip install 'jaxinv[bayes]'`. What is
added is what a long run needs. Chains run side by side; draw i of chain c has a random key that
depends on the seed, c and i alone; after each block of draws the block and the state are written to
a file of their own, so an interrupted run goes on with the same draws, bit for bit, and a finished
one can be lengthened.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._checks import check_params, integer, real
from jaxinv._extras import require
from jaxinv.bayes import checkpoint as _checkpoint
from jaxinv.bayes.langevin import langevin_step, standard_normal
from jaxinv.errors import InvalidInput
from jaxinv.typing import Array, ArrayLike, Params, PyTree

LogDensity = Callable[[Params], Array]
# (params, key) -> an estimate of the gradient of the log density, like params
GradientEstimate = Callable[[Params, Array], PyTree]


class Samples(NamedTuple):
    """Draws of several chains.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.bayes import sample_nuts
        >>> found = sample_nuts(lambda w: -(w**2).sum() / 2, jnp.zeros((2, 3)), jax.random.key(0),
        ...                     num_warmup=20, num_samples=10)
        >>> found.params.shape, found.log_density.shape, found.step_size.shape
        ((2, 10, 3), (2, 10), (2,))
    """

    params: PyTree  # leaves (chains, draws, ...)
    log_density: Array  # (chains, draws); NaN from SGLD, which never computes it
    acceptance: Array  # (chains, draws): mean acceptance of each trajectory; 1 from SGLD
    diverging: Array  # bool (chains, draws): the trajectory left the region where it is accurate
    step_size: Array  # (chains,), all equal


class Diagnostics(NamedTuple):
    """What chains say about the mean of each of several quantities, as arrays of their shape.

    Example:
        >>> import numpy as np
        >>> from jaxinv.bayes import diagnostics
        >>> found = diagnostics(np.random.default_rng(0).normal(size=(4, 500, 2)))
        >>> found.mean.shape, bool((found.r_hat < 1.01).all())
        ((2,), True)
    """

    mean: np.ndarray
    standard_error: np.ndarray  # Monte-Carlo error of the mean, from the effective sample size
    ess: np.ndarray  # bulk effective sample size
    r_hat: np.ndarray  # rank-normalised split R-hat


def _library(name: str) -> ModuleType:
    with warnings.catch_warnings():
        # arviz announces its next major version at import.
        warnings.simplefilter("ignore", FutureWarning)
        return require(name, "bayes")


def dispersed_starts(
    log_density: LogDensity,
    params: Params,
    key: Array,
    num_chains: int,
    *,
    scale: float = 0.1,
    attempts: int = 20,
) -> Params:
    """Starts for chains around params: normal, of standard deviation `scale`, of density > 0.

    Args:
        log_density: of params.
        params: the centre, such as a maximum of the posterior.
        key: a jax random key.
        num_chains: how many.
        scale: standard deviation of every parameter.
        attempts: draws per chain, of which the first of finite density is taken.

    Returns:
        A pytree with leaves (num_chains, ...).

    Raises:
        InvalidInput: for bad params; if all draws of a chain have density 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.bayes import dispersed_starts
        >>> starts = dispersed_starts(
        ...     lambda w: jnp.where(w > 0, -w, -jnp.inf), jnp.ones(()), jax.random.key(0), 4)
        >>> starts.shape, bool((starts > 0).all())
        ((4,), True)
    """
    check_params(params)

    def one(key: Array) -> tuple[Params, Array]:
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        moved = [
            w + jnp.asarray(scale, w.dtype) * jax.random.normal(k, (attempts, *w.shape), w.dtype)
            for w, k in zip(leaves, keys, strict=True)
        ]
        candidates = jax.tree.unflatten(tree, moved)
        possible = jnp.isfinite(jax.vmap(log_density)(candidates))
        first = jnp.argmax(possible)
        return jax.tree.map(lambda a: a[first], candidates), possible.any()

    starts, found = jax.jit(jax.vmap(one))(jax.random.split(key, num_chains))
    if not found.all():
        raise InvalidInput(
            f"{int((~found).sum())} of {num_chains} chains found no start of density > 0 in "
            f"{attempts} draws of scale {scale} around params."
        )
    return starts


def sample_nuts(
    log_density: LogDensity,
    params: Params,
    key: Array,
    *,
    num_samples: int,
    num_warmup: int = 1000,
    target_acceptance: float = 0.8,
    dense_mass: bool = False,
    max_doublings: int = 10,
    block: int = 500,
    checkpoint: str | Path | None = None,
) -> Samples:
    """The no-U-turn sampler, with one step size and one mass matrix adapted by all chains together.

    Args:
        log_density: of params, up to a constant; jit, vmap and grad must work on it.
        params: starts, leaves (chains, ...); see `dispersed_starts`.
        key: a jax random key.
        num_samples: draws kept per chain.
        num_warmup: steps of adaptation before, each chain by itself; then the geometric mean of the
            step sizes and the mean of the (inverse) mass matrices serve all.
        target_acceptance: nearer to 1 for smaller steps.
        dense_mass: adapt a full mass matrix rather than its diagonal.
        max_doublings: a trajectory has at most 2^max_doublings steps.
        block: draws between two checkpoints.
        checkpoint: a directory for the state after the warm-up and after every block. If it holds
            some already, the run goes on from there; num_samples may have grown.

    Returns:
        `Samples`.

    Raises:
        InvalidInput: for bad params or sizes, a start of density 0, and for a checkpoint that is
            damaged or of another log density, start, key or setting.
        MissingExtra: without blackjax.

    Notes:
        On densities with jumps (the Fisher information of ReLU networks has one wherever an
        example's activation pattern changes) trajectories are accepted or not as on others, so the
        law is right, but steps across are rejected more. There a `target_acceptance` above 0.8
        makes steps tiny; a dense mass matrix, and a small `orbit_scale` of
        `jaxinv.bayes.jeffreys_log_prior`, help more. `diverging` counts attempts to enter
        regions of density 0, too.

    References:
        Hoffman, Gelman, "The No-U-Turn sampler", JMLR 15, 2014.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.bayes import sample_nuts
        >>> found = sample_nuts(lambda w: -((w - 3) ** 2).sum() / 2, jnp.zeros((4, 1)),
        ...                     jax.random.key(0), num_warmup=200, num_samples=500)
        >>> bool(abs(found.params.mean() - 3) < 0.2)
        True
    """
    blackjax = _library("blackjax")
    _check_positive(num_samples=num_samples, num_warmup=num_warmup, block=block)
    starts = _checked_starts(params)
    logs = jax.jit(jax.vmap(log_density))(starts)
    if not jnp.isfinite(logs).all():
        raise InvalidInput(f"starts have log densities {logs.tolist()}: all must be finite.")
    warm_key, run_key = jax.random.split(key)
    chains = len(logs)

    def warm(key: Array, start: Params) -> tuple[PyTree, dict[str, Array]]:
        adaptation = blackjax.window_adaptation(
            blackjax.nuts,
            log_density,
            is_mass_matrix_diagonal=not dense_mass,
            target_acceptance_rate=target_acceptance,
            adaptation_info_fn=blackjax.adaptation.base.get_filter_adapt_info_fn(),
            max_num_doublings=max_doublings,
        )
        (state, found), _ = adaptation.run(key, start, num_warmup)
        return state, {name: found[name] for name in ("step_size", "inverse_mass_matrix")}

    def begin(keys: Array) -> tuple[PyTree, dict[str, Array]]:
        states, found = jax.vmap(warm)(keys, starts)
        # Every chain has estimated the same two numbers, some badly: one whose step is eight times
        # that of the others never moves where the density is rough.
        shared = {
            "step_size": jnp.exp(jnp.log(found["step_size"]).mean(0, keepdims=True)),
            "inverse_mass_matrix": found["inverse_mass_matrix"].mean(0, keepdims=True),
        }
        return states, {k: jnp.broadcast_to(v, found[k].shape) for k, v in shared.items()}

    def step(key: Array, carry: PyTree) -> tuple[PyTree, tuple]:
        state, tuned = carry
        kernel = blackjax.nuts(log_density, max_num_doublings=max_doublings, **tuned)
        state, info = kernel.step(key, state)
        drawn = (state.position, state.logdensity, info.acceptance_rate, info.is_divergent)
        return (state, tuned), drawn

    identity = {
        "sampler": "nuts",
        "num_warmup": num_warmup,
        "target_acceptance": target_acceptance,
        "dense_mass": dense_mass,
        "max_doublings": max_doublings,
    }
    drawn, (_, tuned) = _blocks(
        lambda: jax.jit(begin)(jax.random.split(warm_key, chains)),
        step,
        run_key,
        num_samples,
        1,
        block,
        checkpoint,
        identity | _identity(starts, key, logs, block),
    )
    params, logs, acceptance, diverging = drawn
    return Samples(params, logs, acceptance, diverging, tuned["step_size"])


def sample_sgld(
    gradient: GradientEstimate,
    params: Params,
    key: Array,
    *,
    step_size: float,
    num_samples: int,
    num_warmup: int = 1000,
    thin: int = 1,
    block: int = 500,
    checkpoint: str | Path | None = None,
) -> Samples:
    """Stochastic gradient Langevin dynamics, for large networks: w += ε·ĝ + √(2ε)·noise.

    Args:
        gradient: `gradient(params, key)`, an unbiased estimate of ∇ log density.
        params: starts, leaves (chains, ...).
        key: a jax random key.
        step_size: ε, as in blackjax and in `jaxinv.local_learning_coefficient`; what Welling and
            Teh call ε is twice this. The law that is sampled is off by an amount that tends to 0
            with it: a normal law of variance v gets v/(1 − ε/(2v)).
        num_samples: draws kept per chain.
        num_warmup: draws left out before.
        thin: steps per draw.
        block, checkpoint: as for `sample_nuts`.

    Returns:
        `Samples`.

    Raises:
        InvalidInput: for bad params, sizes or step size, and for a checkpoint that is damaged or of
            another configuration.

    References:
        Welling, Teh, "Bayesian learning via stochastic gradient Langevin dynamics", ICML 2011.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.bayes import sample_sgld
        >>> found = sample_sgld(lambda w, key: 3 - w, jnp.zeros((4, 1)), jax.random.key(0),
        ...                     step_size=0.1, num_warmup=50, num_samples=500)
        >>> bool(abs(found.params.mean() - 3) < 0.5)
        True
    """
    _check_positive(num_samples=num_samples, block=block, thin=thin)
    integer("num_warmup", num_warmup, 0)
    step_size = real("step_size", step_size, lambda s: 0 < s < float("inf"), "positive and finite")
    starts = _checked_starts(params)

    def step(key: Array, w: Params) -> tuple[Params, tuple]:
        noise_key, batch_key = jax.random.split(key)
        w = langevin_step(w, gradient(w, batch_key), standard_normal(noise_key, w), step_size)
        dtype = jnp.result_type(*jax.tree.leaves(w))
        nan, one = jnp.full((), jnp.nan, dtype), jnp.ones((), dtype)
        finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(w)]).all()
        return w, (w, nan, one, ~finite)

    def probe(start: Params) -> Array:
        return jnp.array([jnp.sum(g) for g in jax.tree.leaves(gradient(start, key))]).sum()

    logs = jax.vmap(probe)(starts)
    identity = {"sampler": "sgld", "step_size": step_size, "thin": thin, "num_warmup": num_warmup}
    drawn, _ = _blocks(
        lambda: starts,
        step,
        key,
        num_warmup + num_samples,
        thin,
        block,
        checkpoint,
        identity | _identity(starts, key, logs, block),
    )
    kept, nan, one, diverging = jax.tree.map(lambda a: a[:, num_warmup:], drawn)
    return Samples(kept, nan, one, diverging, jnp.full(len(logs), step_size, one.dtype))


# --- blocks ---------------------------------------------------------------------------


def _blocks(
    begin: Callable[[], PyTree],
    step: Callable[[Array, PyTree], tuple[PyTree, tuple]],
    key: Array,
    num_draws: int,
    thin: int,
    block: int,
    checkpoint: str | Path | None,
    identity: dict[str, object],
) -> tuple[tuple, PyTree]:
    """Draws (chains, num_draws, ...) of `step` from the state `begin()`, block after block."""
    directory = None if checkpoint is None else Path(checkpoint)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)

    def kept(name: str, compute: Callable[[], PyTree]) -> PyTree:
        """What the file holds, or else what is computed now and put there."""
        if directory is None:
            return compute()
        path = directory / f"{name}.npz"
        if path.exists():
            arrays = _checkpoint.load(path, identity)
            leaves, tree = jax.tree.flatten(jax.eval_shape(compute))
            found = [arrays.get(str(i)) for i in range(len(leaves))]
            for a, b in zip(found, leaves, strict=True):
                if a is None or a.shape != b.shape or a.dtype != b.dtype:
                    raise InvalidInput(f"{path}: damaged, arrays are missing or of another shape.")
            return jax.tree.unflatten(tree, [jnp.asarray(a) for a in found])
        value = compute()
        arrays = {str(i): np.asarray(a) for i, a in enumerate(jax.tree.leaves(value))}
        _checkpoint.save(path, arrays, identity)
        return value

    def chain(key: Array, first: Array, carry: PyTree) -> tuple[PyTree, tuple]:
        def move(carry: PyTree, i: Array) -> tuple[PyTree, tuple]:
            return step(jax.random.fold_in(key, i), carry)

        def draw(carry: PyTree, i: Array) -> tuple[PyTree, tuple]:
            if thin > 1:
                start = i * thin
                carry = jax.lax.fori_loop(
                    start, start + thin - 1, lambda j, c: move(c, j)[0], carry
                )
            return move(carry, i * thin + thin - 1)

        return jax.lax.scan(draw, carry, first + jnp.arange(block))

    run = jax.jit(jax.vmap(chain, (0, None, 0)))
    carry = kept("start", begin)
    keys = jax.random.split(key, len(jax.tree.leaves(carry)[0]))
    # Whole blocks always, so that a longer run has the same blocks.
    drawn = []
    for first in range(0, num_draws, block):
        carry, found = kept(f"draws-{first:08d}", partial(run, keys, jnp.asarray(first), carry))
        drawn.append(found)
    joined = jax.tree.map(lambda *a: jnp.concatenate(a, 1)[:, :num_draws], *drawn)
    return joined, carry


def _identity(starts: Params, key: Array, logs: Array, block: int) -> dict[str, object]:
    arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(starts))}
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return {
        "block": block,
        "key": np.asarray(data).tolist(),
        "starts": _checkpoint.digest(arrays),
        # A function has no digest, but two densities hardly agree at all starts.
        "density_at_starts": [float(v) for v in logs],
    }


def _checked_starts(params: Params) -> Params:
    check_params(params)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(sizes) != 1 or () in sizes:
        raise InvalidInput(
            "params must hold a start for every chain: leaves with one common leading axis, not "
            f"{sorted(map(jnp.shape, jax.tree.leaves(params)))}. See dispersed_starts."
        )
    return jax.tree.map(jnp.asarray, params)


def _check_positive(**sizes: object) -> None:
    for name, size in sizes.items():
        integer(name, size, 1)


# --- diagnostics ----------------------------------------------------------------------


def diagnostics(values: ArrayLike) -> Diagnostics:
    """Mean, Monte-Carlo standard error, effective sample size and R-hat of every quantity.

    Parameters of a network have no R-hat that means something: hidden units may be permuted, and
    chains in two orders are the same functions. Pass function values or log densities.

    Args:
        values: (chains, draws, ...), at least 2 chains and 4 draws.

    Returns:
        `Diagnostics`, of arrays (...). A quantity that is the same number in all draws has no error
        and an R-hat of 1.

    Raises:
        InvalidInput: for too few chains or draws.
        MissingExtra: without arviz.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Bürkner, "Rank-normalization, folding, and
        localization: an improved R-hat", Bayesian Analysis 16, 2021.

    Example:
        >>> import numpy as np
        >>> from jaxinv.bayes import diagnostics
        >>> draws = np.random.default_rng(0).normal(size=(4, 500))
        >>> draws[0] += 3  # a chain that is elsewhere
        >>> bool(diagnostics(draws).r_hat > 1.1)
        True
    """
    arviz = _library("arviz")
    values = np.asarray(values, np.float64)
    if values.ndim < 2 or values.shape[0] < 2 or values.shape[1] < 4:
        raise InvalidInput(
            f"values has shape {values.shape}, but needs (chains, draws, ...) with at least 2 "
            "chains and 4 draws."
        )
    shape = values.shape[2:]

    def of(v: np.ndarray) -> tuple[float, ...]:
        if (v == v.flat[0]).all():  # 0/0 for arviz
            return v.flat[0], 0.0, float(v.size), 1.0
        error = arviz.mcse(v, method="mean")
        return v.mean(), float(error), float(arviz.ess(v)), float(arviz.rhat(v))

    found = [of(v) for v in np.moveaxis(values.reshape(*values.shape[:2], -1), -1, 0)]
    return Diagnostics(*(np.array(column).reshape(shape) for column in zip(*found, strict=True)))
