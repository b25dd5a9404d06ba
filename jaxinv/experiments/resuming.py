"""Results that survive an interruption: cells of studies, kept in ``results.json`` as they come.

An experiment asks a :class:`Store` for its cells, and the store computes only what it does not hold
yet. What is asked for is always what JSON gives back, computed now or earlier, so that a run which
was killed and went on ends with the numbers of one that was not. Fields whose names begin with
``seconds`` are measured times, the only numbers that differ between runs.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxinv.errors import InvalidInput
from jaxinv.experiments import files
from jaxinv.experiments.report import Progress, environment

Cell = dict[str, Any]  # numbers, texts and lists of them: what JSON gives back
Cells = dict[str, Cell]
Thunks = Mapping[str, Callable[[], Mapping[str, Any]]]  # cells of a study, yet to be computed

_LOCK = "results.json.lock"
# Where the results go and how many processes compute them: no number depends on these fields.
_NO_PART = ("out", "jobs")


class Store:
    """The cells computed so far; those of a :func:`opened` store are in a file.

    >>> store, computed = Store(), []
    >>> def cell():
    ...     computed.append(1)
    ...     return {"loss": (1.0, 0.5)}
    >>> store("sgd", "rate 0.1", cell), store("sgd", "rate 0.1", cell), len(computed)
    ({'loss': [1.0, 0.5]}, {'loss': [1.0, 0.5]}, 1)
    """

    def __init__(
        self,
        path: Path | None = None,
        header: Mapping[str, Any] | None = None,
        studies: Mapping[str, Cells] | None = None,
    ) -> None:
        """Begin with ``studies``; with a ``path``, write ``header`` and all cells to it."""
        self._path, self._header = path, dict(header or {})
        self._held: dict[str, Cells] = {
            study: {key: _Read.of(cell, f"{path}: {study}: {key}") for key, cell in cells.items()}
            for study, cells in (studies or {}).items()
        }
        self._asked: dict[str, Cells] = {}

    def __call__(self, study: str, key: str, compute: Callable[[], Mapping[str, Any]]) -> Cell:
        """Return the cell, from ``compute()`` if it is not held yet."""
        cell = self.get(study, key)
        return self.keep(study, key, compute()) if cell is None else cell

    def get(self, study: str, key: str) -> Cell | None:
        """Return the cell, or ``None`` if it has to be computed.

        Raises:
            InvalidInput: if it would be computed by other versions, or elsewhere, than the others.
        """
        cell = self._held.get(study, {}).get(key)
        if cell is None:
            self._same_environment()
        else:
            self._ask(study, key, cell)
        return cell

    def keep(self, study: str, key: str, cell: Mapping[str, Any]) -> Cell:
        """Hold a cell that was computed, and write it; returns it as JSON gives it back."""
        kept: Cell = files.plain(cell)
        self._held.setdefault(study, {})[key] = kept
        self._ask(study, key, kept)
        self._write({"complete": False})
        return kept

    def _ask(self, study: str, key: str, cell: Cell) -> None:
        # Moved to the end: cells that came in any order are in that of the last time of asking.
        cells = self._asked.pop(study, {})
        cells.pop(key, None)
        cells[key] = cell
        self._asked[study] = cells

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write all cells with what else the experiment records, as complete."""
        self._write({"complete": True, **record})

    def _write(self, rest: Mapping[str, Any]) -> None:
        if self._path is not None:
            # In the order the experiment asks, whatever the order they were computed in.
            studies = {
                study: self._asked.get(study, {}) | self._held[study]
                for study in self._asked | self._held
            }
            files.write_json(self._path, {**self._header, **rest, "studies": studies})

    def _same_environment(self) -> None:
        there = self._header.get("environment")
        if there is None:
            return
        here = files.plain(environment())
        if here != there:
            was = _differences(there, here)
            raise InvalidInput(
                f"{self._path}: begun in another environment ({was}), where the numbers may "
                f"differ; {_REMEDY}"
            )


_REMEDY = "choose another --out, or remove the file to begin anew"


class _Read(dict[str, Any]):
    """A cell from a file: what it lacks is the fault of the file, whose name it knows."""

    where = ""

    @classmethod
    def of(cls, value: Any, where: str) -> Any:
        """The value with every dict in it, also inside of lists, made one of these."""
        if isinstance(value, list):
            return [cls.of(item, where) for item in value]
        if not isinstance(value, dict):
            return value
        read = cls((key, cls.of(item, where)) for key, item in value.items())
        read.where = where
        return read

    def __missing__(self, key: str) -> Any:
        raise files.DamagedFile(
            f"{self.where} lacks {key!r}, which this version writes: the file was not written by "
            f"it; {_REMEDY}"
        )


