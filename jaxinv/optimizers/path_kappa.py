"""Optimizers that are invariant to node-wise rescaling, as optax gradient transformations.

Path-SGD is steepest descent in the geometry of the path norm, with a diagonal approximation:

    Δw_e = −η · κ_e(w)^{−2/p} · ∂L/∂w_e,      κ_e = Σ_{paths∋e} Π_{e'∈path∖e} |w_e'|^p.

Multiply a unit's incoming weights by a and divide its outgoing weights by a: κ_e of an incoming
weight is divided by a^p and its gradient by a, so Δw_e is multiplied by a, as w_e is. The function
that is learnt is the same from every start on the orbit, with momentum and schedules too.
"""

from __future__ import annotations

from typing import Literal

import jax
import optax

from jaxinv._checks import (
    abstract_batch_of_one,
    check_alpha,
    check_key,
    check_network,
    check_probes,
)
from jaxinv._numerics.scaled import Scaled
from jaxinv.errors import InvalidInput
from jaxinv.optimizers.descent import descent
from jaxinv.optimizers.kappa_preconditioner import check_options, scale_by
from jaxinv.paths.data_dependent import scaled_data_kappa
from jaxinv.paths.norms import scaled_kappa
from jaxinv.typing import Array, Inputs, Network, Params


def scale_by_path_kappa(
    fn: Network,
    x: Inputs,
    *,
    p: float = 2.0,
    every: int = 1,
    eps: float = 0.0,
    zero_kappa: Literal["freeze", "pass"] = "freeze",
) -> optax.GradientTransformationExtraArgs:
    """Divide each gradient by κ_e^{2/p}: the core of Path-SGD.

    u_e = g_e / (κ_e(w)^{2/p} + eps), with κ as in `jaxinv.path_kappa`. One forward and one backward
    pass on a batch of one per refresh of κ.

    Args:
        fn: the network `fn(params, x) -> y`, deterministic (no dropout, frozen normalisation).
        x: inputs with a leading batch axis (else see `jaxinv.batch_first`); only shapes and dtypes
            are kept.
        p: exponent of the path norm, a fixed real number >= 1.
        every: recompute κ at every this many updates; in between the last one is used. Between
            refreshes the update is invariant only to first order, since κ lags behind w.
        eps: added to κ^{2/p}. Anything but 0 gives up exact invariance.
        zero_kappa: what to do where κ_e = 0, that is, for weights on no path of non-zero length
            (dead units, unused leaves, a PReLU slope below 1): `"freeze"` gives a zero update,
            `"pass"` the plain gradient.

    Returns:
        An `optax.GradientTransformationExtraArgs`. `update` needs `params`. Extra arguments are
        ignored, except `full_params`: inside `optax.masked` or `optax.partition` these are all
        parameters, on which κ depends (see `pass_full_params`).

    Raises:
        InvalidInput: bad options; at `update`, params missing, masked, or not floating point.
        UnsupportedOperation: at `update`, for a network that path semantics do not cover.

    References:
        Neyshabur, Salakhutdinov, Srebro, "Path-SGD: path-normalized optimization in deep neural
        networks", NeurIPS 2015 (arXiv:1506.02617), eq. 7 and Algorithm 1.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxinv import scale_by_path_kappa
        >>> def net(w, x):
        ...     return jax.nn.relu(x @ w[0]) @ w[1]
        >>> w = [jnp.array([[2.0]]), jnp.array([[3.0]])]
        >>> tx = optax.chain(scale_by_path_kappa(net, jnp.zeros((1, 1))), optax.scale(-0.1))
        >>> gradients = [jnp.array([[9.0]]), jnp.array([[4.0]])]
        >>> updates, _ = tx.update(gradients, tx.init(w), w)
        >>> [round(u.item(), 6) for u in updates]  # −0.1·9/3² and −0.1·4/2²
        [-0.1, -0.1]
    """
    check_network(fn)
    shapes = abstract_batch_of_one(x)
    check_options(p, every, zero_kappa)

    def kappas_of(params: Params, count: Array, batch: Inputs | None) -> list[Scaled]:
        del count, batch
        return scaled_kappa(fn, params, shapes, float(p), streaming=True)

    return scale_by(kappas_of, float(p), every, eps, zero_kappa)


def path_sgd(
    learning_rate: optax.ScalarOrSchedule,
    fn: Network,
    x: Inputs,
    *,
    momentum: float | None = None,
    nesterov: bool = False,
    p: float = 2.0,
) -> optax.GradientTransformationExtraArgs:
    """Path-SGD: Δw_e = −η/κ_e^{2/p} · ∂L/∂w_e, optionally with momentum.

    A drop-in for `optax.sgd` whose learnt function does not depend on how the weights are
    distributed between the layers. The momentum is a running sum of *preconditioned* gradients; it
    transforms like the weights, so the invariance is kept.

    Args:
        learning_rate: η, a number or a schedule.
        fn, x, p: see `scale_by_path_kappa`, whose other options are for chains: `optax.chain(
            scale_by_path_kappa(fn, x, every=10), optax.scale_by_learning_rate(0.1))`.
        momentum: decay of the running sum, or None for none.
        nesterov: use Nesterov's form of momentum.

    Returns:
        An `optax.GradientTransformationExtraArgs`; the state is that of the chained parts.

    Raises:
        InvalidInput, UnsupportedOperation: as for `scale_by_path_kappa`.

    Notes:
        `optax.inject_hyperparams` turns every number and function into a hyperparameter; give it
        the learning rate alone: `optax.inject_hyperparams(lambda learning_rate:
        path_sgd(learning_rate, fn, x))(learning_rate=0.1)`.

    References:
        Neyshabur, Salakhutdinov, Srebro, NeurIPS 2015 (arXiv:1506.02617), Algorithm 1.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxinv import path_sgd
        >>> from jaxinv.networks import init_mlp, mlp
        >>> params = init_mlp(jax.random.key(0), (8, 16, 3))
        >>> x, y = jax.random.normal(jax.random.key(1), (32, 8)), jnp.arange(32) % 3
        >>> def loss(params):
        ...     logits = mlp(params, x)
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        >>> tx = path_sgd(0.5, mlp, x)
        >>> state, before = tx.init(params), loss(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(20):
        ...     params, state = step(params, state)
        >>> bool(loss(params) < before)
        True
    """
    return descent(scale_by_path_kappa(fn, x, p=p), learning_rate, momentum, nesterov)


