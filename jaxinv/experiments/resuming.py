"""Results that survive an interruption: cells of studies, kept in ``results.json`` as they come."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxinv.errors import InvalidInput

Cell = dict[str, Any]  # numbers and lists of them: what JSON gives back is what went in
Cells = dict[str, Cell]


def identity(experiment: str, config: Any) -> dict[str, Any]:
    """Return what ``results.json`` says of whose results it holds.

    Args:
        experiment: name of the experiment.
        config: its configuration, a dataclass.

    Returns:
        ``{"experiment": ..., "config": {field: value}}``.

    >>> Config = dataclasses.make_dataclass("Config", ["out"])
    >>> identity("discussion", Config("there"))
    {'experiment': 'discussion', 'config': {'out': 'there'}}
    """
    return {"experiment": experiment, "config": dataclasses.asdict(config)}


def stored_cells(
    path: Path, experiment: str, config: Any, is_sound: Callable[[Cell], bool]
) -> dict[str, Cells]:
    """Read the cells that an earlier run with the same configuration has left.

    Args:
        path: of ``results.json``, which need not exist.
        experiment: name of the experiment.
        config: its configuration; the field ``out``, where it writes, plays no part.
        is_sound: whether a cell holds what the experiment puts into one.

    Returns:
        ``[study][cell]``, the content of ``"studies"``.

    Raises:
        InvalidInput: if the file is damaged, or of another experiment or configuration.

    >>> Config = dataclasses.make_dataclass("Config", ["out"])
    >>> stored_cells(Path("nowhere/results.json"), "discussion", Config("nowhere"), bool)
    {}
    """
    if not path.exists():
        return {}
    remedy = "choose another --out, or remove the file to begin anew"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{path}: damaged, not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict) or content.get("experiment") != experiment:
        raise InvalidInput(f"{path}: holds no results of the experiment {experiment}; {remedy}")
    # Through JSON, which knows no tuples and no paths.
    ours = json.loads(json.dumps(identity(experiment, config)["config"], default=str))
    theirs = content.get("config")
    theirs = theirs if isinstance(theirs, dict) else {}
    other = [name for name in ours if name != "out" and ours[name] != theirs.get(name)]
    if other:
        was = ", ".join(f"{name} = {theirs.get(name)}, not {ours[name]}" for name in other)
        raise InvalidInput(f"{path}: holds results of another configuration ({was}); {remedy}")
    studies: Any = content.get("studies")
    if not (_is_table(studies) and all(map(_is_table, studies.values()))):
        raise InvalidInput(f"{path}: damaged, its studies are not tables of cells; {remedy}")
    for study, cells in studies.items():
        for name, cell in cells.items():
            if not is_sound(cell):
                raise InvalidInput(f"{path}: damaged, {study}: {name} lacks numbers; {remedy}")
    return studies


def _is_table(value: Any) -> bool:
    """Whether the value is ``{name: {...}}``."""
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())
