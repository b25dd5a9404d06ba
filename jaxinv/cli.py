"""The ``jaxinv`` command.

``jaxinv reproduce EXPERIMENT`` runs one row of
:data:`jaxinv.experiments.EXPERIMENTS`, prints its table and writes its figure
and its numbers. ``jaxinv inspect MODULE:NAME`` reports on the user's own network, see
:mod:`jaxinv.inspection`. ``jaxinv report`` makes a page of
either, see :mod:`jaxinv.pages`. A mistake of the user ends in one message and exit code 2.

The command sets ``OPENBLAS_NUM_THREADS=1`` where it is not set: LAPACK's threads wait for XLA's,
and on a busy machine an SVD takes many times as long. Importing jaxinv changes no variable.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jaxinv
from jaxinv._extras import require
from jaxinv._text import printable, printable_json
from jaxinv.errors import JaxinvError
from jaxinv.experiments import EXPERIMENTS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        the exit code: 0, 2 for a mistake of the user, 130 if interrupted, 143 if terminated.

    Example:
        >>> import tempfile
        >>> main(["reproduce", "path-sgd", "--data", "nowhere", "--out", tempfile.mkdtemp()])
        2
    """
    # In time: jaxlib loads scipy's LAPACK, which reads this then, with the first decomposition.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(argv).parse_args(argv)
    try:
        {"reproduce": _reproduce, "inspect": _inspect, "report": _report}[arguments.command](
            arguments
        )
    except (JaxinvError, OSError) as error:
        print(f"jaxinv: error: {_shown(error)}", file=sys.stderr)  # noqa: T201
        return 2
    except (KeyboardInterrupt, _Terminated) as stop:
        if arguments.command == "reproduce":
            print("jaxinv: interrupted; the same command goes on from here", file=sys.stderr)  # noqa: T201
        return 143 if isinstance(stop, _Terminated) else 130
    return 0


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxinv", description="The invariances of neural networks, in pure functional JAX."
    )
    parser.add_argument("--version", action="version", version=f"jaxinv {jaxinv.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    reproduce = commands.add_parser("reproduce", help="run an experiment, write figure and numbers")
    experiments = reproduce.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, experiment in EXPERIMENTS.items():
        subparser = experiments.add_parser(
            name, help=experiment.summary, description=experiment.summary
        )
        # Only the experiment asked for is imported, so that the others cost nothing.
        if name in argv:
            from jaxinv.experiments import options

            options.add_arguments(subparser, importlib.import_module(experiment.module).Config)
    summary = "report on your own network: parameters, rescaling group, balance, path norm"
    inspect = commands.add_parser("inspect", help=summary, description=summary)
    inspect.add_argument(
        "target",
        metavar="MODULE:NAME",
        help="a function without arguments that returns (fn, params, x); "
        "MODULE is a file such as model.py, or an importable module",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON instead of text")
    summary = "write one HTML page about your own network, or about a finished experiment"
    page = commands.add_parser("report", help=summary, description=summary)
    page.add_argument(
        "target",
        metavar="TARGET",
        help="MODULE:NAME as for inspect; or results.json of an experiment, or its directory",
    )
    page.add_argument("--out", type=Path, default=Path("report.html"), help="default: report.html")
    page.add_argument(
        "--rank-limit",
        type=int,
        default=2000,
        metavar="D",
        help="spectrum up to this many parameters (default: 2000), rank on the given inputs up to "
        "as many parameters or rows, rank on all inputs up to 50 times as many",
    )
    return parser


def _report(arguments: argparse.Namespace) -> None:
    from jaxinv import inspection, pages
    from jaxinv.experiments import files

    target = Path(arguments.target)
    if target.is_dir() or target.suffix == ".json":
        text = pages.experiment_page(target)
    else:
        network = inspection.load(arguments.target)
        title, limit = arguments.target, arguments.rank_limit
        if sys.stderr.isatty():
            print("counting, which may take minutes; --rank-limit 0 leaves it out", file=sys.stderr)  # noqa: T201
        text = pages.model_page(*network, title=title, rank_limit=limit)
    with files.replacing(arguments.out) as new:
        new.write_text(text, encoding="utf-8")
    print(f"wrote {_shown(arguments.out)}")  # noqa: T201


def _inspect(arguments: argparse.Namespace) -> None:
    from jaxinv import inspection

    report = inspection.inspect(*inspection.load(arguments.target))
    text = _shown(report)
    if arguments.json:
        content = json.dumps(report.as_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        text = printable_json(content)
    print(text)  # noqa: T201


def _reproduce(arguments: argparse.Namespace) -> None:
    from jaxinv.experiments import files, options, report, resuming

    # What the end needs is looked for at the beginning, not after minutes of training.
    require("matplotlib", "cli")
    rich_progress = require("rich.progress", "cli")
    module: Any = importlib.import_module(EXPERIMENTS[arguments.experiment].module)
    config = options.from_arguments(module.Config, arguments)
    figure = config.out / module.FIGURE
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with _terminable(), resuming.opened(config.out, arguments.experiment, config) as store:
        with rich_progress.Progress(*columns, transient=True) as bars:
            task = bars.add_task("loading data and compiling", total=1.0)
            result = module.run(
                config,
                lambda fraction, what: bars.update(task, completed=fraction, description=what),
                store,
            )
        store.finish(module.record(result))
        with files.replacing(figure) as new:
            module.plot(result, new)
        table = module.table(result)
        with files.replacing(config.out / "table.md") as new:
            new.write_text(report.markdown(table) + "\n", encoding="utf-8")
    report.print_table(table)
    numbers = _shown(config.out / "results.json")
    print(f"wrote {_shown(figure)}, table.md and {numbers}")  # noqa: T201


def _shown(message: object) -> str:
    """A message, whatever the files and parameters in it are called."""
    return printable(str(message), keep="\n")


class _Terminated(BaseException):
    """The process was asked to end; like KeyboardInterrupt, no error of what it was doing."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that what is being written and locked is cleaned up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
