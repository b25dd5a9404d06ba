"""What a page says of degrees of freedom: on the inputs that were given, and on all inputs."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import _checks
from jaxinv.errors import JaxinvError
from jaxinv.gates import everywhere, functional_dimension
from jaxinv.pages.numbers import number, numbers
from jaxinv.ranks import Rank, degrees_of_freedom, jacobian_rank, jacobian_spectrum
from jaxinv.typing import Inputs, Network, Params

# An SVD takes time like the cube of the smaller side of J, so beyond the limit there is none; a
# certificate takes a tenth of that, and a proof by boundaries grows about like the parameters.
_CERTIFICATE, _BOUNDARY = 5, 50
_MOST_ENTRIES = 10**8  # of J: 0.8 GB


def counts(fn: Network, params: Params, x: Inputs, *, limit: int) -> dict[str, Any]:
    """Rank and spectrum on the given inputs, the rank on all, or why there is none.

    Args:
        fn, params: the network.
        x: inputs; where they are shapes, standard normal inputs are drawn.
        limit: spectrum, and what becomes of every parameter, up to this many parameters; the rank
            alone if there are no more rows than this; on all inputs up to 50 times as many.

    Returns:
        Plain values. `inputs` says which inputs were used, `everywhere` is the count on all.

    Example:
        >>> import jax
        >>> from jaxinv import networks
        >>> w = networks.init_mlp(jax.random.key(0), (3, 4, 2), bias_std=0.1)
        >>> found = counts(networks.mlp, w, jax.random.normal(jax.random.key(1), (4, 3)), limit=100)
        >>> found["rank"], found["unseen"], found["everywhere"]["lower"], found["inputs"]
        (8, 14, 22, 'the 4 given inputs')
    """
    d = sum(int(jnp.size(a)) for a in jax.tree.leaves(params))
    one = _checks.abstract_batch_of_one(x)
    outputs = _outputs(fn, params, one)
    given = not any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(x))
    if given:
        count = min(jnp.shape(a)[0] for a in jax.tree.leaves(x))
        source = f"the {count:,} given inputs"
    else:
        count = 2 * -(-d // max(outputs, 1))
        source = f"{count:,} standard normal inputs (x was given by its shape)"
    x = x if given else _drawn(one, count)
    found = {"inputs": source, **_on_these(fn, params, x, d, count * outputs, limit)}
    reached = found.get("certain", False) and found["rank"] == d - found.get("rescaling", d)
    if not reached:
        found["everywhere"] = _everywhere(fn, params, one, d, outputs, limit, found)
    return found


def _outputs(fn: Network, params: Params, one: Inputs) -> int:
    """Output elements for one example."""
    leaves = jax.tree.leaves(jax.eval_shape(fn, params, one))
    return sum(int(np.prod(y.shape[1:])) for y in leaves)


def _drawn(one: Inputs, count: int) -> Inputs | None:
    """Standard normal inputs; None where they are integers."""
    if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(one)):
        return None
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(draw.standard_normal((count, *a.shape[1:])), a.dtype), one
    )


def _on_these(
    fn: Network, params: Params, x: Inputs | None, d: int, rows: int, limit: int
) -> dict[str, Any]:
    if x is None:
        return {"refused": "not computed: integer inputs cannot be drawn; give examples."}
    if min(d, rows) > limit or d * rows > _MOST_ENTRIES and d > limit:
        return {
            "refused": f"not computed: {d:,} parameters and {rows:,} rows, both more than the "
            f"limit of {limit:,} (--rank-limit). An SVD takes time like the cube of that."
        }
    try:
        if d > limit:
            rank = jacobian_rank(fn, params, x)
            return {
                "rank": int(rank.rank),
                "certain": bool(rank.certain),
                "evidence": str(rank).partition("\n")[0],
                "notes": _notes(rank),
            }
        found = degrees_of_freedom(fn, params, x)
        spectrum = np.asarray(jacobian_spectrum(fn, params, x))
    except JaxinvError as error:
        return {"refused": str(error)}
    # By a factorisation, not a spectrum.
    proven = not math.isfinite(float(found.evidence.largest))
    return {
        **{
            k: int(getattr(found, k))
            for k in ("rank", "rescaling", "matrix", "dead", "unexplained", "unseen")
        },
        "certain": bool(found.certain),
        "compared": bool(found.compared),
        "notes": _notes(found.evidence),
        "evidence": f"rank {int(found.rank)}, proven by a Cholesky factorisation"
        if proven
        else str(found.evidence).partition("\n")[0],
        "spectrum": numbers(spectrum),
        "error": None if proven else number(found.evidence.error),
    }


def _notes(rank: Rank) -> list[str]:
    return [line.strip() for line in rank.notes()]


def _everywhere(
    fn: Network,
    params: Params,
    one: Inputs,
    d: int,
    outputs: int,
    limit: int,
    these: dict[str, Any],
) -> dict[str, Any]:
    """Bounds on the degrees of freedom over all inputs, and what proves them."""
    if d > _BOUNDARY * limit:
        return {
            "refused": f"not computed: {d:,} parameters, more than {_BOUNDARY} times the limit of "
            f"{limit:,} (--rank-limit). jaxinv.functional_dimension takes minutes for 10⁶."
        }
    try:
        # Where given inputs were compared with others, the rank on all of these is known.
        compared = these.get("compared", False)
        dense = 0 if compared else limit
        found = functional_dimension(fn, params, everywhere(one), dense=dense)
        lower, certain, how = found.lower, found.certain, "the boundaries of gates"
        of_gates = [layer for layer in found.layers if layer.source]
        if not of_gates or lower > sum(int(layer.ranks.sum()) for layer in found.layers):
            how = "the Jacobian at inputs that a search found"
        if compared and these["rank"] + these["unseen"] > lower:
            lower, how = these["rank"] + these["unseen"], "the Jacobian on these and random inputs"
            certain = these["certain"] and lower == found.upper
        if lower < found.upper and limit < d <= _CERTIFICATE * limit:
            x = _drawn(one, 2 * -(-d // max(outputs, 1)))
            rank = jacobian_rank(fn, params, x, method="certificate")
            if rank.rank > lower:
                lower, certain, how = int(rank.rank), bool(rank.certain), "a Cholesky factorisation"
    except JaxinvError as error:
        return {"refused": str(error).partition("\n")[0]}
    missing = [f"{layer.name}: {why}" for layer in found.layers for why in layer.reasons]
    return {
        "lower": lower,
        "upper": found.upper,
        "certain": certain,
        "by": how,
        "missing": missing if lower < found.upper else [],
    }


__all__ = ["counts"]
