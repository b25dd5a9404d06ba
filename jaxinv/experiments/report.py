"""What every experiment and benchmark reports: where it ran, and a table."""

import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxinv
from jaxinv._extras import require
from jaxinv._text import printable

# Called with the fraction done (0 to 1) and what is being done.
Progress = Callable[[float, str], None]


class Table(NamedTuple):
    """A table of text, printed by the caller."""

    title: str
    columns: Sequence[str]  # a line break keeps a column narrow on a terminal
    rows: Sequence[Sequence[str]]


def markdown(table: Table) -> str:
    """Write ``table`` as Markdown.

    >>> print(markdown(Table("Squares", ["n", "n²"], [["2", "4"]])))
    Squares
    <BLANKLINE>
    | n | n² |
    |---|---|
    | 2 | 4 |

    Lines of a cell are parted by ``<br>``.
    """
    rows = [[cell.replace("\n", "<br>") for cell in row] for row in table.rows]
    lines = [[column.replace("\n", " ") for column in table.columns], *rows]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([table.title, "", head, "|" + "---|" * len(table.columns), *body])


def numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, to be compared from the right; names are read from the left.

    >>> numeric(Table("", ["model", "λ", "error"], [["2-2", "1/2", "-1.8"], ["ReLU", "", "+2"]]))
    [False, True, True]
    """
    empty = ("", "–")
    return [
        any(cells) and all(c in empty or c.lstrip("+-<")[:1].isdigit() for c in cells)
        for cells in ([row[i] for row in table.rows] for i in range(len(table.columns)))
    ]


def print_table(table: Table) -> None:
    """Print ``table`` on the terminal; needs the extra ``cli``."""
    box = require("rich.box", "cli").SIMPLE  # no side borders: eight columns fit a terminal of 80
    shown = functools.partial(printable, keep="\n")
    rich_table = require("rich.table", "cli").Table(
        title=shown(table.title),
        title_justify="left",
        box=box,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column, is_number in zip(map(shown, table.columns), numeric(table), strict=True):
        rich_table.add_column(column, justify="right" if is_number else "left", no_wrap=True)
    for row in table.rows:
        rich_table.add_row(*map(shown, row))
    console = require("rich.console", "cli").Console()
    # rich would cut cells off to fit the terminal; numbers are rather wrapped than lost.
    unlimited = console.options.update(max_width=1000)
    needed = require("rich.measure", "cli").Measurement.get(console, unlimited, rich_table).maximum
    console.width = max(console.width, needed)
    console.print(rich_table)


def environment() -> dict[str, Any]:
    """Describe the versions and the hardware that produced a number.

    Returns:
        versions of Python, jax, jaxlib, optax, flax, numpy and jaxinv; the
        devices jax computes on; the model and the number of cores of the CPU.

    >>> sorted(environment())
    ['cpu', 'cpu_cores', 'device', 'device_count', 'operating_system', 'platform', 'versions']
    """
    libraries = ["jax", "jaxlib", "optax", "flax", "numpy"]
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in libraries},
            "jaxinv": jaxinv.__version__,
        },
        "platform": device.platform,
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "operating_system": platform.system(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
