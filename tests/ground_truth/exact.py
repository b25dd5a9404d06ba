"""The 2-2-2-1 ReLU network, its paths enumerated in rational arithmetic.

A path is a choice of one unit per layer, so its product is written out here
with no graph, no matrix product and no rounding.
"""

from fractions import Fraction
from itertools import product

import numpy as np

# (out, in), as in the literature; `flax_params` transposes.
W = (
    ((1, -2), (3, 4)),
    ((-1, 2), (Fraction(1, 2), -3)),
    ((2, -1),),
)
B = ((5, -6), (1, 2), (7,))


def _edge_lists(biases):
    """Every path as its list of edges (kind, layer, indices)."""
    widths = (2, 2, 2, 1)
    for units in product(*map(range, widths)):
        yield [("W", k, units[k + 1], units[k]) for k in range(3)]
    if biases:
        for start in range(3):
            for units in product(*map(range, widths[start + 1 :])):
                tail = [("W", start + 1 + k, units[k + 1], units[k]) for k in range(len(units) - 1)]
                yield [("b", start, units[0]), *tail]


def _magnitude(edge):
    kind, layer, *index = edge
    value = W[layer][index[0]][index[1]] if kind == "W" else B[layer][index[0]]
    return abs(Fraction(value))


def path_norm_power(p, *, biases):
    """γ_p^p as a Fraction, for a whole number p."""
    total = Fraction(0)
    for path in _edge_lists(biases):
        term = Fraction(1)
        for edge in path:
            term *= _magnitude(edge) ** p
        total += term
    return total


def kappa(p, *, biases):
    """{edge: κ_e} as Fractions, for a whole number p."""
    result = {}
    for path in _edge_lists(biases):
        for edge in path:
            term = Fraction(1)
            for other in path:
                if other != edge:
                    term *= _magnitude(other) ** p
            result[edge] = result.get(edge, Fraction(0)) + term
    return result


def kappa_arrays(p, *, biases):
    """κ as float64 arrays in the layout of :func:`flax_params`."""
    k = kappa(p, biases=biases)
    tree = {}
    for layer, w in enumerate(W):
        outs, ins = len(w), len(w[0])
        kernel = [[k["W", layer, o, i] for o in range(outs)] for i in range(ins)]
        tree[f"Dense_{layer}"] = {"kernel": np.array(kernel, float)}
        if biases:
            bias = [k["b", layer, o] for o in range(outs)]
            tree[f"Dense_{layer}"]["bias"] = np.array(bias, float)
    return tree


def flax_params(dtype, *, biases):
    """The network's parameters, as ``jaxinv.networks.mlp`` wants them."""
    tree = {}
    for layer, w in enumerate(W):
        tree[f"Dense_{layer}"] = {"kernel": np.array(w, float).T.astype(dtype)}
        if biases:
            tree[f"Dense_{layer}"]["bias"] = np.array(B[layer], float).astype(dtype)
    return tree
