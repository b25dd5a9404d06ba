"""Path norms by listing every path of an explicit weighted graph.

Nothing is accumulated unit by unit: the paths are listed one at a time, and
γ_p^p and κ are summed from their definitions. Exponential, hence trustworthy.
"""

from collections import defaultdict

import numpy as np

ONE = 0  # The constant-1 node: the source of every bias.


class Dag:
    """A directed acyclic graph whose edges refer to (possibly shared) weights.

    Nodes are numbered so that every edge leads to a larger number. An edge of
    weight ``None`` has weight one.
    """

    def __init__(self):
        self.num_nodes = 1
        self.weights = []
        self.edges = defaultdict(list)

    def nodes(self, shape):
        """An array of new nodes."""
        size = int(np.prod(shape, dtype=int))
        first = self.num_nodes
        self.num_nodes += size
        return np.arange(first, first + size).reshape(shape)

    def weight(self, values):
        """An array of new weights: their numbers, by which edges name them."""
        values = np.asarray(values, float)
        first = len(self.weights)
        self.weights.extend(values.ravel().tolist())
        return np.arange(first, first + values.size).reshape(values.shape)

    def connect(self, source, target, weight=None):
        """Add one edge."""
        assert source < target
        weight = None if weight is None else int(weight)
        self.edges[int(source)].append((int(target), weight))

    def num_paths(self, inputs, outputs):
        """How many paths :func:`list_paths` would list."""
        count = np.zeros(self.num_nodes)
        count[np.unique(inputs)] = 1
        count[ONE] = 1
        for node in range(self.num_nodes):
            for target, _ in self.edges[node]:
                count[target] += count[node]
        return count[np.ravel(outputs)].sum()


def list_paths(dag, inputs, outputs):
    """Yield (index of the output element, numbers of the weights on the path).

    A path starts at an element of ``inputs`` or at the constant-1 node and ends
    at an element of ``outputs``; weights of one are not listed.
    """
    ends = defaultdict(list)
    for index, node in enumerate(np.ravel(outputs).tolist()):
        ends[node].append(index)
    useful = set(ends)
    for node in range(dag.num_nodes - 1, -1, -1):
        if any(target in useful for target, _ in dag.edges[node]):
            useful.add(node)
    stack = [(node, ()) for node in {ONE, *np.ravel(inputs).tolist()}]
    while stack:
        node, weights = stack.pop()
        for index in ends[node] if node in ends else ():
            yield index, weights
        for target, weight in dag.edges[node]:
            if target in useful:
                extra = () if weight is None else (weight,)
                stack.append((target, weights + extra))


def enumerate_paths(dag, inputs, outputs, p):
    """(γ_p^p of every output element, κ of every weight), by definition."""
    q = [abs(w) ** p for w in dag.weights]
    norms = np.zeros(np.shape(outputs))
    kappa = np.zeros(len(q))
    for index, weights in list_paths(dag, inputs, outputs):
        # Products without one factor, from both sides: dividing fails at zeros.
        before = [1.0]
        for w in weights:
            before.append(before[-1] * q[w])
        norms.flat[index] += before[-1]
        after = 1.0
        for w, product in zip(reversed(weights), reversed(before[:-1]), strict=True):
            kappa[w] += product * after
            after *= q[w]
    return norms, kappa
