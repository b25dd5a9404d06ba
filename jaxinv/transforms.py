"""Optimizers that are invariant to node-wise rescaling, as optax gradient transformations.

Path-SGD is steepest descent in the geometry of the path norm, with a diagonal approximation:

    Δw_e = −η · κ_e(w)^{−2/p} · ∂L/∂w_e,      κ_e = Σ_{paths∋e} Π_{e'∈path∖e} |w_e'|^p.

Multiply a unit's incoming weights by a and divide its outgoing weights by a: κ_e of an incoming
weight is divided by a^p and its gradient by a, so Δw_e is multiplied by a, as w_e is. The function
that is learnt is the same from every start on the orbit, with momentum and schedules too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxinv import _scaled
from jaxinv._checks import abstract_batch_of_one
from jaxinv._scaled import Scaled
from jaxinv.errors import InvalidInput
from jaxinv.paths import check_exponent, scaled_kappa
from jaxinv.typing import Array, Inputs, Network, Params, PyTree

# Stored κ share one exponent. The largest sits at 2^HEADROOM, so that float32 holds κ's down to
# about 2^-226 of the largest before they are lost to underflow.
_HEADROOM = 100


class ScaleByPathKappaState(NamedTuple):
    """State of `scale_by_path_kappa`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.transforms import scale_by_path_kappa
        >>> tx = scale_by_path_kappa(lambda w, x: x @ w, jnp.zeros((1, 2)))
        >>> tx.init(jnp.ones((2, 1))).count.item()
        0
    """

    count: Array  # type: ignore[assignment]  # int32 scalar: updates so far
    kappa: PyTree  # like params, float32 or float64; () unless every > 1
    exponent: Array  # int32 scalar: κ = kappa · 2^exponent
    gain: Array  # float scalar: factor that matches the gradient's norm; 1 unless asked for
    gain_exponent: Array  # int32 scalar: the factor is gain · 2^gain_exponent


def scale_by_path_kappa(
    fn: Network,
    x: Inputs,
    *,
    p: float = 2.0,
    every: int = 1,
    eps: float = 0.0,
    zero_kappa: Literal["freeze", "pass"] = "freeze",
    match_gradient_norm: bool = False,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide each gradient by κ_e^{2/p}: the core of Path-SGD.

    u_e = g_e / (κ_e(w)^{2/p} + eps), with κ as in `jaxinv.path_kappa`. One forward and one backward
    pass on a batch of one per refresh of κ.

    Args:
        fn: the network `fn(params, x) -> y`, deterministic (no dropout, frozen normalisation).
        x: inputs with a leading batch axis; only shapes and dtypes are kept.
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
            `optax.masked` or `optax.partition`, which hide parameters, see `share_params`.

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
    shape = abstract_batch_of_one(x)
    _check_options(p, every, zero_kappa)

    def kappas_of(params: Params, count: Array, batch: Inputs | None) -> list[Scaled]:
        del count, batch
        return scaled_kappa(fn, params, shape, float(p), streaming=True)

    return _scale_by(kappas_of, float(p), every, eps, zero_kappa, match_gradient_norm, mask)


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
    mask: Any = None,
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
    accumulate = optax.identity() if momentum is None else optax.trace(momentum, nesterov)
    chained = optax.chain(precondition, accumulate, optax.scale_by_learning_rate(learning_rate))
    return optax.with_extra_args_support(chained)


def share_params(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
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
        >>> from jaxinv import path_sgd, share_params
        >>> def net(w, x):
        ...     return jax.nn.relu(x @ w["body"]) @ w["head"]
        >>> w = {"body": jnp.ones((2, 3)), "head": jnp.ones((3, 1))}
        >>> tx = share_params(optax.partition(
        ...     {"path": path_sgd(0.1, net, jnp.zeros((1, 2))), "plain": optax.sgd(0.1)},
        ...     {"body": "path", "head": "plain"}))
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, w), tx.init(w), w)
        >>> updates["head"].shape
        (3, 1)
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates: PyTree, state: Any, params: Params = None, **extra: Any) -> Any:
        if params is None:
            raise InvalidInput(_NEEDS_PARAMS)
        return inner.update(updates, state, params, **{"full_params": params, **extra})

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


# --- pieces ---------------------------------------------------------------------------

_NEEDS_PARAMS = (
    "Path-SGD needs the parameters: κ is a function of all weights. "
    "Call update(gradients, state, params)."
)


def _scale_by(
    kappas_of: Callable[[Params, Array, Inputs | None], list[Scaled]],
    p: float,
    every: int,
    eps: float,
    zero_kappa: str,
    match_gradient_norm: bool,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """Divide gradients by κ^{2/p}, with κ of (parameters, number of the update, batch)."""

    def init_fn(params: Params) -> ScaleByPathKappaState:
        dtype = _scaled.working_dtype(jax.tree.leaves(params))
        kappa: PyTree = ()
        if every > 1:
            kappa = jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), dtype), params)
        return ScaleByPathKappaState(
            count=jnp.zeros((), jnp.int32),
            kappa=kappa,
            exponent=jnp.zeros((), jnp.int32),
            gain=jnp.ones((), dtype),
            gain_exponent=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: PyTree,
        state: ScaleByPathKappaState,
        params: Params | None = None,
        *,
        batch: Inputs | None = None,
        full_params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByPathKappaState]:
        del extra_args
        whole = _all_params(params, full_params)

        def fresh() -> PyTree:
            kappas = kappas_of(whole, state.count, batch)
            kappas = jax.tree.unflatten(jax.tree.structure(whole), kappas)
            return jax.tree.map(
                lambda u, s: _where_unmasked(u, s), updates, kappas, is_leaf=_hidden
            )

        kappa, exponent = state.kappa, state.exponent
        if every == 1:
            kappas = fresh()
        else:

            def refresh() -> tuple[PyTree, Array]:
                return _share_exponent(fresh(), updates)

            kappa, exponent = jax.lax.cond(
                state.count % every == 0, refresh, lambda: (state.kappa, state.exponent)
            )
            kappas = jax.tree.map(lambda k: Scaled(k, exponent), kappa)
        selected = _selection(mask, whole, updates)
        scaled = jax.tree.map(
            lambda u, s, chosen: _divide(u, s, p, eps, zero_kappa, chosen),
            updates, kappas, selected,
        )  # fmt: skip
        gain = Scaled(state.gain, state.gain_exponent)
        if match_gradient_norm:
            gain = jax.lax.cond(
                state.count == 0,
                lambda: _matching_gain(updates, scaled, selected, state.gain.dtype),
                lambda: gain,
            )
        scaled = jax.tree.map(
            lambda u, s, chosen: jnp.where(chosen, _apply_gain(s, gain, u.dtype), u)
            if match_gradient_norm
            else _scaled.value(s).astype(u.dtype),
            updates, scaled, selected,
        )  # fmt: skip
        count = optax.safe_increment(state.count)
        return scaled, ScaleByPathKappaState(count, kappa, exponent, *gain)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_options(p: Any, every: Any, zero_kappa: Any) -> None:
    check_exponent(p)
    if isinstance(every, jax.core.Tracer) or int(every) != every or every < 1:
        raise InvalidInput(f"every must be a fixed integer >= 1, not {every}.")
    if zero_kappa not in ("freeze", "pass"):
        raise InvalidInput(f"zero_kappa must be 'freeze' or 'pass', not {zero_kappa!r}.")


def _hidden(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _all_params(params: Params | None, full_params: Params | None) -> Params:
    whole = params if full_params is None else full_params
    if whole is None:
        raise InvalidInput(_NEEDS_PARAMS)
    if any(map(_hidden, jax.tree.leaves(whole, is_leaf=_hidden))):
        raise InvalidInput(
            "Some parameters are masked (by optax.masked or optax.partition), but κ of a weight "
            "depends on all of them. Wrap the whole optimizer in jaxinv.share_params(...), or use "
            "the mask argument of path_sgd instead of optax.masked."
        )
    return whole


def _where_unmasked(update: Any, kappa: Any) -> Any:
    return update if _hidden(update) else kappa


def _selection(mask: Any, params: Params, updates: PyTree) -> PyTree:
    if mask is None:
        return jax.tree.map(lambda _: True, updates)
    chosen = mask(params) if callable(mask) else mask
    return jax.tree.map(_where_unmasked, updates, chosen, is_leaf=_hidden)


def _share_exponent(kappas: PyTree, updates: PyTree) -> tuple[PyTree, Array]:
    """κ of all leaves over one exponent, for storage."""
    parts = jax.tree.leaves(kappas, is_leaf=lambda s: isinstance(s, Scaled))
    parts = [_scaled.normalize(s) for s in parts]
    _, top = _scaled.align(parts)
    exponent = top - _HEADROOM
    shifted = [_scaled.shift(s.mantissa, s.exponent - exponent) for s in parts]
    return jax.tree.unflatten(jax.tree.structure(updates), shifted), exponent


def _divide(
    gradient: Array, kappa: Scaled, p: float, eps: Any, zero_kappa: str, chosen: bool
) -> Scaled:
    """gradient / (κ^{2/p} + eps), with the policy for κ = 0, as mantissa and exponent."""
    dtype = kappa.mantissa.dtype
    g, zero = gradient.astype(dtype), jnp.zeros((), jnp.int32)
    if not chosen:
        return Scaled(g, zero)
    mantissa, exponent = _scaled.root_squared(kappa, p)
    if not (isinstance(eps, int | float) and eps == 0):
        mantissa = mantissa + _scaled.shift(jnp.asarray(eps, dtype), -exponent)
    # An infinite or NaN κ must show in the update: g/inf would be a silent 0.
    fine = jnp.isfinite(mantissa)
    present = kappa.mantissa != 0
    quotient = jnp.where(present, g / jnp.where(present & fine, mantissa, 1), 0)
    quotient = jnp.where(fine, quotient, jnp.nan)
    if zero_kappa == "pass":
        kept = jnp.where(present, quotient, _scaled.shift(g, exponent))
        return Scaled(kept, -exponent)
    return Scaled(quotient, -exponent)


def _matching_gain(updates: PyTree, scaled: PyTree, selected: PyTree, dtype: Any) -> Scaled:
    """‖gradient‖ / ‖preconditioned gradient‖ over the selected leaves; 1 if either is zero."""
    chosen = jax.tree.leaves(selected)
    quotients = jax.tree.leaves(scaled, is_leaf=lambda s: isinstance(s, Scaled))
    pairs = zip(jax.tree.leaves(updates), quotients, chosen, strict=True)
    kept = [(g.astype(dtype), _scaled.normalize(s)) for g, s, c in pairs if c]
    gradients, parts = [g for g, _ in kept], [s for _, s in kept]
    mantissas, exponent = _scaled.align(parts)
    above, below = optax.tree.norm(gradients), optax.tree.norm(mantissas)
    fine = (above > 0) & (below > 0)
    gain = jnp.where(fine, above / jnp.where(fine, below, 1), 1).astype(dtype)
    return Scaled(gain, jnp.where(fine, -exponent, 0))


def _apply_gain(scaled: Scaled, gain: Scaled, dtype: Any) -> Array:
    mantissa = scaled.mantissa * gain.mantissa
    return _scaled.shift(mantissa, scaled.exponent + gain.exponent).astype(dtype)
