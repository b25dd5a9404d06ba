"""Runs that are killed and go on: the numbers of a run that was left alone, bit for bit."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxinv import cli
from jaxinv.experiments import EXPERIMENTS, files, path_sgd, resuming
from jaxinv.experiments.report import Table

_FSYNC, _REPLACE = os.fsync, os.replace

FEW = {"hidden": "4", "epochs": "1"}
FLAGS = {
    "path-sgd": FEW | {"batch-size": "400"},
    "invariance": {"hidden": "4", "batch-size": "20", "steps": "2"},
    "parametrizations": FEW | {"batch-size": "400", "seeds": "1"},
    "geometry": FEW | {"examples": "100", "seeds": "1", "jobs": "2"},
    "degrees-of-freedom": {"hidden": "2", "examples": "40", "seeds": "3"},
    "inductive-bias": {"hidden": "2,3,4", "examples": "100", "epochs": "3", "seeds": "1"},
    "discussion": {"width": "2", "networks": "1", "examples": "20", "epochs": "1", "draws": "2"}
    | {"parameters": "60", "depths": "1", "layer-widths": "2"},
    "learning-coefficient": {"chains": "2", "steps": "20", "hidden": "2", "epochs": "2"},
    "functional-dimension": {"depths": "1", "layer-widths": "2", "draws": "1", "hidden": "2"}
    | {"epochs": "1", "seeds": "1"},
    "bayes": {"examples": "6", "chains": "2", "warmup": "20", "draws": "20"},
}
# Nearly all of the time of a small run is compilation, of each of seventy and forty programs here.
BEFORE = {
    "invariance": "from jaxinv.experiments import invariance as e; rows = e.optimizers()\n"
    "e.optimizers = lambda: {name: rows[name] for name in ('sgd', 'adam', 'path_sgd')}\n",
    "learning-coefficient": "from jaxinv.experiments import learning_coefficient as e\n"
    "e.REDUCED_RANK, e.DEEP_LINEAR = e.REDUCED_RANK[:2], e.DEEP_LINEAR[:1]\n"
    "e.GROWING, e._SIZES = e.GROWING[:1], e._SIZES[:1]\n",
}


def _start(name, out, environment=None, before=""):
    code = BEFORE.get(name, "") + before
    code += "import sys; from jaxinv import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code] if name in BEFORE or before else None
    command = command or [sys.executable, "-m", "jaxinv.cli"]
    flags = [text for flag, value in FLAGS[name].items() for text in (f"--{flag}", value)]
    return subprocess.Popen(
        [*command, "reproduce", name, *flags, "--out", str(out)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _numbers(out):
    """Everything but measured times and the machine, as text: equal only if bit for bit equal."""
    content = files.read_json(out / "results.json")
    assert content["complete"]
    return json.dumps(resuming.deterministic(content))


def _cells(out):
    """How many cells the file holds; read without waiting for the run that writes it."""
    try:
        content = files.read_json(out / "results.json")
    except FileNotFoundError:
        return 0
    return sum(map(len, content["studies"].values()))


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, standard_dtype_promotion):
    only_sgd = "from jaxinv.experiments import path_sgd as p\n"
    only_sgd += "p.OPTIMIZERS = {'sgd': p.OPTIMIZERS['sgd']}\n"
    monkeypatch.setattr(path_sgd, "OPTIMIZERS", {"sgd": path_sgd.OPTIMIZERS["sgd"]})
    flags = [text for flag, value in FLAGS["path-sgd"].items() for text in (f"--{flag}", value)]
    argv = ["reproduce", "path-sgd", *flags, "--out"]
    process = _start("path-sgd", tmp_path / "killed", before=only_sgd)
    while _cells(tmp_path / "killed") == 0:
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    held = _cells(tmp_path / "killed")
    kept = files.read_json(tmp_path / "killed" / "results.json")["studies"]["sgd"]
    assert cli.main([*argv, str(tmp_path / "killed")]) == 0
    assert cli.main([*argv, str(tmp_path / "alone")]) == 0
    assert _numbers(tmp_path / "killed") == _numbers(tmp_path / "alone")
    # What was there was not computed again: the measured times are those of the killed run.
    again = files.read_json(tmp_path / "killed" / "results.json")["studies"]["sgd"]
    assert held in (1, 2) and all(again[key] == cell for key, cell in kept.items())
    names = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert names == ["curves.png", "results.json", "table.md"]


@pytest.fixture
def three_cells(monkeypatch):
    """The command with an experiment of three cells; the second does what ``act`` says."""
    act = []

    def thunk(i):
        def compute():
            if i == 1:
                for do in act:
                    do()
            return {"value": i / 7}

        return compute

    def run(config, progress, store):
        thunks = {str(i): thunk(i) for i in range(3)}
        resuming.compute({"sevenths": thunks}, progress, store)
        return path_sgd.Result(config, "made-up", {}, {}, {}, {})

    monkeypatch.setattr(path_sgd, "run", run)
    monkeypatch.setattr(path_sgd, "plot", lambda result, path: path.write_bytes(b"figure"))
    monkeypatch.setattr(path_sgd, "table", lambda result: Table("made-up", ["i"], [["0"]]))
    return act


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_leaves_the_cells_and_nothing_else(number, code, three_cells, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    three_cells.append(lambda: os.kill(os.getpid(), number))
    argv = ["reproduce", "path-sgd", "--out", str(tmp_path)]
    assert cli.main(argv) == code
    assert "the same command goes on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert _cells(tmp_path) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    three_cells.clear()
    assert cli.main(argv) == 0
    assert _cells(tmp_path) == 3


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    three_cells, tmp_path, capsys, monkeypatch
):
    argv = ["reproduce", "path-sgd", "--out"]
    assert cli.main([*argv, str(tmp_path / "alone")]) == 0

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    three_cells.append(lambda: monkeypatch.setattr(os, "fsync", full))
    assert cli.main([*argv, str(tmp_path / "full")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'full' / 'results.json'}: cannot be written (No space left" in error
    assert "Make room, then run the same command again" in error
    monkeypatch.setattr(os, "fsync", _FSYNC)
    three_cells.clear()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["results.json"]
    assert _cells(tmp_path / "full") == 1
    assert cli.main([*argv, str(tmp_path / "full")]) == 0
    for name in ("results.json", "curves.png", "table.md"):
        alone, full_ = ((tmp_path / which / name).read_bytes() for which in ("alone", "full"))
        assert alone == full_


@pytest.mark.parametrize("number", range(3))
def test_a_failure_that_cannot_be_caught_costs_one_cell(number, three_cells, tmp_path):
    """Like a kill: the process goes without unwinding, in the middle of a write."""

    class Gone(BaseException):
        pass

    argv = ["reproduce", "path-sgd", "--out", str(tmp_path)]
    calls = []

    def replace(*arguments):
        calls.append(arguments)
        if len(calls) == number + 1:
            raise Gone
        _REPLACE(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(type(tmp_path), "unlink", lambda *arguments, **options: None)
        with pytest.raises(Gone):
            cli.main(argv)
    assert any(".jaxinv-part-" in path.name for path in tmp_path.iterdir())
    assert _cells(tmp_path) == number
    assert cli.main(argv) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png",
        "results.json",
        "table.md",
    ]
    values = files.read_json(tmp_path / "results.json")["studies"]["sevenths"]
    assert [cell["value"] for cell in values.values()] == [0, 1 / 7, 2 / 7]


def test_a_damaged_file_is_named_by_the_command_and_left_alone(three_cells, tmp_path, capsys):
    argv = ["reproduce", "path-sgd", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    path = tmp_path / "results.json"
    damaged = path.read_text().replace(repr(1 / 7), repr(1 / 7 + 1e-9))
    path.write_text(damaged)
    capsys.readouterr()
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert (
        f"{path}: damaged, its content does not match its checksum; choose another --out" in error
    )
    assert path.read_text() == damaged


def test_every_experiment_is_killed_below():
    """A new experiment adds a row of tiny sizes to FLAGS, with two cells or more."""
    assert set(FLAGS) == set(EXPERIMENTS)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The environment of a process that keeps compiled programs."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="module")
def uninterrupted(compiled, tmp_path_factory):
    """name -> (numbers, cells, seconds) of a run that is left alone, with programs compiled."""
    found = {}

    def of(name):
        if name not in found:
            for i in range(2):  # the first one compiles
                out = tmp_path_factory.mktemp(f"{name}-{i}")
                begin = time.monotonic()
                process = _start(name, out, compiled)
                output = process.communicate()[0].decode()
                assert process.returncode == 0, output
            found[name] = _numbers(out), _cells(out), time.monotonic() - begin
        return found[name]

    return of


KILLS = [(name, i) for i in range(20 // len(FLAGS) + 1) for name in FLAGS]  # 20 or more


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), KILLS)
def test_runs_killed_at_random_moments_end_with_the_same_numbers(
    name, seed, compiled, uninterrupted, tmp_path
):
    numbers, total, seconds = uninterrupted(name)
    draw = random.Random(f"{name} {seed}")
    out = tmp_path / "killed"
    process = _start(name, out, compiled)
    if seed % 2:  # any moment of the run
        time.sleep(draw.uniform(0, seconds))
    else:  # around the moment when a cell is written
        wanted = draw.randint(1, total - 1)
        while _cells(out) < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
    process.kill()
    process.communicate()
    held = _cells(out)
    process = _start(name, out, compiled)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    print(f"{name}: killed with {held} of {total} cells")
    assert _numbers(out) == numbers
    leftovers = [p.name for p in out.iterdir() if ".lock" in p.name or "-part-" in p.name]
    assert not leftovers


@pytest.mark.slow
def test_processes_of_a_killed_run_end_with_it(compiled, uninterrupted, tmp_path):
    uninterrupted("geometry")
    process = _start("geometry", tmp_path, compiled)
    while _cells(tmp_path) == 0:
        time.sleep(0.01)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.monotonic() < deadline, "they outlive the run"
        time.sleep(0.1)
