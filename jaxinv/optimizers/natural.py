"""The natural gradient as an optax transformation.

    Δw = −η · (F(w) + λ)⁺ ∂L/∂w,      F the Fisher information of the network on a batch of inputs.

Without damping λ it is the steepest descent that depends on the function alone: in other parameters
w = w(θ) the first-order change of the function is the same, and directions that do not change the
function are left alone. Damping, momentum and finite steps each give up part of that;
`jaxinv.equivariance_error` measures how much.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxinv._checks import check_natural_options as check_options
from jaxinv._checks import check_network, check_start
from jaxinv._numerics import scaled
from jaxinv.errors import InvalidInput
from jaxinv.jacobians.fisher_information import natural_gradient_direction
from jaxinv.optimizers.descent import descent
from jaxinv.optimizers.masking import of_visible
from jaxinv.typing import Array, Inputs, Likelihood, Network, Params, PyTree, Solver


class ScaleByNaturalGradientState(NamedTuple):
    """State of `scale_by_natural_gradient`: diagnostics of the last solve, no memory.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.optimizers import scale_by_natural_gradient
        >>> tx = scale_by_natural_gradient(lambda w, x: x @ w, "gaussian")
        >>> tx.init(jnp.ones((2, 1))).count.item()
        0
    """

    count: Array  # type: ignore[assignment]  # int32 scalar: updates so far
    rank: Array  # int32 scalar: as in `NaturalGradient`; -1 before the first update
    residual: Array  # float scalar: the same; 0 before the first update
    iterations: Array  # int32 scalar: the same


def scale_by_natural_gradient(
    fn: Network,
    likelihood: Likelihood,
    *,
    damping: float | Array = 0.0,
    solver: Solver = "auto",
    rtol: float | None = None,
    max_iterations: int = 100,
) -> optax.GradientTransformationExtraArgs:
    """Turn each gradient into the natural gradient (F + damping)⁺ gradient.

    Args:
        fn: the network `fn(params, x) -> y`, deterministic.
        likelihood: "softmax", "gaussian", "bernoulli" or "poisson"; see `jaxinv.jacobians.fisher`.
        damping: λ ≥ 0, added to F: a number, or a hyperparameter of `optax.inject_hyperparams`.
            0 is the invariant limit; with few examples or a noisy gradient it is usually too bold.
        solver, rtol, max_iterations: see `natural_gradient_direction`. The number of
            iterations and the residual of the last update are in the state.

    Returns:
        An `optax.GradientTransformationExtraArgs`. `update` needs `params` and `batch`: the inputs
        x of `fn` over which F is averaged, as a rule those of the gradient. Other extra arguments
        are ignored, except `full_params`: with it (see `jaxinv.pass_full_params`) inside
        `optax.masked` or `optax.partition`, F is that of the unmasked parameters, the others held
        fixed.

    Raises:
        InvalidInput: bad options; at `update`, params or batch missing, params masked or not
            floating point, and as for `natural_gradient_direction`.

    References:
        Amari, "Natural gradient works efficiently in learning", Neural Computation 10, 1998;
        Martens, "New insights and perspectives on the natural gradient method", JMLR 21, 2020
        (arXiv:1412.1193).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.optimizers import scale_by_natural_gradient
        >>> def net(w, x):
        ...     return x @ w
        >>> w, x = jnp.zeros((2, 1)), jnp.array([[1.0, 2.0], [3.0, 5.0]])
        >>> y = x @ jnp.array([[4.0], [-1.0]])
        >>> gradient = jax.grad(lambda w: ((net(w, x) - y) ** 2).mean() / 2)(w)
        >>> tx = scale_by_natural_gradient(net, "gaussian")
        >>> update, state = tx.update(gradient, tx.init(w), w, batch=x)
        >>> print(-update.round(3).ravel(), state.rank)  # least squares in one step
        [ 4. -1.] 2
    """
    check_network(fn)
    check_options(likelihood, damping, solver, rtol, max_iterations)

    def init_fn(params: Params) -> ScaleByNaturalGradientState:
        check_start(params)
        dtype = scaled.working_dtype(jax.tree.leaves(params))
        # Apart, so that the state can be donated.
        count, iterations = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return ScaleByNaturalGradientState(count, count - 1, jnp.zeros((), dtype), iterations)

    def update_fn(
        updates: PyTree,
        state: ScaleByNaturalGradientState,
        params: Params | None = None,
        *,
        batch: Inputs | None = None,
        full_params: Params | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, ScaleByNaturalGradientState]:
        del extra_args
        if params is None:
            raise InvalidInput(_NEEDS_PARAMS)
        if batch is None:
            raise InvalidInput(_NEEDS_BATCH)
        found = natural_gradient_direction(
            of_visible(fn, params, full_params),
            params,
            batch,
            updates,
            likelihood,
            damping=damping,
            solver=solver,
            rtol=rtol,
            max_iterations=max_iterations,
        )
        v = optax.tree.cast_like(found.v, updates)
        count = optax.safe_increment(state.count)
        residual = found.residual.astype(state.residual.dtype)
        return v, ScaleByNaturalGradientState(count, found.rank, residual, found.iterations)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    fn: Network,
    likelihood: Likelihood,
    *,
    momentum: float | None = None,
    nesterov: bool = False,
    damping: float | Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient descent: Δw = −η (F + damping)⁺ ∂L/∂w, optionally with momentum.

    Args:
        learning_rate: η, a number or a schedule.
        fn, likelihood, damping: see `scale_by_natural_gradient`, whose solver is chosen in chains:
            `optax.chain(scale_by_natural_gradient(fn, "softmax", solver="cr"), optax.scale(-0.1))`.
        momentum: decay of the running sum of natural gradients, or None for none. The sum is over
            different points of a curved space, so it is invariant under linear w(θ) alone.
        nesterov: see `jaxinv.path_sgd`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; call `update(gradient, state, params, batch=x)`.
        The state is that of the chained parts.

    Raises:
        InvalidInput: as for `scale_by_natural_gradient`.

    Notes:
        To schedule the damping as well: `optax.inject_hyperparams(natural_gradient, static_args=(
        "fn", "likelihood"))(0.1, fn, "softmax", damping=schedule)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.optimizers import natural_gradient
        >>> w, x = jnp.zeros((2, 1)), jnp.array([[1.0, 2.0], [3.0, 5.0]])
        >>> y = x @ jnp.array([[4.0], [-1.0]])
        >>> gradient = jax.grad(lambda w: ((x @ w - y) ** 2).mean() / 2)(w)
        >>> tx = natural_gradient(0.5, lambda w, x: x @ w, "gaussian")
        >>> updates, _ = tx.update(gradient, tx.init(w), w, batch=x)
        >>> print(updates.round(3).ravel())  # half of the way
        [ 2.  -0.5]
    """
    precondition = scale_by_natural_gradient(fn, likelihood, damping=damping)
    return descent(precondition, learning_rate, momentum, nesterov)


_NEEDS_PARAMS = (
    "The natural gradient needs the parameters: the Fisher information is a function of all "
    "weights. Call update(gradients, state, params, batch=x)."
)
_NEEDS_BATCH = (
    "The natural gradient needs `batch`, the inputs x of fn over which the Fisher information is "
    "averaged. Call update(gradients, state, params, batch=x)."
)
