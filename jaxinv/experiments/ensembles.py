"""Ranks of ensembles of networks on one set of inputs, as plain numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv.experiments.resuming import Cell
from jaxinv.networks import init_mlp, mlp
from jaxinv.ranks import jacobian_rank
from jaxinv.ranks.rank import Rank
from jaxinv.typing import Params

_MOST_BYTES = 2**28  # of the Jacobians that one vmapped call holds at a time


@jax.jit
def _ranks_of_chunk(params: Params, x: jax.Array) -> Rank:
    return jax.vmap(lambda w: jacobian_rank(mlp, w, x, method="svd"))(params)


def ranks(params: Params, x: jax.Array) -> Cell:
    """The ranks of an ensemble on the same inputs, in one vmapped call if memory allows.

    Args:
        params: leaves with a leading axis of networks.
        x: ``(n, features)``.

    Returns:
        ``d``, ``group`` (h, the hidden units: one rescaling each), ``examples``, the lists
        ``rank`` and ``upper`` (the bound that dead parameters, rescalings and the number of rows
        leave), and ``certain``, the number of ranks that are.

    >>> found = ranks(draw(0, (2, 3, 1), 4, 0.5), jax.random.normal(jax.random.key(1), (60, 2)))
    >>> found["d"], found["group"], max(found["rank"]) <= 13 - 3, found["certain"]
    (13, 3, True, 2)
    """
    leaves = jax.tree.leaves(params)
    count, d = len(leaves[0]), sum(leaf[0].size for leaf in leaves)
    out = params[f"Dense_{len(params) - 1}"]["bias"].shape[-1]
    fitting = max(1, _MOST_BYTES // (8 * len(x) * out * d))
    # A divisor, so that all chunks have one shape and are compiled once.
    size = max(n for n in range(1, count + 1) if count % n == 0 and n <= fitting)
    chunks = [
        _ranks_of_chunk(jax.tree.map(lambda a, i=i: a[i : i + size], params), x)
        for i in range(0, count, size)
    ]
    rank, upper, certain = (
        np.concatenate([getattr(chunk, name) for chunk in chunks])
        for name in ("rank", "upper", "certain")
    )
    return {
        "d": d,
        "group": sum(layer["bias"].shape[-1] for layer in params.values()) - out,
        "examples": len(x),
        "rank": rank.tolist(),
        "upper": upper.tolist(),
        "certain": int(certain.sum()),
    }


def draw(seed: int, sizes: tuple[int, ...], count: int, bias_std: float) -> Params:
    """Draw an ensemble: kernels of variance 2/fan_in, biases of standard deviation ``bias_std``.

    >>> draw(0, (2, 3, 1), 5, 0.1)["Dense_0"]["kernel"].shape
    (5, 2, 3)
    """
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.vmap(lambda key: init_mlp(key, sizes, bias_std=bias_std))(keys)


def first(x: jax.Array, n: int) -> jax.Array:
    """The first n inputs and, in place of the others, the very first one again.

    Repeated rows do not change the rank of J, and all n share one compiled program.

    >>> first(jnp.arange(4), 2).tolist()
    [0, 1, 0, 0]
    """
    index = jnp.arange(len(x))
    return x[jnp.where(index < n, index, 0)]


def parts(cell: Cell) -> list[Cell]:
    """What :func:`ranks` has put into a cell: one result, or several under ``"ranks"``.

    >>> parts({"epoch": 0, "ranks": {"digits": {"d": 1}, "noise": {"d": 2}}})
    [{'d': 1}, {'d': 2}]
    """
    several = cell.get("ranks", {"": cell})
    return list(several.values()) if isinstance(several, dict) else [several]
