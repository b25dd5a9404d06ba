"""The degrees of freedom of a ReLU network: the singular values of its Jacobian fall off a cliff.

Of the d parameters, dim(group) are lost to node-wise rescaling, on any inputs. Inputs lose more:
a pixel that is always 0 and a unit that never fires make parameters dead, and what then remains of
the null space is unexplained:

    d = rank + rescaling + dead + unexplained + unseen

Both terms are measured on standard normal inputs and on images. The rank is that of float64, with
its error bounds; next to it stands what NumPy's default tolerance, max(n·out, d)·ε·σ₁, makes of the
spectrum in float64 and in float32, where it also counts away singular values that are not zero.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv._checks import leaf_names
from jaxinv._extras import require
from jaxinv.errors import InvalidInput
from jaxinv.experiments import datasets, resuming, training
from jaxinv.experiments.options import count_option, data_option, hidden_option, option, out_option
from jaxinv.experiments.report import Progress, Table
from jaxinv.experiments.resuming import Cell, Thunks
from jaxinv.experiments.training import Running
from jaxinv.networks import init_mlp, mlp
from jaxinv.ranks import dead_names, degrees_of_freedom, jacobian_spectrum
from jaxinv.rescaling import rescaling_group
from jaxinv.typing import Params

FIGURE = "spectra.png"
PRECISIONS = ("float64", "float32")
_DIGITS = "digits"


def spread(text: str) -> float:
    """Parse a standard deviation, 0 included.

    >>> spread("0.5")
    0.5
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which network, on which inputs."""

    data: Path | None = data_option()
    out: Path = out_option("degrees-of-freedom", FIGURE)
    hidden: tuple[int, ...] = hidden_option(32, 32)
    examples: int = count_option(
        1000,
        "standard normal inputs, and images of --data (of the digits all 1437 are taken); memory "
        "and time grow with it and with the square of the number of parameters",
    )
    pool: int = count_option(
        1, "average the images over squares of this side: fewer pixels, fewer parameters"
    )
    bias_std: float = option(0.0, "standard deviation of the biases", parse=spread, metavar="STD")
    seeds: int = count_option(1, "networks: those of the seeds 0, ..., K - 1", metavar="K")


class Split(NamedTuple):
    """What becomes of every parameter of one network on one kind of inputs."""

    inputs: str
    seed: int
    examples: int
    rows: int  # n·out
    parameters: int  # d
    group_dimension: int
    rank: int
    rescaling: int
    dead: int
    unexplained: int
    unseen: int
    certain: bool
    smallest: float  # σ_rank
    error: float  # bound on the error of a singular value
    dead_names: list[str]
    dead_by_leaf: dict[str, int]  # leaf -> number of its dead elements, if any
    spectra: dict[str, np.ndarray]  # [precision] -> (min(rows, d),), descending
    numpy_rank: dict[str, int]  # [precision]: singular values above NumPy's default tolerance


class Result(NamedTuple):
    """What :func:`run` computes."""

    config: Config
    sizes: tuple[int, ...]
    splits: list[Split]


@training.driver
def run(config: Config, running: Running) -> Result:
    """Split d = rank + rescaling + dead + unexplained + unseen, and compute the spectra.

    Raises:
        DataError: if ``config.data`` cannot be read.
        InvalidInput: if its images cannot be averaged over squares of that side.

    >>> result = run(Config(hidden=(2,), examples=1437))  # as many as there are digits
    >>> normal, digits = result.splits
    >>> normal.parameters, normal.rank, normal.rescaling, normal.dead, normal.unexplained
    (160, 158, 2, 0, 0)
    """
    data = datasets.load(config.data)
    data = data._replace(x_train=pooled(np.asarray(data.x_train), config.pool))
    sizes = (data.x_train.shape[1], *config.hidden, data.num_classes)
    images = data.x_train if config.data is None else data.x_train[: config.examples]
    inputs = {
        "standard normal": jax.random.normal(jax.random.key(1), (config.examples, sizes[0])),
        _DIGITS if config.data is None else data.name: jnp.asarray(images),
    }
    total = config.seeds * len(inputs)
    studies: dict[str, Thunks] = {}
    for seed in range(config.seeds):
        params = init_mlp(jax.random.key(seed), sizes, bias_std=config.bias_std)
        splits = {}
        for i, (name, x) in enumerate(inputs.items()):

            def report(part: float, what: str, done: int = seed * len(inputs) + i) -> None:
                running.progress((done + part) / total, what)

            splits[name] = functools.partial(_split, params, x, name, seed, report)
        studies[f"seed {seed}"] = splits
    cells = resuming.compute(studies, *running)
    return Result(config, sizes, [_read(cell) for row in cells.values() for cell in row.values()])


def pooled(x: np.ndarray, side: int) -> np.ndarray:
    """Average square images over squares of ``side`` pixels, (n, pixels) -> (n, pixels / side²).

    Raises:
        InvalidInput: if the images are no squares, or ``side`` does not divide theirs.

    >>> pooled(np.arange(16.0)[None], 2).tolist()
    [[2.5, 4.5, 10.5, 12.5]]
    """
    if side == 1:
        return x
    width = round(x.shape[1] ** 0.5)
    if width**2 != x.shape[1] or width % side:
        raise InvalidInput(
            f"images of {x.shape[1]} pixels cannot be averaged over squares of side {side}; "
            "choose a --pool that divides the side of the images"
        )
    blocks = x.reshape(-1, width // side, side, width // side, side)
    return blocks.mean((2, 4), dtype=x.dtype).reshape(len(x), -1)


def _read(cell: Cell) -> Split:
    spectra = {name: np.array(values, name) for name, values in cell["spectra"].items()}
    return Split(**{**cell, "spectra": spectra})


def _split(params: Params, x: jax.Array, name: str, seed: int, progress: Progress) -> Cell:
    found = degrees_of_freedom(mlp, params, x)
    progress(0.4, f"{name}, seed {seed}: rank")
    d, rows = int(found.parameters), len(x) * mlp(params, x[:1]).shape[1]
    # QR of chunk after chunk never holds J, but d² numbers, which is more where J is flat.
    method: Any = "tsqr" if rows >= d else "svd"
    spectra, counts = {}, {}
    for i, precision in enumerate(PRECISIONS):
        s = np.asarray(jacobian_spectrum(mlp, params, x, method=method, dtype=precision))
        spectra[precision] = s
        counts[precision] = numpy_rank(s, rows, d)
        progress(0.7 + 0.3 * i, f"{name}, seed {seed}: spectrum in {precision}")
    masks = zip(leaf_names(params, ""), jax.tree.leaves(found.dead_mask), strict=True)
    return Split(
        inputs=name,
        seed=seed,
        examples=len(x),
        rows=rows,
        parameters=d,
        group_dimension=rescaling_group(mlp, params, x).dim,
        rank=int(found.rank),
        rescaling=int(found.rescaling),
        dead=int(found.dead),
        unexplained=int(found.unexplained),
        unseen=int(found.unseen),
        certain=bool(found.certain),
        smallest=float(spectra["float64"][int(found.rank) - 1]),
        error=float(found.evidence.error),
        dead_names=dead_names(found.dead_mask),
        dead_by_leaf={leaf: int(mask.sum()) for leaf, mask in masks if mask.any()},
        spectra=spectra,
        numpy_rank=counts,
    )._asdict()


def numpy_rank(values: np.ndarray, rows: int, columns: int) -> int:
    """Count singular values as ``numpy.linalg.matrix_rank`` does by default.

    The number of σ_i > max(rows, columns)·ε·σ₁, with ε of the dtype of the values.

    Args:
        values: singular values, descending.
        rows: of the matrix.
        columns: of the matrix.

    Returns:
        the count.

    >>> A = np.diag(np.array([1.0, 1e-6, 1e-8], np.float32))
    >>> numpy_rank(np.diag(A), 3, 3), int(np.linalg.matrix_rank(A))
    (2, 2)
    """
    tolerance = values[0] * max(rows, columns) * np.finfo(values.dtype).eps
    return int(np.sum(values > tolerance))


def table(result: Result) -> Table:
    """Write every sum d = rank + rescaling + dead + unexplained + unseen, and what is dead."""
    rows, notes = [], []
    for split in result.splits:
        terms = (split.rank, split.rescaling, split.dead, split.unexplained, split.unseen)
        rows.append(
            [
                split.inputs,
                str(split.seed),
                str(split.examples),
                str(split.parameters),
                *map(str, terms),
                "yes" if split.certain else "no",
                *(str(split.numpy_rank[precision]) for precision in PRECISIONS),
            ]
        )
        if split.rows < split.parameters:
            outputs = split.rows // split.examples
            notes.append(
                f"{split.inputs}, seed {split.seed}: limited by {split.rows} rows; "
                f"at least {-(-split.parameters // outputs)} inputs are needed"
            )
        if split.dead:
            where = ", ".join(f"{count} in {leaf}" for leaf, count in split.dead_by_leaf.items())
            notes.append(f"dead on {split.inputs}, seed {split.seed}: {where}")
    title = f"{_network(result)}; d = rank + rescaling + dead + unexplained + unseen"
    columns = ["inputs", "seed", "n", "d", "rank", "rescaling", "dead", "unexplained"]
    columns += ["unseen", "certain"]
    columns += [f"NumPy\n{precision}" for precision in PRECISIONS]
    return Table("\n".join([title, *notes]), columns, rows)


def record(result: Result) -> dict[str, Any]:
    """Return what ``results.json`` says next to the cells."""
    return {"sizes": result.sizes}


def plot(result: Result, path: Path) -> None:
    """Draw the spectra of the first network, in both precisions, and what becomes of d."""
    figure_module = require("matplotlib.figure", "cli")
    splits = [split for split in result.splits if split.seed == 0]
    figure = figure_module.Figure(figsize=(6.4 * len(splits), 5), layout="constrained")
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        for precision, values in split.spectra.items():
            index = np.arange(1, len(values) + 1)
            # A computed zero has no logarithm; it is as good as the smallest number of a float64.
            shown = np.maximum(values, np.finfo(np.float64).eps ** 2)
            axes.plot(index, shown, label=f"computed in {precision}", linewidth=1.6)
            tolerance = values[0] * max(split.rows, split.parameters) * np.finfo(values.dtype).eps
            color = axes.lines[-1].get_color()
            axes.axhline(
                tolerance, color=color, linestyle=":", label=f"NumPy's tolerance, {precision}"
            )
        d, rank = split.parameters, split.rank
        axes.axvline(rank, color="C2", linestyle="-.", label=f"rank = {rank}")
        # What explains the parameters without a singular value, from the right.
        end = d
        for count, name, color in (
            (split.rescaling, "rescaling", "0.25"),
            (split.dead, "dead", "0.55"),
            (split.unexplained, "unexplained", "C3"),
            (split.unseen, "unseen", "C4"),
        ):
            if count:
                axes.axvspan(
                    end - count, end, color=color, alpha=0.3, linewidth=0, label=f"{count} {name}"
                )
            end -= count
        axes.set(
            yscale="log",
            xlim=(0, d * 1.02),
            xlabel=f"index of the singular value, 1 … d = {d}",
            ylabel="singular value of the Jacobian",
            title=f"{split.inputs}: n = {split.examples} inputs, {split.rows} rows\n"
            + ("rank proven" if split.certain else "rank not proven"),
        )
        axes.legend(loc="lower left", fontsize="small")
    figure.suptitle(f"{_network(result)}, network of seed 0: where the spectrum falls is the rank")
    figure.savefig(path, dpi=150)


def _network(result: Result) -> str:
    pool = result.config.pool
    averaged = f", images averaged over {pool}×{pool} pixels" if pool > 1 else ""
    return f"{'-'.join(map(str, result.sizes))} with biases{averaged}"