def scale_by_data_dependent_path_kappa(
    fn: Network,
    *,
    alpha: float,
    centered: bool = False,
    probes: int | None = 1,
    key: Array | None = None,
    every: int = 1,
    eps: float = 0.0,
    zero_kappa: Literal["freeze", "pass"] = "freeze",
) -> optax.GradientTransformationExtraArgs:
    """Divide each gradient by the data-dependent κ_e: the core of `data_dependent_path_sgd`.

    u_e = g_e / (κ_e(w) + eps), with κ as in `jaxinv.data_dependent_path_kappa` on the batch.

    Args:
        fn: the network `fn(params, x) -> y`, deterministic.
        alpha, centered, probes: see `data_dependent_path_kappa`. alpha=0 is
            `scale_by_path_kappa`, alpha=1 the diagonal of the Gaussian Fisher information.
        key: PRNG key of the random signs, by default `jax.random.key(0)`. At update t it is
            `fold_in(key, t)`.
        every, eps, zero_kappa: see `scale_by_path_kappa`.

    Returns:
        An `optax.GradientTransformationExtraArgs`. `update` needs `params` and `batch`, the inputs
        x of `fn`; other extra arguments are ignored, except `full_params` (`pass_full_params`).

    Raises:
        InvalidInput: bad options; at `update`, params or batch missing, or as for
            `data_dependent_path_kappa`.
        UnsupportedOperation: at `update`, as for `data_dependent_path_kappa`.

    Notes:
        Rescalings are respected for every alpha: κ_e transforms like 1/w_e², random signs included.

    References:
        Neyshabur, Tomioka, Salakhutdinov, Srebro, ICLR 2016 (arXiv:1511.06747), §4.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import scale_by_data_dependent_path_kappa
        >>> x, w = jnp.array([[1.0, 3.0], [1.0, 1.0]]), jnp.ones((2, 1))
        >>> tx = scale_by_data_dependent_path_kappa(lambda w, x: x @ w, alpha=1.0)
        >>> updates, _ = tx.update(jnp.array([[1.0], [1.0]]), tx.init(w), w, batch=x)
        >>> updates.ravel().tolist()  # κ = E[x²] = (1, 5)
        [1.0, 0.20000000298023224]
    """
    check_network(fn)
    check_alpha(alpha)
    check_probes(probes)
    check_options(2.0, every, zero_kappa)
    start = jax.random.key(0) if key is None else check_key("key", key)

    def kappas_of(params: Params, count: Array, batch: Inputs | None) -> list[Scaled]:
        if batch is None:
            raise InvalidInput(_NEEDS_BATCH)
        signs = jax.random.fold_in(start, count)
        return scaled_data_kappa(
            fn, params, batch, alpha=alpha, centered=centered, probes=probes, key=signs
        )

    return scale_by(kappas_of, 2.0, every, eps, zero_kappa)


def data_dependent_path_sgd(
    learning_rate: optax.ScalarOrSchedule,
    fn: Network,
    *,
    alpha: float,
    momentum: float | None = None,
    nesterov: bool = False,
    centered: bool = False,
    probes: int | None = 1,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Path-SGD by the data-dependent κ: Δw_e = −η/κ_e · ∂L/∂w_e, optionally with momentum.

    Args:
        learning_rate: η, a number or a schedule.
        fn, alpha, centered, probes, key: see `scale_by_data_dependent_path_kappa`, whose other
            options are for chains.
        momentum, nesterov: see `path_sgd`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; call `update(gradient, state, params, batch=x)`.

    Raises:
        InvalidInput, UnsupportedOperation: as for `scale_by_data_dependent_path_kappa`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import data_dependent_path_sgd
        >>> x, w = jnp.array([[1.0, 3.0], [1.0, 1.0]]), jnp.ones((2, 1))
        >>> tx = data_dependent_path_sgd(0.5, lambda w, x: x @ w, alpha=1.0)
        >>> updates, _ = tx.update(jnp.array([[1.0], [10.0]]), tx.init(w), w, batch=x)
        >>> print(updates.round(3).ravel())  # −0.5·1/1 and −0.5·10/5
        [-0.5 -1. ]
    """
    precondition = scale_by_data_dependent_path_kappa(
        fn, alpha=alpha, centered=centered, probes=probes, key=key
    )
    return descent(precondition, learning_rate, momentum, nesterov)


_NEEDS_BATCH = (
    "The data-dependent κ needs `batch`, the inputs x of fn over which moments are taken. "
    "Call update(gradients, state, params, batch=x)."
)
