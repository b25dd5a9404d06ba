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

from jaxinv._checks import abstract_batch_of_one, check_alpha, check_probes
from jaxinv._numerics.scaled import Scaled
from jaxinv.errors import InvalidInput
from jaxinv.optimizers.kappa_preconditioner import NEEDS_PARAMS, check_options, scale_by
from jaxinv.optimizers.masking import Mask
from jaxinv.paths.data_dependent import scaled_data_kappa
from jaxinv.paths.norms import scaled_kappa
from jaxinv.typing import Array, Inputs, Network, Params, PyTree


def scale_by_path_kappa(
    fn: Network,
    x: Inputs,
    *,
    p: float = 2.0,
    every: int = 1,
    eps: float = 0.0,
    zero_kappa: Literal["freeze", "pass"] = "freeze",
    match_gradient_norm: bool = False,
    mask: Mask = None,
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
        match_gradient_norm: scale all updates by the one factor that gives the first update the
            norm of the first gradient, so that a learning rate of SGD carries over. The factor
            depends on the start: trajectories from two points of an orbit then differ in their
            learning rate.
        mask: pytree of bools like params, or a function of params that gives one: gradients of the
            leaves with False pass through unchanged. κ always uses all parameters. To combine with
            `optax.masked` or `optax.partition`, which hide parameters, see `pass_full_params`.

    Returns:
        An `optax.GradientTransformationExtraArgs`. `update` needs `params`. Extra arguments are
        ignored, except `full_params`: the unmasked parameters.

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
    shapes = abstract_batch_of_one(x)
    check_options(p, every, zero_kappa)

    def kappas_of(params: Params, count: Array, batch: Inputs | None) -> list[Scaled]:
        del count, batch
        return scaled_kappa(fn, params, shapes, float(p), streaming=True)

    return scale_by(kappas_of, float(p), every, eps, zero_kappa, match_gradient_norm, mask)


def path_sgd(
    learning_rate: optax.ScalarOrSchedule,
    fn: Network,
    x: Inputs,
    *,
    momentum: float | None = None,
    nesterov: bool = False,
    p: float = 2.0,
    every: int = 1,
    eps: float = 0.0,
    zero_kappa: Literal["freeze", "pass"] = "freeze",
    match_gradient_norm: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Path-SGD: Δw_e = −η/κ_e^{2/p} · ∂L/∂w_e, optionally with momentum.

    A drop-in for `optax.sgd` whose learnt function does not depend on how the weights are
    distributed between the layers. The momentum is a running sum of *preconditioned* gradients; it
    transforms like the weights, so the invariance is kept.

    Args:
        learning_rate: η, a number or a schedule.
        fn, x, p, every, eps, zero_kappa, match_gradient_norm, mask: see `scale_by_path_kappa`.
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
    precondition = scale_by_path_kappa(
        fn,
        x,
        p=p,
        every=every,
        eps=eps,
        zero_kappa=zero_kappa,
        match_gradient_norm=match_gradient_norm,
        mask=mask,
    )
    return _with_momentum(precondition, learning_rate, momentum, nesterov)


def _with_momentum(
    precondition: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None,
    nesterov: bool,
) -> optax.GradientTransformationExtraArgs:
    accumulate = optax.identity() if momentum is None else optax.trace(momentum, nesterov)
    chained = optax.chain(precondition, accumulate, optax.scale_by_learning_rate(learning_rate))
    return optax.with_extra_args_support(chained)


def scale_by_data_dependent_path_kappa(
    fn: Network,
    *,
    alpha: float,
    centered: bool = False,
    probes: int | None = 1,
    seed: int = 0,
    every: int = 1,
    eps: float = 0.0,
    zero_kappa: Literal["freeze", "pass"] = "freeze",
    match_gradient_norm: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide each gradient by the data-dependent κ_e: the core of `data_dependent_path_sgd`.

    u_e = g_e / (κ_e(w) + eps), with κ as in `jaxinv.data_dependent_path_kappa` on the batch.

    Args:
        fn: the network `fn(params, x) -> y`, deterministic.
        alpha, centered, probes: see `data_dependent_path_kappa`. alpha=0 is
            `scale_by_path_kappa`, alpha=1 the diagonal of the Gaussian Fisher information.
        seed: of the random signs, drawn anew at every update.
        every, eps, zero_kappa, match_gradient_norm, mask: see `scale_by_path_kappa`.

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
    check_alpha(alpha)
    check_probes(probes)
    check_options(2.0, every, zero_kappa)

    def kappas_of(params: Params, count: Array, batch: Inputs | None) -> list[Scaled]:
        if batch is None:
            raise InvalidInput(_NEEDS_BATCH)
        key = None if probes is None else jax.random.fold_in(jax.random.key(seed), count)
        return scaled_data_kappa(
            fn,
            params,
            batch,
            alpha=alpha,
            centered=centered,
            probes=probes,
            key=key,
        )

    return scale_by(kappas_of, 2.0, every, eps, zero_kappa, match_gradient_norm, mask)


def data_dependent_path_sgd(
    learning_rate: optax.ScalarOrSchedule,
    fn: Network,
    *,
    alpha: float,
    momentum: float | None = None,
    nesterov: bool = False,
    centered: bool = False,
    probes: int | None = 1,
    seed: int = 0,
    every: int = 1,
    eps: float = 0.0,
    zero_kappa: Literal["freeze", "pass"] = "freeze",
    match_gradient_norm: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Path-SGD by the data-dependent κ: Δw_e = −η/κ_e · ∂L/∂w_e, optionally with momentum.

    Args:
        learning_rate: η, a number or a schedule.
        fn, alpha, centered, probes, seed, every, eps, zero_kappa, match_gradient_norm, mask: see
            `scale_by_data_dependent_path_kappa`.
        momentum: decay of the running sum, or None for none.
        nesterov: use Nesterov's form of momentum.

    Returns:
        An `optax.GradientTransformationExtraArgs`; call `update(gradient, state, params, batch=x)`.

    Raises:
        InvalidInput, UnsupportedOperation: as for `scale_by_data_dependent_path_kappa`.

    References:
        Neyshabur, Tomioka, Salakhutdinov, Srebro, ICLR 2016 (arXiv:1511.06747), §4.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxinv import data_dependent_path_sgd
        >>> from jaxinv.networks import init_mlp, mlp
        >>> params = init_mlp(jax.random.key(0), (8, 16, 3))
        >>> x, y = jax.random.normal(jax.random.key(1), (32, 8)), jnp.arange(32) % 3
        >>> def loss(params):
        ...     logits = mlp(params, x)
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        >>> tx = data_dependent_path_sgd(0.5, mlp, alpha=0.5)
        >>> state, before = tx.init(params), loss(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params, batch=x)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(20):
        ...     params, state = step(params, state)
        >>> bool(loss(params) < before)
        True
    """
    precondition = scale_by_data_dependent_path_kappa(
        fn,
        alpha=alpha,
        centered=centered,
        probes=probes,
        seed=seed,
        every=every,
        eps=eps,
        zero_kappa=zero_kappa,
        match_gradient_norm=match_gradient_norm,
        mask=mask,
    )
    return _with_momentum(precondition, learning_rate, momentum, nesterov)


_NEEDS_BATCH = (
    "The data-dependent κ needs `batch`, the inputs x of fn over which moments are taken. "
    "Call update(gradients, state, params, batch=x)."
)


def pass_full_params(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Hand the unmasked parameters to transformations inside `optax.masked` or `optax.partition`.

    Those wrappers hide from each inner transformation the parameters that it does not update. κ of
    a weight depends on all the others, so Path-SGD needs them: this passes them on as the extra
    argument `full_params`. Wrap the outermost transformation.

    Args:
        inner: any gradient transformation.

    Returns:
        The same transformation, with `full_params=params` added to every update.

    Raises:
        InvalidInput: at `update`, if params are missing.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxinv import path_sgd, pass_full_params
        >>> def net(w, x):
        ...     return jax.nn.relu(x @ w["body"]) @ w["head"]
        >>> w = {"body": jnp.ones((2, 3)), "head": jnp.ones((3, 1))}
        >>> tx = pass_full_params(optax.partition(
        ...     {"path": path_sgd(0.1, net, jnp.zeros((1, 2))), "plain": optax.sgd(0.1)},
        ...     {"body": "path", "head": "plain"}))
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, w), tx.init(w), w)
        >>> updates["head"].shape
        (3, 1)
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: PyTree, state: optax.OptState, params: Params = None, **extra: object
    ) -> tuple[PyTree, optax.OptState]:
        if params is None:
            raise InvalidInput(NEEDS_PARAMS)
        return inner.update(updates, state, params, **{"full_params": params, **extra})

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
