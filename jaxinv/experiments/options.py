"""Options of an experiment: one field of its ``Config`` is one flag."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def option(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
) -> Any:
    """Declare a field of a ``Config`` together with its flag.

    Args:
        default: the default; ``False`` makes the flag a switch.
        help: the line ``--help`` shows.
        parse: turns the text of the flag into the value; not needed for a switch.
        metavar: what ``--help`` calls the value.

    Returns:
        a :func:`dataclasses.field`.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Config:
    ...     epochs: int = option(10, "passes over the data", parse=positive_int)
    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser, Config)
    >>> from_arguments(Config, parser.parse_args(["--epochs", "3"]))
    Config(epochs=3)
    """
    metadata = {"help": help, "parse": parse, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def data_option(help: str = "") -> Any:
    """Declare the field ``data``: where the images are, None for the bundled digits."""
    help = help or (
        "directory with the four .gz files of MNIST or Fashion-MNIST "
        "(default: the digits bundled with scikit-learn)"
    )
    return option(None, help, parse=directory, metavar="DIR")


def out_option(experiment: str, figure: str) -> Any:
    """Declare the field ``out``: where the results go."""
    default = Path("jaxinv-results") / experiment
    help = f"directory for {figure} and results.json, from which a run goes on"
    return option(default, help, parse=directory, metavar="DIR")


def count_option(default: int, help: str, *, metavar: str = "N") -> Any:
    """Declare a field that holds a whole number of 1 or more."""
    return option(default, help, parse=positive_int, metavar=metavar)


def seeds_option(default: int) -> Any:
    """Declare the field ``seeds``: how many times all of it is done, side by side."""
    return count_option(default, "repetitions, trained side by side", metavar="K")


def hidden_option(*default: int) -> Any:
    """Declare the field ``hidden``: the widths of the hidden layers."""
    return option(default, "widths of the hidden layers", parse=widths, metavar="N,N,...")


def add_arguments(parser: argparse.ArgumentParser, config: type) -> None:
    """Add a flag ``--field-name`` to ``parser`` for each field of ``config``."""
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", "-")
        if field.default is False:
            parser.add_argument(flag, action="store_true", help=field.metadata["help"])
        else:
            parser.add_argument(
                flag,
                type=field.metadata["parse"],
                default=field.default,
                metavar=field.metadata["metavar"],
                help=field.metadata["help"] + _default_text(field.default),
            )


def from_arguments(config: type[C], arguments: argparse.Namespace) -> C:
    """Build ``config`` from what :func:`add_arguments` made the parser return."""
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    return config(**{name: getattr(arguments, name) for name in names})


def positive_int(text: str) -> int:
    """Parse an integer of 1 or more.

    >>> positive_int("12")
    12
    """
    return _parse(text, int, lambda value: value >= 1, "a whole number of 1 or more")


def positive_float(text: str) -> float:
    """Parse a finite number above 0.

    >>> positive_float("0.1")
    0.1
    """
    return _parse(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def probability(text: str) -> float:
    """Parse the probability of dropping a unit, 0 ≤ P < 1.

    >>> probability("0.5")
    0.5
    """
    return _parse(text, float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def widths(text: str) -> tuple[int, ...]:
    """Parse the widths of the hidden layers.

    >>> widths("512,256")
    (512, 256)
    """
    return tuple(
        _parse(part, int, lambda value: value >= 1, "widths of hidden layers, such as 512,512")
        for part in text.split(",")
    )


def directory(text: str) -> Path:
    """Parse a directory; ``~`` is the home directory.

    >>> directory("data/mnist").name
    'mnist'
    """
    return Path(text).expanduser()


def _parse(
    text: str, convert: Callable[[str], Any], accept: Callable[[Any], bool], expected: str
) -> Any:
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _default_text(default: Any) -> str:
    if default is None:
        return ""
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f" (default: {default})"