def check_fields(path: Path, content: Mapping[str, Any], remedy: str) -> None:
    """Raise `DamagedFile` unless a file of results has every part that `Store` writes.

    A checksum says that nobody changed the file since, not that this program wrote it.
    """

    def at(*keys: str) -> Any:
        value: Any = content
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    lacking = [
        ".".join(keys)
        for kind, *keys in (
            (str, "experiment"),
            (dict, "config"),
            (dict, "environment"),
            (dict, "environment", "versions"),
            (str, "environment", "versions", "jaxinv"),
            (dict, "studies"),
        )
        if not isinstance(at(*keys), kind)
    ]
    for study, cells in (at("studies") or {}).items() if not lacking else ():
        if not isinstance(cells, dict) or not all(isinstance(c, dict) for c in cells.values()):
            lacking.append(f"studies.{study}")
    if lacking:
        raise files.DamagedFile(
            f"{path}: its checksum is right, but it lacks {', '.join(lacking)} as this version "
            f"writes them; {remedy}"
        )


@contextlib.contextmanager
def opened(directory: Path, experiment: str, config: Any) -> Iterator[Store]:
    """Open ``directory/results.json``, or begin it, and let no other process write there.

    Args:
        directory: made if it does not exist.
        experiment: name of the experiment.
        config: its configuration, a dataclass; its fields ``out`` and ``jobs`` play no part.

    Yields:
        the :class:`Store`, with the cells of an earlier run of the same configuration.

    Raises:
        DamagedFile: if the file is not as it was written, has no checksum, or lacks a part.
        InvalidInput: if it is of another experiment, configuration or version.
        InUse: if another process is writing there.

    >>> import tempfile
    >>> Config = dataclasses.make_dataclass("Config", ["epochs"])
    >>> directory = Path(tempfile.mkdtemp())
    >>> with opened(directory, "mine", Config(3)) as store:
    ...     cell = store("training", "sgd", lambda: {"loss": 0.5})
    >>> with opened(directory, "mine", Config(3)) as store:
    ...     store.get("training", "sgd")
    {'loss': 0.5}
    >>> with opened(directory, "mine", Config(4)) as store:  # doctest: +ELLIPSIS
    ...     pass
    Traceback (most recent call last):
    ...
    jaxinv.errors.InvalidInput: ... of another configuration (epochs = 3, not 4); choose another ...
    """
    directory.mkdir(parents=True, exist_ok=True)
    with files.locked(directory / _LOCK):
        files.remove_leftovers(directory)
        path = directory / "results.json"
        fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NO_PART}
        header = files.plain(
            {"experiment": experiment, "config": fields, "environment": environment()}
        )
        studies = {}
        if path.exists():
            content = files.read_json(path, _REMEDY)
            check_fields(path, content, _REMEDY)
            _must_match(path, header, content)
            studies = content["studies"]
            header["environment"] = content["environment"]
        yield Store(path, header, studies)


def _must_match(path: Path, header: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    if content.get("experiment") != header["experiment"]:
        raise InvalidInput(
            f"{path}: holds results of the experiment {content.get('experiment')}, not "
            f"{header['experiment']}; {_REMEDY}"
        )
    if content["config"] != header["config"]:
        was = _differences(content["config"], header["config"])
        raise InvalidInput(f"{path}: holds results of another configuration ({was}); {_REMEDY}")
    there, here = (side["environment"]["versions"]["jaxinv"] for side in (content, header))
    if there != here:
        raise InvalidInput(f"{path}: written by jaxinv {there}, and this is {here}; {_REMEDY}")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} = {there.get(name)}, not {here.get(name)}"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    )


def compute(
    studies: Mapping[str, Thunks],
    progress: Progress = lambda fraction, what: None,
    store: Store | None = None,
) -> dict[str, Cells]:
    """Ask ``store`` for every cell of ``studies``, in order.

    Args:
        studies: ``[study][cell]``, each a function without arguments that computes it.
        progress: called before each cell.
        store: what holds the cells, by default nothing but memory.

    Returns:
        ``[study][cell]``, the cells.

    >>> compute({"squares": {"two": lambda: {"square": 2 * 2}}})
    {'squares': {'two': {'square': 4}}}
    """
    store = Store() if store is None else store
    total, done = sum(map(len, studies.values())), 0
    found: dict[str, Cells] = {study: {} for study in studies}
    for study, thunks in studies.items():
        for key, thunk in thunks.items():
            progress(done / total, f"{study}: {key}")
            found[study][key] = store(study, key, thunk)
            done += 1
    return found


def deterministic(content: Any) -> Any:
    """Leave out of ``results.json`` what may differ between two runs: times, and where they ran.

    >>> deterministic({"environment": {"cpu": "x"}, "curve": [{"loss": 1.0, "seconds": 3.2}]})
    {'curve': [{'loss': 1.0}]}
    """
    if isinstance(content, dict):
        return {
            key: deterministic(value)
            for key, value in content.items()
            if not key.startswith("seconds") and key not in ("environment", "sha256")
        }
    return [deterministic(item) for item in content] if isinstance(content, list) else content
