"""The page of a finished experiment: its table and its figure, made anew from results.json."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib
import inspect
import tempfile
from pathlib import Path
from typing import Any

from jaxinv._extras import require
from jaxinv.errors import InvalidInput, JaxinvError
from jaxinv.experiments import EXPERIMENTS, files, report, resuming
from jaxinv.pages.html import render


class _Finished(resuming.Store):
    """The cells of a finished run; none is computed."""

    def get(self, study: str, key: str) -> resuming.Cell:
        cell = self._held.get(study, {}).get(key)
        if cell is None:
            raise InvalidInput(f"the results lack {study}: {key}, so they cannot be shown")
        return cell


def experiment_page(path: Path) -> str:
    """The report on a finished experiment as one HTML page.

    Args:
        path: `results.json` of `jaxinv reproduce`, or the directory that holds it. The data of the
            experiment must still be where they were.

    Returns:
        The page.

    Raises:
        DamagedFile: if the file is not as it was written, has no checksum, or lacks a part.
        InvalidInput: if it holds no finished experiment.
        MissingExtra: if matplotlib is not installed.

    Example:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "results.json"
        >>> _ = path.write_text("{}")
        >>> experiment_page(path)
        Traceback (most recent call last):
        ...
        jaxinv.experiments.files.DamagedFile: ...: has no checksum, ...
    """
    require("matplotlib", "cli")
    path = path / "results.json" if path.is_dir() else path
    remedy = "run the experiment again"
    content = files.read_json(path, remedy)
    name = content.get("experiment")
    if not isinstance(name, str) or name not in EXPERIMENTS:
        raise InvalidInput(f"{path}: holds no results of an experiment of this jaxinv; {remedy}")
    if content.get("complete") is not True:
        raise InvalidInput(f"{path}: the run is not finished; `jaxinv reproduce {name}` goes on")
    resuming.check_fields(path, content, remedy)
    module: Any = importlib.import_module(EXPERIMENTS[name].module)
    header = {key: content[key] for key in ("experiment", "config", "environment")}
    try:
        config = _config(module.Config, content["config"])
        result = module.run(config, store=_Finished(path, header, content["studies"]))
        table = module.table(result)
        with tempfile.TemporaryDirectory() as directory:
            figure = Path(directory) / module.FIGURE
            module.plot(result, figure)
            image = base64.b64encode(figure.read_bytes()).decode("ascii")
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        if isinstance(error, JaxinvError):
            raise
        raise files.DamagedFile(
            f"{path}: its numbers are not of the kind that this version writes "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    return render(
        name,
        {
            "kind": "experiment",
            "summary": EXPERIMENTS[name].summary,
            "table": {
                "title": table.title,
                "columns": list(table.columns),
                "rows": [list(row) for row in table.rows],
                "numeric": report.numeric(table),
            },
            "caption": _caption(module.plot),
            "figure": f"data:image/png;base64,{image}",
            "config": content["config"],
            "environment": content["environment"],
            "source": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
    )


def _caption(plot: Any) -> str:
    """What a function says it draws: "Draw errors." gives "Errors."."""
    text = (inspect.getdoc(plot) or "").removeprefix("Draw ").replace("\n", " ")
    return text[:1].upper() + text[1:] if text[:1].isascii() else text  # λ̂ is not Λ̂


def _config(kind: Any, stored: dict[str, Any]) -> Any:
    """A configuration from what JSON holds, where tuples are lists and paths are text."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name not in stored:
            continue
        value = stored[field.name]
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and "Path" in str(field.type):
            value = Path(value)
        values[field.name] = value
    return kind(**values)
