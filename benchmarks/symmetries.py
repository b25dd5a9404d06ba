"""Matrix symmetries and permutations at work: adapters from two factorisations, networks on a line.

    python benchmarks/symmetries.py --data ../shared/data/mnist

1. Low-rank adapters of a frozen network, trained from (B, A) and from (B·M, M⁻¹·A), the same
   function, by AdamW, by gradient descent and by `scale_by_matrix_symmetries`.
2. Two networks trained from different seeds, and the loss on the line between them: as they are,
   matched modulo permutations, and matched modulo permutations and rescalings.

In float64, so that what differs is not rounding.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import RESULTS, publish

from jaxinv import balance, networks, random_rescaling, rescale, rescaling_group
from jaxinv.experiments import datasets
from jaxinv.experiments.report import Table
from jaxinv.symmetries import match, permutation_group, scale_by_matrix_symmetries, symmetry_group

RANK = 4
RATES = {"AdamW": 1e-3, "SGD": 3e-2, "matrix-invariant": 1e-1}
STYLES = {"AdamW": "#d55e00", "SGD": "#0072b2", "matrix-invariant": "#009e73"}


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def trained(params: Any, x: jax.Array, y: jax.Array, steps: int, seed: int) -> Any:
    """By Adam on minibatches of 100."""
    tx = optax.adam(1e-3)

    @jax.jit
    def run(params, key):
        def step(carry, key):
            w, state = carry
            rows = jax.random.randint(key, (100,), 0, len(x))
            g = jax.grad(lambda w: cross_entropy(networks.mlp(w, x[rows]), y[rows]))(w)
            updates, state = tx.update(g, state, w)
            return (optax.apply_updates(w, updates), state), None

        carry = params, tx.init(params)
        return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][0]

    return run(params, jax.random.key(seed))


# --- adapters ---------------------------------------------------------------------------


def adapters(data: Any, width: int, steps: int) -> dict[str, Any]:
    """A network that has learnt the digits learns them upside down, by adapters alone."""
    x, y = data
    base = networks.init_mlp(jax.random.key(0), (x.shape[1], width, width, 10), dtype=x.dtype)
    base = trained(base, x, y, 1000, 0)
    turned = x[:, ::-1]
    names = ["Dense_0", "Dense_1"]

    def fn(w, x):
        whole = {
            n: layer | ({"kernel": layer["kernel"] + w[n]["B"] @ w[n]["A"]} if n in w else {})
            for n, layer in base.items()
        }
        return networks.mlp(whole, x)

    rng = np.random.default_rng(0)
    start, other = {}, {}
    for n in names:
        k, m = base[n]["kernel"].shape
        B, A = rng.normal(size=(k, RANK)) / np.sqrt(k), rng.normal(size=(RANK, m)) / np.sqrt(m)
        M = rng.normal(size=(RANK, RANK)) + 2 * np.eye(RANK)
        start[n] = {"A": jnp.asarray(A) / 4, "B": jnp.asarray(B) / 4}
        other[n] = {"A": jnp.asarray(np.linalg.solve(M, A)) / 4, "B": jnp.asarray(B @ M) / 4}
    group = symmetry_group(fn, start, turned[:8])
    transforms = {
        "AdamW": optax.adamw(RATES["AdamW"]),
        "SGD": optax.sgd(RATES["SGD"], momentum=0.9),
        "matrix-invariant": optax.chain(
            scale_by_matrix_symmetries(group), optax.sgd(RATES["matrix-invariant"], momentum=0.9)
        ),
    }

    def losses(tx, w):
        @jax.jit
        def run(w):
            def step(carry, key):
                w, state = carry
                rows = jax.random.randint(key, (100,), 0, len(x))
                loss, g = jax.value_and_grad(lambda w: cross_entropy(fn(w, turned[rows]), y[rows]))(
                    w
                )
                updates, state = tx.update(g, state, w)
                return (optax.apply_updates(w, updates), state), loss

            keys = jax.random.split(jax.random.key(5), steps)
            return jax.lax.scan(step, (w, tx.init(w)), keys)[1]

        return np.asarray(run(w))

    curves = {n: [losses(tx, start), losses(tx, other)] for n, tx in transforms.items()}
    return {"classes": [c.name for c in group.classes], "curves": curves}


# --- two networks on a line -----------------------------------------------------------------


def lines(data: Any, test: Any, width: int, steps: int, points: int = 25) -> dict[str, Any]:
    x, y = data
    sizes = (x.shape[1], width, width, 10)
    a, b = (
        trained(networks.init_mlp(jax.random.key(s), sizes, dtype=x.dtype), x, y, steps, s)
        for s in (1, 2)
    )
    scales = rescaling_group(networks.mlp, a, x[:1])
    # The second in another scale: the same function.
    b = rescale(scales, b, random_rescaling(scales, jax.random.key(3)).astype(x.dtype))
    units = permutation_group(networks.mlp, a, x[:1])
    ends = {
        "as they are": (a, b),
        "permuted": (a, match(units, a, b).params),
    }
    found = match(units, a, b, rescaling=scales)
    ends["permuted and rescaled"] = (balance(scales, a).params, found.params)
    at = jnp.linspace(0, 1, points)

    @jax.jit
    def measured(a, b):
        def one(t):
            w = jax.tree.map(lambda u, v: (1 - t) * u + t * v, a, b)
            logits = networks.mlp(w, test[0])
            return cross_entropy(logits, test[1]), (logits.argmax(-1) != test[1]).mean()

        return jax.lax.map(one, at)

    curves = {n: [np.asarray(v) for v in measured(*pair)] for n, pair in ends.items()}
    return {"at": np.asarray(at), "curves": curves}


def figure(found: dict[str, Any], data: str, out: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11, 4), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    for name, (one, other) in found["adapters"]["curves"].items():
        smooth = lambda v: np.convolve(v, np.ones(20) / 20, "valid")  # noqa: E731
        left.plot(smooth(one), color=STYLES[name], label=name)
        left.plot(smooth(other), color=STYLES[name], ls="--")
        middle.semilogy(np.maximum(abs(one - other), 1e-17), color=STYLES[name], lw=0.8)
    left.set(xlabel="step", ylabel="training loss (mean of 20 steps)", title="Adapters: loss")
    left.plot([], [], "k-", label="from (B, A)")
    left.plot([], [], "k--", label="from (B·M, M⁻¹·A)")
    left.legend(fontsize=8)
    middle.set(
        xlabel="step", ylabel="|difference of losses|", title="Adapters: between the two starts"
    )
    for (name, (loss, _)), color in zip(
        found["lines"]["curves"].items(), ("#999999", "#56b4e9", "#009e73"), strict=True
    ):
        right.semilogy(found["lines"]["at"], loss, color=color, label=name)
    right.set(xlabel="place on the line", ylabel="test loss", title="Two networks on a line")
    right.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 0.1))
    fig.suptitle(
        f"{data}, float64, one seed; two hidden layers, adapters of rank {RANK}", fontsize=10
    )
    fig.savefig(out / "symmetries.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="directory of MNIST-like files; else the digits")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the results")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    found_data = datasets.load(arguments.data)
    train = jnp.asarray(found_data.x_train, jnp.float64), jnp.asarray(found_data.y_train)
    test = jnp.asarray(found_data.x_test, jnp.float64), jnp.asarray(found_data.y_test)
    found = {
        "adapters": adapters(train, arguments.width, arguments.steps // 3),
        "lines": lines(train, test, arguments.width, arguments.steps),
    }
    rows = []
    for name, (one, other) in found["adapters"]["curves"].items():
        apart = abs(one - other)
        rows.append([f"adapters: {name}", f"{one[-50:].mean():.4f}", f"{other[-50:].mean():.4f}",
                     f"{np.median(apart):.1e}"])  # fmt: skip
    for name, (loss, error) in found["lines"]["curves"].items():
        rows.append([f"line: {name}", f"{loss[0]:.4f}", f"{loss[-1]:.4f}",
                     f"{loss.max():.4f} (error {100 * error.max():.1f} %)"])  # fmt: skip
    title = f"{found_data.name}: losses of both ends; median difference, or largest loss between"
    table = Table(title, ["what", "first", "second", "between"], rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure(found, found_data.name, arguments.out)
    publish("symmetries", table, found, arguments.out)


if __name__ == "__main__":
    main()
