"""A fuzz of ranks: small networks of exactly known rank, every method, dtype and transformation.

`python -m tests.ground_truth.rank_fuzz --networks 5000 --seed 0` prints a table by kind and method
and exits with 1 if any answer is certain and wrong. The true rank is that of the function meant, in
real numbers, at the numbers given: casts and saturation inside a program change nothing of it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinv import jacobian_rank
from jaxinv.ranks.exact import exact_rank
from tests.ground_truth.by_differences import fractions, jacobian_by_differences, rank_of_fractions

METHODS = ("auto", "svd", "tsqr", "gram", "certificate")
DTYPES = (np.float64, np.float32)
ENSEMBLE = 64
relu = jax.nn.relu


# --- networks, as jax runs them and as they are meant --------------------------------------
# The second of each pair is plain arithmetic: for jax, and for Fractions in object arrays.


def gate(z):
    return z * (z > 0).astype(z.dtype)


def mlp(w, x):
    return relu(relu(x @ w[0] + w[1]) @ w[2]) @ w[3]


def mlp_meant(w, x):
    return gate(gate(x @ w[0] + w[1]) @ w[2]) @ w[3]


def shallow(w, x):
    return relu(x @ w[0] + w[1]) @ w[2] + w[3]


def shallow_meant(w, x):
    return gate(x @ w[0] + w[1]) @ w[2] + w[3]


def residual(w, x):
    h = x @ w[0]
    h = h + relu(h @ w[1]) @ w[2]
    return h @ w[3]


def residual_meant(w, x):
    h = x @ w[0]
    h = h + gate(h @ w[1]) @ w[2]
    return h @ w[3]


def conv(w, x):
    """A 2x2 convolution, relu, the mean of 2x2 windows, a linear layer."""
    images = x.reshape(-1, 3, 3, 1)
    h = lax.conv_general_dilated(images, w[0], (1, 1), "VALID", dimension_numbers=_NHWC)
    h = lax.reduce_window(
        relu(h), np.zeros((), h.dtype)[()], lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    return (h / 4).reshape(len(x), -1) @ w[1]


_NHWC = ("NHWC", "HWIO", "NHWC")


def conv_meant(w, x):
    total = 0
    for i in (0, 3):
        for j in (0, 1):
            patch = x[:, [i + j, i + j + 1, i + j + 3, i + j + 4]]
            total = total + gate(patch @ w[0].reshape(4, -1))
    return total / 4 @ w[1]


def linear(w, x):
    return x @ w[0]


B = np.random.default_rng(5).integers(-127, 128, (3, 6)) / 64.0  # exact in bf16


def cast_features(w, x):
    small = jnp.asarray(x, jnp.bfloat16) @ jnp.asarray(B, jnp.bfloat16)
    return small.astype(x.dtype) @ w[0]


def cast_features_meant(w, x):
    features = fractions(B) if x.dtype == object else B
    return x @ features @ w[0]


def cast_hidden(w, x):
    return relu(x @ w[0] + w[1]).astype(jnp.bfloat16).astype(x.dtype) @ w[2] + w[3]


def softmax(scale):
    def network(w, x):
        return jax.nn.softmax(scale * shallow(w, x))

    return network


def softmax_meant(w, x):
    """The derivative of softmax is invertible on differences of logits, and 0 along (1, ..., 1)."""
    z = shallow_meant(w, x)
    return z[:, 1:] - z[:, :1]


# Each object once: what is compiled for a network is used for all weights of its shapes.
SOFTMAX = {scale: softmax(scale) for scale in (1.0, 60.0, 2000.0)}
SHAPES: dict[Any, list[tuple[int, ...]]] = {
    mlp: [(3, 4), (4,), (4, 3), (3, 2)],
    shallow: [(3, 4), (4,), (4, 2), (2,)],
    residual: [(3, 4), (4, 3), (3, 4), (4, 2)],
    conv: [(2, 2, 1, 3), (3, 2)],
    linear: [(3, 2)],
    cast_features: [(6, 2)],
    cast_hidden: [(3, 4), (4,), (4, 2), (2,)],
}
MEANT = {
    mlp: mlp_meant, shallow: shallow_meant, residual: residual_meant, conv: conv_meant,
    linear: linear, cast_features: cast_features_meant, cast_hidden: shallow_meant,
}  # fmt: skip
for _network in SOFTMAX.values():
    SHAPES[_network], MEANT[_network] = SHAPES[shallow], softmax_meant


# --- weights and inputs ---------------------------------------------------------------------


def normal(rng, network, n=20):
    features = 9 if network is conv else 3
    w = [rng.normal(size=s).astype(np.float32).astype(np.float64) for s in SHAPES[network]]
    return w, rng.normal(size=(n, features)).astype(np.float32).astype(np.float64)


def integers(rng, network, n=20):
    features = 9 if network is conv else 3
    w = [rng.integers(-4, 5, s).astype(float) for s in SHAPES[network]]
    return w, rng.integers(-4, 5, (n, features)).astype(float)


def either(rng, network, n=20):
    return (normal if rng.random() < 0.5 else integers)(rng, network, n)


def plain(rng, network):
    return either(rng, network)


def duplicated_units(rng, network):
    """A hidden unit of the first layer twice, with the same or another way out."""
    w, x = either(rng, network)
    w[0][..., 1] = w[0][..., 0]
    if network is not conv:
        w[1][1] = w[1][0]
    out = 1 if network is conv else 2
    if rng.random() < 0.5:
        w[out][1] = w[out][0]
    return w, x


def rescaled(rng, network):
    """Units of the first hidden layer by powers of two up to 2^±24: the function is the same."""
    w, x = either(rng, network)
    k = rng.integers(-24, 25, w[0].shape[-1]) * (rng.random(w[0].shape[-1]) < 0.7)
    if rng.random() < 0.3:
        k = np.full_like(k, rng.choice([-24, -5, 5, 24]))
    w[0] = np.ldexp(w[0], k)
    if network is conv:
        w[1] = np.ldexp(w[1], -k[:, None])
    else:
        w[1], w[2] = np.ldexp(w[1], k), np.ldexp(w[2], -k[:, None])
    if network is mlp and rng.random() < 0.5:
        k = rng.integers(-24, 25, 3)
        w[2], w[3] = np.ldexp(w[2], k), np.ldexp(w[3], -k[:, None])
    return w, x


def near_duplicate_units(rng, network):
    w, x = either(rng, network)
    k = int(rng.integers(10, 51))
    w[0][..., 1] = w[0][..., 0]
    w[0].reshape(-1, w[0].shape[-1])[0, 1] += np.ldexp(1.0, -k)
    if network is not conv:
        w[1][1] = w[1][0]
    return w, x


def near_duplicate_features(rng, network):
    w, x = integers(rng, network)
    x[:, 1] = x[:, 0]
    x[0, 1] += np.ldexp(1.0, -int(rng.integers(10, 51)))
    return w, x


def with_a_mean(rng, network):
    w, x = integers(rng, network)
    return w, x + np.ldexp(1.0, int(rng.choice([10, 20, 30])))


def zeros(rng, network):
    """Inputs, weights or whole units that are 0, and units that never fire."""
    w, x = either(rng, network)
    if rng.random() < 0.5:
        x[:, rng.integers(x.shape[1])] = 0
    for leaf in w:
        leaf[rng.random(leaf.shape) < 0.2] = 0
    if network is not conv and rng.random() < 0.5:
        w[1][rng.integers(4)] = -1024.0
    return w, x


def of_few_inputs(rng, network):
    """The same inputs again and again, or in one plane, or zero but a few."""
    w, x = either(rng, network)
    how = rng.integers(3)
    if how == 0:
        x[4:] = x[rng.integers(0, 4, len(x) - 4)]
    elif how == 1:
        basis = rng.integers(-3, 4, (2, x.shape[1])).astype(float)
        x = rng.integers(-4, 5, (len(x), 2)).astype(float) @ basis
    else:
        x[3:] = 0
    return w, x


def few_rows(rng, network):
    return either(rng, network, n=5)


def magnitudes(rng, network):
    """Every leaf and input by its own power of two: derivatives of very different sizes."""
    w, x = either(rng, network)
    w = [np.ldexp(leaf, int(rng.integers(-30, 31))) for leaf in w]
    return w, np.ldexp(x, rng.integers(-20, 21, x.shape[1]))


NETS = (mlp, shallow, residual, conv)
KINDS: list[tuple[str, Callable, tuple]] = [
    ("plain", plain, NETS),
    ("duplicated units", duplicated_units, (mlp, shallow, conv)),
    ("rescaled", rescaled, (mlp, shallow, conv)),
    ("near-duplicate units", near_duplicate_units, (mlp, shallow, conv)),
    ("near-duplicate features", near_duplicate_features, (linear, shallow, residual)),
    ("inputs with a mean", with_a_mean, (linear, mlp, shallow, residual)),
    ("zeros", zeros, NETS),
    ("few inputs", of_few_inputs, NETS),
    ("few rows", few_rows, NETS),
    ("magnitudes", magnitudes, NETS),
    ("softmax", plain, tuple(SOFTMAX.values())),
    ("softmax, magnitudes", magnitudes, tuple(SOFTMAX.values())),
    ("casts", normal, (cast_features, cast_hidden)),
]
# Where no guess is needed, most answers must be certain.
PROVEN = ("plain", "rescaled")
# Asked by jit and eagerly too; compiling every network three times would take most of the time.
APART = (linear, shallow)


class Case(NamedTuple):
    kind: str
    network: Callable
    w: list[np.ndarray]
    x: np.ndarray
    rank: int


def true_rank(network, w, x):
    found = exact_rank(MEANT[network], w, x)
    assert found.agreed, (network, w, x)
    return found.rank


def rank_by_differences(case):
    """The true rank by another road; None at a kink."""
    J = jacobian_by_differences(MEANT[case.network], case.w, case.x)
    return None if J is None else rank_of_fractions(J)


def cases(kind, draw, network, count, rng):
    out = []
    for _ in range(count):
        w, x = draw(rng, network)
        out.append(Case(kind, network, w, x, true_rank(network, w, x)))
    return out


# --- decisions ----------------------------------------------------------------------------------


@cache
def compiled(network, method, dtype, ensemble):
    def rank(w, x):
        return jacobian_rank(network, w, x, method=method, dtype=dtype)

    return jax.jit(jax.vmap(rank) if ensemble else rank)


def decisions(batch, method, dtype, apart):
    """(case, way, rank, certain): all of the ensemble by vmap, the first few by jit and eagerly."""
    stacked = jax.tree.map(lambda *a: np.stack(a), *[(c.w, c.x) for c in batch])
    network = batch[0].network
    found = compiled(network, method, dtype, True)(*stacked)
    yield from zip(batch, ["vmap"] * len(batch), np.asarray(found.rank).tolist(),
                   np.asarray(found.certain).tolist(), strict=True)  # fmt: skip
    asked = method == "auto" and batch[0].kind in PROVEN
    for number, case in enumerate(batch[: 8 * apart if asked else apart]):
        if network not in APART and not asked:
            break
        if number < apart:
            found = compiled(network, method, dtype, False)(case.w, case.x)
            yield case, "jit", int(found.rank), bool(found.certain)
        found = jacobian_rank(network, case.w, case.x, method=method, dtype=dtype)
        yield case, "eager", int(found.rank), bool(found.certain)


class Report(NamedTuple):
    counts: Counter  # (kind, method, dtype, what)
    faults: list  # (case, method, dtype, way, rank) that were certain and wrong

    def share(self, kind, method, dtype, way="eager"):
        """Of the answers of one way of asking, those right and certain."""
        key = (kind, f"{method}, {way}", np.dtype(dtype).name)
        return self.counts[(*key, "right, certain")] / max(1, self.counts[(*key, "asked")])


def fuzz(networks, seed, *, methods=METHODS, dtypes=DTYPES, apart=1, only=None, of=None,
         progress=False):  # fmt: skip
    """Ask every method about so many networks, of some kinds `only` and `of` some networks."""
    rng, report = np.random.default_rng(seed), Report(Counter(), [])
    families = [(kind, draw, net) for kind, draw, nets in KINDS for net in nets
                if (only is None or kind in only) and (of is None or net in of)]  # fmt: skip
    per_family = -(-networks // len(families))
    size = min(ENSEMBLE, per_family)
    with jax.enable_x64(True):
        for number, (kind, draw, network) in enumerate(families):
            for _ in range(-(-per_family // size)):
                batch = cases(kind, draw, network, size, rng)
                for method in methods:
                    for dtype in dtypes:
                        for answer in decisions(batch, method, dtype, apart):
                            _count(report, method, dtype, *answer)
            if progress:
                print(f"{number + 1}/{len(families)} {kind}, {network.__name__}", file=sys.stderr)
    return report


def _count(report, method, dtype, case, way, rank, certain):
    key = (
        case.kind,
        f"{method}, {'eager' if way == 'eager' else 'compiled'}",
        np.dtype(dtype).name,
    )
    report.counts[(*key, "asked")] += 1
    if rank >= 0:
        report.counts[(*key, "decided")] += 1
        report.counts[(*key, "wrong")] += rank != case.rank
    if certain:
        right = rank == case.rank
        report.counts[(*key, "right, certain" if right else "WRONG, CERTAIN")] += 1
        if not right:
            report.faults.append((case, method, dtype, way, rank))


COLUMNS = ("asked", "decided", "wrong", "WRONG, CERTAIN", "right, certain")


def table(report):
    order = [kind for kind, *_ in KINDS]
    keys = sorted({key[:3] for key in report.counts}, key=lambda k: (order.index(k[0]), k[1:]))
    lines = ["| kind | method | dtype | " + " | ".join(COLUMNS) + " |", "|---" * 8 + "|"]
    for key in keys:
        numbers = [str(report.counts[(*key, what)]) for what in COLUMNS]
        lines.append("| " + " | ".join([*key, *numbers]) + " |")
    totals = [str(sum(n for k, n in report.counts.items() if k[3] == what)) for what in COLUMNS]
    return "\n".join([*lines, "| all | | | " + " | ".join(totals) + " |"])


def snippet(fault):
    """Python that shows one fault."""
    case, method, dtype, way, rank = fault
    names = {f: f"SOFTMAX[{scale}]" for scale, f in SOFTMAX.items()}
    name, dtype = names.get(case.network, case.network.__name__), np.dtype(dtype).name
    options = f"method={method!r}, dtype=np.{dtype}"
    return "\n".join(
        [
            f"# {case.kind}: {method}, {dtype}, {way}: {rank} (certain), true {case.rank}",
            "from tests.ground_truth.rank_fuzz import *",
            f"w = [{', '.join(f'np.array({w.tolist()!r})' for w in case.w)}]",
            f"x = np.array({case.x.tolist()!r})",
            "with jax.enable_x64(True):",
            f"    print(jacobian_rank({name}, w, x, {options}), 'true', true_rank({name}, w, x))",
            "",
        ]
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--snippets", type=int, default=0, help="show so many faults as programs")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--kinds", nargs="*", choices=[kind for kind, *_ in KINDS])
    options = parser.parse_args(arguments)
    report = fuzz(options.networks, options.seed, methods=options.methods, only=options.kinds,
                  progress=True)  # fmt: skip
    print(table(report))
    for kind in PROVEN:
        if options.kinds is None or kind in options.kinds:
            shares = {np.dtype(t).name: f"{report.share(kind, 'auto', t):.1%}" for t in DTYPES}
            print(f"right and certain, {kind}, auto: {shares}")
    for fault in report.faults[: options.snippets]:
        print(snippet(fault))
    return bool(report.faults)


if __name__ == "__main__":
    sys.exit(main())
