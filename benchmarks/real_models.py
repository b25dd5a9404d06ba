"""A zoo of real models: what becomes of every direction in which their parameters can move.

    pip install '.[zoo]'
    KERAS_BACKEND=jax python benchmarks/real_models.py

Each model is small, of generic parameters, in evaluation mode (`_zoo.py`). Of its Jacobian on
random inputs the null space is taken by an SVD of NumPy, in float64, and compared with what jaxinv
reads off the program: rescalings, matrices, shifts, and parameters that no output depends on. The
path norm is compared with the library's own outputs on ones at |w|^p, and where it exists the model
takes 20 steps of Path-SGD on digits, with clipping, decay and a schedule.
"""

import argparse
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import _replay
import _zoo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import RESULTS
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

from jaxinv import (
    UnsupportedOperation,
    path_norm,
    path_sgd,
    random_rescaling,
    rescale,
    tangent_vectors,
)
from jaxinv.experiments.files import write_json
from jaxinv.experiments.report import Table, environment, markdown, print_table
from jaxinv.symmetries import act, random_element, shift_tangents, spanning_tangents, symmetry_group

ZERO = 1e-9  # singular values below this share of the largest are 0


# --- null spaces ---------------------------------------------------------------------------


class NullSpace(NamedTuple):
    """d = rank + dead + rescaling + matrix + shift + rest."""

    parameters: int
    rank: int
    dead: int  # columns of zeros: no output depends on the parameter
    rescaling: int
    matrix: int  # beyond rescalings
    shift: int  # beyond both
    rest: int  # explained by none of these
    gap: float  # smallest singular value that counts ÷ largest that does not
    off: float  # how far the known directions are from the null space: ‖J v‖ / ‖J‖‖v‖


def jacobian(model: _zoo.Model, x: Any) -> np.ndarray:
    """The Jacobian of all outputs, carried out in float64."""
    with jax.enable_x64(True):
        theta, tree = ravel_pytree(_replay.doubled(model.params))
        fn = _replay.in_float64(model.fn)
        return np.asarray(jax.jit(jax.jacfwd(lambda theta: fn(tree(theta), x)))(theta))


def rank_of(rows: np.ndarray) -> int:
    """Of directions, each of length one."""
    rows = rows[np.linalg.norm(rows, axis=1) > 1e-12]
    if not len(rows):
        return 0
    s = np.linalg.svd(rows / np.linalg.norm(rows, axis=1, keepdims=True), compute_uv=False)
    return int((s > ZERO * s[0]).sum())


