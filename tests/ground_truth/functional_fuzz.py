"""Functional dimensions of random small networks beside ranks on very many inputs.

    python -m tests.ground_truth.functional_fuzz --draws 30

Twelve architectures, `draws` random networks each. The lower bound is compared with the rank of the
Jacobian on inputs of many sizes, which is itself at most the functional dimension, and with the
upper bound from theory. Where the lower bound is above the rank, the rank is taken again on ten
times as many inputs.
"""

import argparse
import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv import functional_dimension, jacobian_rank
from jaxinv.gates import everywhere

relu = jax.nn.relu


def conv(x, w, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=numbers)


def dense(p, x):
    return relu(relu(x @ p[0] + p[1]) @ p[2] + p[3]) @ p[4] + p[5]


def without_biases(p, x):
    return relu(relu(x @ p[0]) @ p[1]) @ p[2]


def mean_pooled(p, x):
    h = relu(conv(relu(conv(x, p[0]) + p[1]), p[2], 2) + p[3])
    return h.mean((1, 2)) @ p[4]


def max_pooled(p, x):
    h = relu(conv(x, p[0]) + p[1])
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return h.reshape(len(x), -1) @ p[2]


def gated_stream(p, x):
    h = relu(x @ p[0] + p[1])
    for a, b, c in p[2]:
        h = relu(h + relu(h @ a + c) @ b)
    return h @ p[3]


def open_stream(p, x):
    h = x @ p[0] + p[1]
    for a, b, c in p[2]:
        h = h + relu(relu(h) @ a + c) @ b
    return relu(h) @ p[3]


def concatenated(p, x):
    a = relu(x @ p[0] + p[1])
    return jnp.concatenate([a, relu(a @ p[2] + p[3])], -1) @ p[4]


def tied(p, x):
    h = relu(x @ p[0])
    return relu(relu(h @ p[1] + p[2]) @ p[1] + p[3]) @ p[4]


def recurrent(p, x):
    step = lambda h, xt: (relu(xt @ p[0] + h @ p[1] + p[2]), None)  # noqa: E731
    start = jnp.zeros((len(x), p[1].shape[0]), x.dtype)
    return lax.scan(step, start, jnp.moveaxis(x, 1, 0))[0] @ p[3]


def stacked(p, x):
    step = lambda h, layer: (relu(h @ layer[0] + layer[1]), None)  # noqa: E731
    return lax.scan(step, relu(x @ p[0]), (p[1], p[2]))[0] @ p[3]


def maxout(p, x):
    h = jax.nn.leaky_relu(x @ p[0] + p[1])
    return (h @ p[2]).reshape(len(x), -1, 2).max(-1) @ p[3]


def two_linear(p, x):
    return relu(relu(x @ p[0] + p[1]) @ p[2] @ p[3]) @ p[4]


_BLOCK = ((5, 6), (6, 5), (6,))
# function, shapes of the parameters, shape of an input, a family whose bound should be met
NETWORKS = {
    "dense": (dense, [(6, 8), (8,), (8, 8), (8,), (8, 3), (3,)], (6,), True),
    "without biases": (without_biases, [(6, 8), (8, 8), (8, 3)], (6,), True),
    "mean pooled": (mean_pooled, [(3, 3, 1, 4), (4,), (3, 3, 4, 5), (5,), (5, 3)], (6, 6, 1), True),
    "max pooled": (max_pooled, [(3, 3, 1, 4), (4,), (36, 3)], (6, 6, 1), True),
    "gated stream": (gated_stream, [(5, 5), (5,), [_BLOCK, _BLOCK], (5, 3)], (5,), True),
    "open stream": (open_stream, [(5, 5), (5,), [_BLOCK, _BLOCK], (5, 3)], (5,), True),
    "concatenated": (concatenated, [(5, 6), (6,), (6, 7), (7,), (13, 3)], (5,), True),
    "tied": (tied, [(5, 6), (6, 6), (6,), (6,), (6, 3)], (5,), False),
    "recurrent": (recurrent, [(3, 5), (5, 5), (5,), (5, 2)], (4, 3), False),
    "stacked": (stacked, [(5, 6), (2, 6, 6), (2, 6), (6, 2)], (5,), False),
    "maxout": (maxout, [(5, 6), (6,), (6, 8), (4, 3)], (5,), False),
    "two linear": (two_linear, [(5, 6), (6,), (6, 6), (6, 6), (6, 3)], (5,), False),
}


def drawn(shapes, seed):
    """He weights, and biases of standard deviation 0.3."""
    is_shape = lambda s: isinstance(s, tuple) and all(isinstance(n, int) for n in s)  # noqa: E731
    leaves, tree = jax.tree.flatten(shapes, is_leaf=is_shape)
    rng = np.random.default_rng(seed)

    def weights(shape):
        size = 0.3 if len(shape) == 1 else np.sqrt(2 / np.prod(shape[:-1][-3:]))
        return (size * rng.normal(size=shape)).astype(np.float32)

    return jax.tree.unflatten(tree, [weights(s) for s in leaves])


def rank_on_many(fn, params, shape, count, seed=0):
    rng = np.random.default_rng(seed)
    size = 10 ** rng.uniform(-1, 1, size=(count, *[1] * len(shape)))
    x = (size * rng.normal(size=(count, *shape))).astype(np.float32)
    return int(jacobian_rank(fn, params, x, method="tsqr").rank)


def compare(name, seed, dense_limit=2000):
    """(lower, upper, certain, the rank on many inputs)."""
    fn, shapes, shape, _ = NETWORKS[name]
    params = drawn(shapes, seed)
    region = everywhere(np.zeros((1, *shape), np.float32))
    found = functional_dimension(fn, params, region, dense=dense_limit)
    rank = rank_on_many(fn, params, shape, 2000)
    if found.lower > rank:
        rank = max(rank, rank_on_many(fn, params, shape, 20000, seed=1))
    return found.lower, found.upper, found.certain, rank


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    arguments = parser.parse_args()
    columns = ("draws", "certain", "equal", "below the rank", "above the rank", "above upper")
    print("network", *columns, sep=" | ")
    for name in arguments.networks:
        counts = collections.Counter()
        for seed in range(arguments.draws):
            lower, upper, certain, rank = compare(name, seed)
            counts["draws"] += 1
            counts["certain"] += certain
            counts["equal"] += lower >= rank
            counts["below the rank"] += lower < rank
            counts["above the rank"] += lower > rank
            counts["above upper"] += lower > upper
            if lower > rank or lower < rank:
                print(f"  {name} {seed}: [{lower}, {upper}], rank {rank}", flush=True)
        print(name, *(counts[c] for c in columns), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
