"""The page of a network: everything that jaxinv sees in it, as plain numbers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxinv
from jaxinv import _checks
from jaxinv._numerics import scaled
from jaxinv._numerics.tolerances import default_tolerance
from jaxinv.errors import JaxinvError
from jaxinv.inspection import inspect, unit_balance
from jaxinv.pages.counts import counts
from jaxinv.pages.html import render
from jaxinv.pages.numbers import number, numbers
from jaxinv.pages.unit_basis import unit_basis
from jaxinv.pages.unit_graph import UnitGraph, unit_graph
from jaxinv.paths import log_path_kappa, unit_path_norms
from jaxinv.rescaling import RescalingGroup, rescaling_group
from jaxinv.rescaling.orbit_minimum import least_norm
from jaxinv.typing import Inputs, Network, Params

RANK_LIMIT = 2000  # beyond, an SVD in float64 takes minutes
_CROWDED = 32  # a column of so many units is cut
_MOST_UNITS = 20  # to these
_MOST_EDGES = 8000  # drawn in all
_MOST_OF_CROWDED = 160  # drawn of an array with a cut column at an end
_BINS = 40


def model_page(
    fn: Network, params: Params, x: Inputs, *, title: str = "", rank_limit: int = RANK_LIMIT
) -> str:
    """The report on a network as one HTML page, which needs no network and no other file.

    Args:
        fn, params, x: as for `describe`.
        title: the heading.
        rank_limit: as for `describe`.

    Returns:
        The page. The same arguments give the same page.

    Raises:
        InvalidInput: as for `describe`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.pages import model_page
        >>> page = model_page(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.ones((1, 2)), title="a < b")
        >>> page[:15], "<title>a &lt; b</title>" in page
        ('<!DOCTYPE html>', True)
    """
    return render(title or "network", describe(fn, params, x, rank_limit=rank_limit))


def describe(
    fn: Network, params: Params, x: Inputs, *, rank_limit: int = RANK_LIMIT
) -> dict[str, Any]:
    """What the page of a network shows, as plain values.

    Args:
        fn: any JAX-traceable `fn(params, x) -> y`.
        params: pytree of float arrays.
        x: inputs with a leading batch axis, or `jax.ShapeDtypeStruct`s. Values are used for the
            rank alone; where there are none, standard normal inputs are drawn.
        rank_limit: spectrum, and what becomes of every parameter, up to this many parameters; rank
            on the given inputs also if these have no more rows; on all inputs up to 50 times as
            many.

    Returns:
        A dictionary for JSON: numbers that are not finite are None.

    Raises:
        InvalidInput: for integer, NaN or missing params, or x without a batch axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.pages import describe
        >>> found = describe(lambda w, x: (x @ w[0]) @ w[1],
        ...                  [jnp.ones((2, 3)), jnp.ones((3, 1))], jnp.ones((1, 2)))
        >>> found["group"]["dimension"], found["freedom"]["rank"], found["freedom"]["unseen"]
        (3, 1, 1)
    """
    report = inspect(fn, params, x)
    group = unit_basis(rescaling_group(fn, params, x))
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    ratios = unit_balance(group, params)
    log_norm, kappa, logs, outputs = report.log_path_norm, None, None, None
    if log_norm is not None:
        # Compiled whole: operation by operation, as `inspect` has checked them, it takes longer.
        kappa = jax.jit(lambda params: log_path_kappa(fn, params, x))(params)
        logs = [np.asarray(k, np.float64) for k in jax.tree.leaves(kappa)]
        outputs = _outputs(fn, params, x)
    graph = unit_graph(fn, params, x, group, kappa, log_norm)
    names = group.structure.leaf_names
    layers = np.array(group.structure.layers, np.int64)
    spread = _spread(ratios, layers, len(names))
    shares = np.bincount(graph.leaf, graph.share, len(names))
    return {
        "kind": "model",
        "version": jaxinv.__version__,
        "parameters": report.parameters,
        "log10_path_norm": None if log_norm is None else number(log_norm / math.log(10)),
        "refused": report.refused,
        "group": report.as_dict()["group"],
        "matrices": report.as_dict()["matrix_symmetries"],
        "freedom": counts(fn, params, x, limit=rank_limit),
        "leaves": [
            {
                "name": names[i],
                "shape": list(leaf.shape),
                "dtype": report.leaves[i][2],
                "size": leaf.size,
                "units": int((layers == i).sum()),
                "norm": number(np.linalg.norm(leaf)),
                "largest": number(abs(leaf).max(initial=0)),
                "log10_kappa": None if logs is None else number(_median(logs[i]) / math.log(10)),
                "share": None if logs is None or i in graph.undrawn else number(shares[i]),
                "ratio": spread[i],
            }
            for i, leaf in enumerate(leaves)
        ],
        "outputs": outputs,
        "kappa": None
        if logs is None
        else _histogram([k / math.log(10) for k in logs], list(names)),
        "balance": _histogram(
            [_log10(ratios[layers == i]) for i in np.unique(layers)],
            [names[i] for i in np.unique(layers)],
        ),
        "picture": _picture(graph, group, params, ratios),
    }


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def _log10(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log10(values)


def _spread(ratios: np.ndarray, layers: np.ndarray, count: int) -> list[list[float | None] | None]:
    """Smallest, middle and largest ratio of the units of every leaf."""
    found: list[list[float | None] | None] = [None] * count
    for i in np.unique(layers):
        ordered = np.sort(ratios[layers == i])
        found[i] = [number(ordered[k]) for k in (0, len(ordered) // 2, -1)]
    return found


def _histogram(parts: list[np.ndarray], names: list[str]) -> dict[str, Any]:
    """Counts of every part on common bins; what is not finite is counted apart."""
    finite = [p[np.isfinite(p)] for p in parts]
    values = np.concatenate([*(f.ravel() for f in finite), np.zeros(0)])
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    return {
        "edges": numbers(edges),
        "parts": [
            {
                "name": name,
                "counts": np.histogram(f, edges)[0].tolist(),
                "not_finite": int(p.size - f.size),
            }
            for name, p, f in zip(names, parts, finite, strict=True)
        ],
    }


def _outputs(fn: Network, params: Params, x: Inputs) -> dict[str, Any] | None:
    try:
        norms = jax.jit(lambda params: unit_path_norms(fn, params, x))(params)
    except JaxinvError:  # an output without a batch axis has no units
        return None
    named = zip(_checks.leaf_names(norms, "y"), jax.tree.leaves(norms), strict=True)
    return {name: numbers(np.ravel(leaf)) for name, leaf in named}


# --- the picture ----------------------------------------------------------------------


def _to_balance(group: RescalingGroup, params: Params) -> np.ndarray:
    """u of `jaxinv.balance`, without the balanced weights: to compile them takes seconds."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    tol = default_tolerance(scaled.working_dtype(leaves))
    return np.asarray(least_norm(group, leaves, 2.0, tol)[0]) / 2


