"""Normalisation by statistics of the data, as a reparametrisation of any network.

Batch normalisation divides what a unit receives by its standard deviation over the batch:

    w̃_v = w_v / (w_vᵀ C_v w_v)^{1/2}    on centred inputs, C_v the covariance of the layer before.

It is a parametrisation w ↦ w̃ of the same units by a map that depends on the data. Data-dependent
path normalisation replaces C_v by R_v = α·C_v + (1 − α)·diag(γ²_u), so that γ²_v = 1 for every
hidden unit; α = 1 is batch normalisation, α = 0 weight normalisation (with inputs and hidden units
of γ² = 1).

Every dense or convolutional layer is normalised whose output reaches anything but the outputs of
the network: per unit, or per channel over all positions. The last layer is left as it is. A bias
that is added to a layer is added to the normalised values, as the shift of batch normalisation is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import optax

from jaxinv._checks import check_alpha, real
from jaxinv.paths.normalization import normalized_outputs
from jaxinv.typing import Array, Inputs, Network, Outputs, Params


class UnitStatistics(NamedTuple):
    """Statistics of one layer over a batch, before normalisation.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.reparam import UnitStatistics
        >>> UnitStatistics(mean=jnp.zeros(3), variance=jnp.ones(3)).mean.shape
        (3,)
    """

    mean: Array  # (units,) or (channels,); 0 if not centred
    variance: Array  # the same; of uncentred values the second moment


class NormalizedNetwork(NamedTuple):
    """A network whose hidden units are normalised; its parameters are those of the original.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.reparam import batch_norm_as_reparam
        >>> def net(w, x):
        ...     return jnp.maximum(x @ w[0], 0) @ w[1]
        >>> bn, w = batch_norm_as_reparam(net, eps=0.0), [jnp.ones((2, 1)), jnp.ones((1, 1))]
        >>> x = jnp.array([[1.0, 2.0], [2.0, 3.0]])  # z = 3 and 5, normalised −1 and 1
        >>> found = bn.statistics(w, x)
        >>> bn.fn(w, x).ravel().tolist(), found[0].mean.item(), found[0].variance.item()
        ([0.0, 1.0], 4.0, 1.0)
        >>> bn.evaluate(w, found, x[1:]).item()  # one example, with given statistics
        1.0
    """

    # fn(params, x): normalised by the statistics of the batch x.
    fn: Network
    # statistics(params, x): one `UnitStatistics` for each normalised layer, in order of evaluation.
    statistics: Callable[[Params, Inputs], tuple[UnitStatistics, ...]]
    # evaluate(params, statistics, x): normalised by given statistics, every example apart.
    evaluate: Callable[[Params, Sequence[UnitStatistics], Inputs], Outputs]


def batch_norm_as_reparam(fn: Network, *, eps: float = 1e-5) -> NormalizedNetwork:
    """Batch normalisation of every hidden layer: w̃ = w/(wᵀCw)^{1/2} on centred activations.

    Args:
        fn: a network `fn(params, x) -> y` without batch normalisation, of the operations that
            `jaxinv.path_norm` covers, loops excepted.
        eps: added to the variance wᵀCw.

    Returns:
        A `NormalizedNetwork`. Its `fn` is that of `flax.linen.BatchNorm` after every hidden layer,
        with the layer's bias, if it has one, as the shift and without a scale.

    Raises:
        InvalidInput: eps < 0; when called, as for `jaxinv.data_dependent_path_norm`.
        UnsupportedOperation: when called, for operations that path semantics do not cover.

    Notes:
        The function does not change when the incoming weights of a unit are multiplied by a > 0,
        while its gradient is divided by a: learning with gradient descent depends on the length of
        the weights, which the function does not see. `jaxinv.equivariance_error` measures it.

    References:
        Ioffe, Szegedy, "Batch normalization", ICML 2015 (arXiv:1502.03167); as the end α = 1 of a
        family: Neyshabur, Tomioka, Salakhutdinov, Srebro, ICLR 2016 (arXiv:1511.06747), §3.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv import batch_norm_as_reparam
        >>> from jaxinv.networks import init_mlp, mlp
        >>> params = init_mlp(jax.random.key(0), (4, 8, 3))
        >>> x = jax.random.normal(jax.random.key(1), (16, 4))
        >>> bn = batch_norm_as_reparam(mlp)
        >>> doubled = {**params, "Dense_0": {**params["Dense_0"],
        ...                                  "kernel": 2 * params["Dense_0"]["kernel"]}}
        >>> bool(jnp.allclose(bn.fn(params, x), bn.fn(doubled, x), atol=1e-3))
        True
    """
    return data_dependent_normalize(fn, alpha=1.0, centered=True, eps=eps)


def data_dependent_normalize(
    fn: Network, *, alpha: float, centered: bool = False, eps: float = 1e-5
) -> NormalizedNetwork:
    """Data-dependent path normalisation of every hidden layer, w̃ = w/(wᵀRw)^{1/2}.

    R_v = α·C_v + (1 − α)·diag(γ²_u), where γ²_u = 1 for inputs and for units that are normalised
    already; between them, pooling, biases and skip connections count as for `jaxinv.path_norm`.

    Args:
        fn, eps: as for `batch_norm_as_reparam`; eps is added to wᵀRw.
        alpha: from 0, normalisation by the weights alone, to 1, by the data alone.
        centered: subtract the mean, and take C_v for the covariance; else second moments.

    Returns:
        A `NormalizedNetwork`.

    Raises:
        InvalidInput, UnsupportedOperation: as for `batch_norm_as_reparam`; alpha outside [0, 1].

    References:
        Neyshabur, Tomioka, Salakhutdinov, Srebro, ICLR 2016 (arXiv:1511.06747), §3.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import data_dependent_normalize
        >>> def net(w, x):
        ...     return jnp.maximum(x @ w[0], 0) @ w[1]
        >>> w = [jnp.array([[3.0], [4.0]]), jnp.array([[10.0]])]
        >>> x = jnp.array([[1.0, 1.0]])  # z = 7, and ‖w‖² = 25
        >>> for a in (0, 0.5, 1):
        ...     print(round(data_dependent_normalize(net, alpha=a, eps=0.0).fn(w, x).item(), 4))
        14.0
        11.5079
        10.0
    """
    alpha = check_alpha(alpha)
    eps = real("eps", eps, lambda e: 0 <= e < float("inf"), "a finite number >= 0")

    def run(
        params: Params, x: Inputs, given: list[UnitStatistics] | None
    ) -> tuple[Outputs, tuple[UnitStatistics, ...]]:
        outputs, found = normalized_outputs(fn, params, x, alpha, centered, eps, given)
        return outputs, tuple(UnitStatistics(*moments) for moments in found)

    def normalized(params: Params, x: Inputs) -> Outputs:
        return run(params, x, None)[0]

    def statistics(params: Params, x: Inputs) -> tuple[UnitStatistics, ...]:
        return run(params, x, None)[1]

    def evaluate(params: Params, statistics: Sequence[UnitStatistics], x: Inputs) -> Outputs:
        return run(params, x, list(statistics))[0]

    return NormalizedNetwork(normalized, statistics, evaluate)


def moving_average(
    running: Sequence[UnitStatistics], new: Sequence[UnitStatistics], momentum: float = 0.99
) -> tuple[UnitStatistics, ...]:
    """Running statistics for evaluation: momentum·running + (1 − momentum)·new.

    Args:
        running, new: statistics of the same network.
        momentum: weight of the past, as in `flax.linen.BatchNorm`.

    Returns:
        A tuple of `UnitStatistics`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.reparam import UnitStatistics, moving_average
        >>> old = UnitStatistics(jnp.zeros(1), jnp.ones(1))
        >>> new = UnitStatistics(jnp.ones(1), jnp.zeros(1))
        >>> moving_average([old], [new], momentum=0.75)[0].mean.item()
        0.25
    """
    return optax.tree.update_moment(tuple(new), tuple(running), momentum, 1)