def null_space(model: _zoo.Model, group: Any, n: int | None = None) -> NullSpace:
    """What the null space of the Jacobian consists of."""
    d = sum(a.size for a in jax.tree.leaves(model.params))
    one = jax.eval_shape(model.fn, model.params, _zoo.inputs(model.x, 2))
    n = max(400, 3 * (2 * d // one.size + 1)) if n is None else n
    x = _zoo.inputs(model.x, n)
    J = jacobian(model, x)
    s = np.linalg.svd(J, compute_uv=False)
    rank = int((s > ZERO * s[0]).sum())
    dead = np.eye(d)[abs(J).max(0) < 1e-14 * abs(J).max()]
    with jax.enable_x64(True):
        params = _replay.doubled(model.params)
        scales = np.zeros((0, d))
        if group.rescaling.dim:
            scales = np.asarray(tangent_vectors(group.rescaling, params, dense=True)).T
        matrices = np.asarray(spanning_tangents(group, params))
    spans = [dead, scales, matrices]
    counts = [rank_of(np.concatenate(spans[: i + 1])) for i in range(3)]
    if counts[-1] < d - rank:
        spans.append(shifts(model))
    counts += [rank_of(np.concatenate(spans)), d - rank]
    known = np.concatenate(spans)
    size = np.linalg.norm(J) * np.linalg.norm(known, axis=1, keepdims=True)
    off = float(np.max(np.linalg.norm(known @ J.T / np.maximum(size, 1e-300), axis=1), initial=0))
    gap = float(s[rank - 1] / s[rank]) if rank < len(s) else np.inf
    return NullSpace(d, rank, *np.diff([0, *counts]).tolist(), gap, off)


def shifts(model: _zoo.Model) -> np.ndarray:
    """Shifts of biases and along axes of kernels, found on as many inputs as that takes."""
    x = _zoo.inputs(model.x, 40)
    while True:
        try:
            fn = _replay.in_float64(model.fn)
            return np.asarray(shift_tangents(fn, model.params, x).tangents)
        except ValueError as error:
            if "Pass more inputs" not in str(error) or len(jax.tree.leaves(x)[0]) > 1 << 14:
                raise
            x = _zoo.inputs(model.x, 2 * len(jax.tree.leaves(x)[0]))


def change(model: _zoo.Model, group: Any, seed: int = 3) -> tuple[float, float]:
    """Relative change of the outputs by a random rescaling, and by a random element of all."""
    x = _zoo.inputs(model.x, 20)
    with jax.enable_x64(True):
        fn, params = jax.jit(_replay.in_float64(model.fn)), _replay.doubled(model.params)
        key = jax.random.key(seed)
        u = random_rescaling(group.rescaling, key, dtype=jnp.float64)
        element = random_element(group, key, dtype=jnp.float64)
        moved = [rescale(group.rescaling, params, u), act(group, params, element)]
        before, *after = (np.asarray(fn(w, x)) for w in (params, *moved))
    return tuple(float(abs(y - before).max() / abs(before).max()) for y in after)


# --- path norms, and training by them ---------------------------------------------------------


def norms(model: _zoo.Model) -> dict[str, Any]:
    """γ for p = 1 and 2 beside the library's own outputs at |w|^p, or what refuses."""
    x = _zoo.inputs(model.x, 3)
    try:
        found = [
            float(path_norm(model.fn, model.params, x, p=p, batch_axis=model.batch_axis))
            for p in (1.0, 2.0)
        ]
    except UnsupportedOperation as error:
        return {"refused": str(error).split("`")[1], "part": _part(str(error)), "why": str(error)}
    assert model.powered is not None
    with jax.enable_x64(False):
        outputs = [float(np.sum(np.asarray(model.powered(p), np.float64))) for p in (1.0, 2.0)]
    return {"norms": found, "definition": [outputs[0], outputs[1] ** 0.5]}


def _part(message: str) -> str:
    """The layer that the refused operation is part of."""
    return message.split("part of `")[1].split("`")[0] if "part of `" in message else ""


STEPS, RATE = 20, 0.5


def optimizer(model: _zoo.Model, x: Any) -> optax.GradientTransformation:
    """Path-SGD as one would use any optimizer of optax."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, 3, STEPS + 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(1e-4),
        path_sgd(schedule, model.fn, x),
    )


def losses(model: _zoo.Model) -> np.ndarray:
    """Of 20 steps on 500 digits, from the model's parameters."""
    digits = load_digits()
    x = _zoo.shaped(model.x, jnp.asarray(digits.data[:500] / 8 - 1, jnp.float32))
    y = jnp.asarray(digits.target[:500])
    tx = optimizer(model, x[:1])

    def loss(params: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(model.fn(params, x), y).mean()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    params, state, found = model.params, tx.init(model.params), []
    for _ in range(STEPS):
        value, params, state = step(params, state)
        found.append(float(value))
    return np.array([*found, float(loss(params))])


# --- the table ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """All that is measured of a model."""

    space: NullSpace
    group: tuple[int, int]  # rescalings and matrices beyond them, as the program shows them
    changes: tuple[float, float]
    norms: dict[str, Any]
    losses: np.ndarray | None
    kappa: str  # what κ refuses of a model that has a path norm


def measure(model: _zoo.Model) -> Row:
    """Null space, invariance, path norm and 20 steps of a model."""
    group = symmetry_group(
        model.fn, model.params, _zoo.inputs(model.x, 3), batch_axis=model.batch_axis
    )
    found, trained, kappa = norms(model), None, ""
    if "norms" in found:
        try:
            trained = losses(model)
        except UnsupportedOperation as error:
            kappa = str(error)
    counts = group.rescaling.dim, group.beyond_rescaling
    return Row(null_space(model, group), counts, change(model, group), found, trained, kappa)


def cells(name: str, row: Row) -> list[str]:
    """A line of the table."""
    entry, space, norms = _zoo.ZOO[name], row.space, row.norms
    if "norms" in norms:
        norm = f"{norms['norms'][1]:.5g} ({norms['definition'][1]:.5g})"
    else:
        norm = f"no: {norms['part'] or norms['refused']}"
    steps = "no" if row.losses is None else f"{row.losses[0]:.2f} → {row.losses[-1]:.2f}"
    numbers = (space.parameters, space.rank, *space[3:6], space.dead, space.rest)
    return [
        entry.package, name, *map(str, numbers), f"{max(row.changes):.0e}", norm, steps
    ]  # fmt: skip


COLUMNS = (
    "package|model|d|rank|rescaling|matrix|shift|dead|rest|change|γ₂ (by the library)|Path-SGD"
)


def write(rows: dict[str, Row], out: Path) -> None:
    """`table.md` for reading, `results.json` with versions and a checksum."""
    names = {name: _zoo.ZOO[name] for name in rows}
    table = Table(
        "Real models: d = rank + rescaling + matrix + shift + dead + rest",
        COLUMNS.split("|"),
        [cells(name, row) for name, row in rows.items()],
    )
    packages = sorted({distribution(e.package) for e in names.values()})
    versions = {name: importlib.metadata.version(name) for name in packages}
    machine = environment()
    machine["versions"] |= versions
    rests = [f"- {n}, rest {e.rest}: {e.why}" for n, e in names.items() if e.why]
    with_versions = ", ".join(f"{k} {v}" for k, v in sorted(machine["versions"].items()))
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([markdown(table), LEGEND, "\n".join(rests), f"With {with_versions}."])
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    content = {name: plain(name, row) for name, row in rows.items()}
    write_json(out / "results.json", {"environment": machine, "models": content})
    print_table(table)


def plain(name: str, row: Row) -> dict[str, Any]:
    """A row for JSON, without messages that name files of this machine."""
    norms = {key: value for key, value in row.norms.items() if key != "why"}
    changed = {"space": row.space._asdict(), "norms": norms, "kappa": row.kappa.split("\n")[0]}
    return {"package": _zoo.ZOO[name].package, **row._asdict(), **changed}


LEGEND = (
    "The null space of the Jacobian is that of an SVD in float64. Change: the largest relative "
    "change of the outputs by a random rescaling or a random element of the whole group. γ₂: the "
    "path norm, beside the library's own outputs on ones at squared weights; where there is none, "
    "the layer that has no paths. Path-SGD: loss before and after 20 steps on 500 digits, with "
    "`clip_by_global_norm`, `add_decayed_weights` and a warm-up and cosine schedule."
)


def distribution(package: str) -> str:
    """What pip calls a package."""
    return {"haiku": "dm-haiku", "mamba2_jax": "mamba2-jax"}.get(package, package)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names of models; by default all")
    parser.add_argument("--out", type=Path, default=RESULTS / "real-models")
    arguments = parser.parse_args()
    rows = {}
    for name in arguments.models or _zoo.ZOO:
        if importlib.util.find_spec(_zoo.ZOO[name].package) is None:
            print(f"{name}: {_zoo.ZOO[name].package} is not installed")
            continue
        rows[name] = measure(_zoo.ZOO[name].build())
        print(*cells(name, rows[name]), sep=" | ", flush=True)
        print("   ", rows[name].space, rows[name].group, flush=True)
    write(rows, arguments.out)


if __name__ == "__main__":
    main()