def _picture(
    graph: UnitGraph, group: RescalingGroup, params: Params, ratios: np.ndarray
) -> dict[str, Any]:
    """The units and edges that are drawn: the heaviest, where there are too many."""
    count = len(graph.names)
    has_paths = not np.isnan(graph.share).all() if len(graph.share) else False
    heavy = np.nan_to_num(graph.share if has_paths else graph.square)
    # Biases have the source -1: one more slot in front takes them.
    heavy_in = np.bincount(graph.target, heavy, count)
    heavy_out = np.bincount(graph.source + 1, heavy, count + 1)[1:]
    through = np.where(heavy_in > 0, heavy_in, heavy_out)
    order = np.lexsort((np.arange(count), -through, graph.column))
    starts = np.searchsorted(graph.column[order], graph.column[order])
    shown = np.zeros(count, bool)
    size = np.bincount(graph.column, minlength=1)[graph.column[order]]
    shown[order] = np.arange(count) - starts < np.where(size < _CROWDED, size, _MOST_UNITS)
    number = np.where(shown, np.cumsum(shown) - 1, -1)
    units = np.flatnonzero(shown)
    position = np.zeros(count, np.int64)
    by_column = np.argsort(graph.column, kind="stable")
    column = graph.column[by_column]
    position[by_column] = np.arange(count) - np.searchsorted(column, column)
    # Few units of a wide layer are shown: of their edges only the sources are looked up.
    edges = np.flatnonzero(shown[graph.target])
    edges = edges[(graph.source[edges] >= 0) & shown[graph.source[edges]]]
    leaves = len(group.structure.leaf_names)
    limit = max(150, _MOST_EDGES // max(1, len(np.unique(graph.leaf[edges]))))
    ranked = edges[np.lexsort((edges, -heavy[edges], graph.leaf[edges]))]
    leaf = graph.leaf[ranked]
    cut = np.bincount(graph.leaf, ~shown[graph.target] | ~shown[graph.source], leaves) > 0
    most = np.where(cut, min(limit, _MOST_OF_CROWDED), limit)[leaf]
    edges = np.sort(ranked[np.arange(len(ranked)) - np.searchsorted(leaf, leaf) < most])
    u = np.full(count, np.nan)
    u[: group.dim] = _to_balance(group, params) if group.dim else []
    ratio = np.full(count, np.nan)
    ratio[: group.dim] = ratios
    all_edges = np.bincount(graph.leaf, graph.source >= 0, leaves).astype(np.int64)
    drawn_edges = np.bincount(graph.leaf[edges], minlength=leaves)
    biases = np.flatnonzero((graph.source < 0) & shown[graph.target])
    return {
        "most": _MOST_UNITS,
        "measure": "share of the path norm" if has_paths else "norm of the weights",
        "columns": [
            {"name": c.name, "kind": c.kind, "total": int((graph.column == i).sum())}
            for i, c in enumerate(graph.columns)
        ],
        "units": {
            "name": [graph.names[i] for i in units],
            "column": graph.column[units].tolist(),
            "index": position[units].tolist(),
            "through": numbers(through[units]) if has_paths else [None] * len(units),
            "ratio": numbers(ratio[units]),
            "u": numbers(u[units]),
        },
        "edges": {
            "source": number[graph.source[edges]].tolist(),
            "target": number[graph.target[edges]].tolist(),
            "leaf": graph.leaf[edges].tolist(),
            "weights": graph.weights[edges].tolist(),
            "norm": numbers(np.sqrt(graph.square[edges])),
            "log10_kappa": numbers(graph.log_kappa[edges] / math.log(10)),
            "share": numbers(graph.share[edges]),
        },
        "biases": {
            "unit": number[graph.target[biases]].tolist(),
            "leaf": graph.leaf[biases].tolist(),
            "norm": numbers(np.sqrt(graph.square[biases])),
            "share": numbers(graph.share[biases]),
        },
        "connections": [
            {"leaf": i, "total": int(all_edges[i]), "shown": int(drawn_edges[i])}
            for i in range(leaves)
            if all_edges[i]
        ],
        "undrawn": [group.structure.leaf_names[i] for i in graph.undrawn],
    }
