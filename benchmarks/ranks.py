"""What the ways to a rank cost next to each other.

    python benchmarks/ranks.py

* the certificate against the SVD, on 64-64-64-10 (8970 parameters), same answer;
* an ensemble of 256 networks in one vmapped call against a loop over the jitted function, and
  against NumPy's SVD in a loop and in a pool of two processes;
* memory of the tangent kernel against holding J, on 784-1024-1024-10 with 512 inputs, as the
  compiler plans it;
* `balance` of a network of 2.6 million parameters, compiled.
"""

import argparse
import multiprocessing
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _measure import RESULTS, interleaved_seconds, publish, spelled, timed

from jaxinv import balance, jacobian, jacobian_rank, networks, rescaling_group, tangent_kernel
from jaxinv.experiments.report import Table


def certificate(sizes=(64, 64, 64, 10), examples=2000):
    """Seconds of one run of each compiled program: an SVD of this size takes minutes.

    With fewer inputs some null directions belong to this sample of inputs and not to the
    rescalings, and then nothing can be certified.
    """
    params = networks.init_mlp(jax.random.key(1), sizes)
    x = jax.random.normal(jax.random.key(1), (examples, sizes[0]))
    answers, seconds = {}, {}
    for method in ("certificate", "svd"):
        rank = jax.jit(lambda w, x, m=method: jacobian_rank(networks.mlp, w, x, method=m))
        compiled = rank.lower(params, x).compile()
        took, found = timed(lambda compiled=compiled: compiled(params, x))
        answers[method], seconds[method] = int(found.rank), np.array([took])
    return answers, seconds


def _matrix_rank(J: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(J))


def ensemble(members=256, sizes=(8, 16, 16, 4), examples=200, repeats=3):
    """One vmapped call, a loop over the jitted one, and NumPy's SVD: a loop, a pool of two.

    NumPy gets Jacobians in float64 from a compiled function; its tolerance is its default.
    """
    keys = jax.random.split(jax.random.key(0), members)
    params = jax.vmap(lambda k: networks.init_mlp(k, sizes, bias_std=0.1))(keys)
    x = jax.random.normal(jax.random.key(1), (examples, sizes[0]))
    apart = [jax.tree.map(lambda a, i=i: a[i], params) for i in range(members)]

    @jax.jit
    def single(w):
        return jacobian_rank(networks.mlp, w, x)

    batched = jax.jit(jax.vmap(single))
    with jax.enable_x64(True):
        x64 = x.astype(jnp.float64)
        rows = jax.jit(lambda w: jacobian(networks.mlp, w, x64))

    def matrices():
        with jax.enable_x64(True):
            for w in apart:
                yield np.asarray(rows(jax.tree.map(lambda a: a.astype(jnp.float64), w)))

    with multiprocessing.get_context("spawn").Pool(2) as pool:
        functions = {
            "vmap": lambda: batched(params),
            "loop": lambda: [single(w) for w in apart],
            "numpy": lambda: list(map(_matrix_rank, matrices())),
            "pool": lambda: list(pool.imap(_matrix_rank, matrices(), chunksize=8)),
        }
        found = batched(params)
        same = np.array_equal(found.rank, functions["numpy"]())
        seconds = interleaved_seconds(functions, repeats)
    return same, float(np.mean(found.certain)), seconds


def kernel_memory(sizes=(784, 1024, 1024, 10), examples=512):
    """Bytes of results and temporaries of both programs; neither is run."""
    params = networks.init_mlp(jax.random.key(0), sizes)
    x = jax.ShapeDtypeStruct((examples, sizes[0]), jnp.float32)

    def planned(function):
        memory = jax.jit(function).lower(params, x).compile().memory_analysis()
        return memory.output_size_in_bytes + memory.temp_size_in_bytes

    return {
        "kernel": planned(lambda w, x: tangent_kernel(networks.mlp, w, x)),
        "J": planned(lambda w, x: jacobian(networks.mlp, w, x)),
    }


def balancing(sizes=(784, 1024, 1024, 720, 10), repeats=9):
    params = networks.init_mlp(jax.random.key(0), sizes)
    group = rescaling_group(networks.mlp, params, jnp.zeros((1, sizes[0])))
    seconds = interleaved_seconds({"balance": lambda: balance(group, params)}, repeats)["balance"]
    return sum(leaf.size for leaf in jax.tree.leaves(params)), seconds


def _seconds(values) -> str:
    return f"{spelled(values)} s"


def _rank(answers) -> str:
    return ", ".join(f"{method}: rank {rank}" for method, rank in answers.items())


def methods(out: Path) -> None:
    """Certificate against SVD, kernel against J, and `balance`."""
    answers, seconds = certificate()
    memory = kernel_memory()
    count, balanced = balancing()
    faster = (seconds["svd"] / seconds["certificate"]).mean()
    smaller = memory["J"] / memory["kernel"]
    rows = [
        ["64-64-64-10, 2000 inputs: certificate", _seconds(seconds["certificate"]), _rank(answers)],
        ["the same: svd", _seconds(seconds["svd"]), f"{faster:.1f} times the certificate"],
        ["784-1024-1024-10, 512 inputs: kernel", f"{memory['kernel'] / 1e9:.3g} GB", "planned"],
        ["the same: J", f"{memory['J'] / 1e9:.3g} GB", f"planned; {smaller:.0f} times"],
        [f"balance of {count} parameters", _seconds(balanced), ""],
    ]
    table = Table("Ranks: median (interquartile range)", ["what", "cost", ""], rows)
    numbers = {"answers": answers, "seconds": {**seconds, "balance": balanced}}
    publish("ranks", table, {**numbers, "bytes": memory}, out)


def ensembles(out: Path) -> None:
    """256 networks at once, one by one, and by NumPy."""
    same, certain, seconds = ensemble()
    titles = {
        "vmap": "one vmapped call",
        "loop": "a loop over the jitted call",
        "numpy": "NumPy's SVD in a loop",
        "pool": "NumPy's SVD in two processes",
    }
    rows = [
        [title, _seconds(seconds[name]), f"{np.median(seconds[name] / seconds['vmap']):.2f}"]
        for name, title in titles.items()
    ]
    title = (
        f"Ranks of 256 networks 8-16-16-4 on 200 inputs, {certain:.0%} certain; "
        f"equal to NumPy's: {same}; threads of OpenBLAS: "
        f"{os.environ.get('OPENBLAS_NUM_THREADS', 'as many as cores')}"
    )
    table = Table(title, ["how", "median (interquartile range)", "÷ vmap"], rows)
    publish("ensembles", table, {"seconds": seconds, "certain": certain}, out)


PARTS = {"methods": methods, "ensembles": ensembles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the results")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    for part in arguments.parts:
        PARTS[part](arguments.out)


if __name__ == "__main__":
    main()
