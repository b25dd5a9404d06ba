"""Stores: cells come back as they were, in the order asked for, and only for whom they were."""

import dataclasses
import json
import math

import pytest

from jaxinv.errors import InvalidInput
from jaxinv.experiments import files, report, resuming
from jaxinv.experiments.resuming import Store, opened


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 3
    hidden: tuple = (4, 2)
    out: str = "here"
    jobs: int = 1


def _cell(value):
    return lambda: {"loss": (value, math.nan), "seconds": value}


def _never():
    raise AssertionError("computed again")


def test_a_cell_is_the_same_now_and_later(tmp_path):
    with opened(tmp_path, "mine", Config()) as store:
        now = store("sgd", "rate 1", _cell(0.1 + 0.2))
    with opened(tmp_path, "mine", Config()) as store:
        later = store("sgd", "rate 1", _never)
    assert repr(now) == repr(later) == repr({"loss": [0.1 + 0.2, math.nan], "seconds": 0.1 + 0.2})
    assert Store()("sgd", "rate 1", _cell(2.0))["loss"][0] == 2.0  # without a file


def test_cells_are_written_in_the_order_asked_for_whatever_was_first(tmp_path):
    for name, first in (("a", ["x"]), ("b", ["z", "y"])):
        with opened(tmp_path / name, "mine", Config()) as store:
            for key in first:
                store("late" if key == "z" else "early", key, _cell(1.0))
        with opened(tmp_path / name, "mine", Config()) as store:
            for study, key in (("early", "x"), ("early", "y"), ("late", "z")):
                store(study, key, _cell(1.0))
            store.finish({"dataset": "made-up"})
    a, b = (tmp_path / name / "results.json" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert json.loads(a.read_text())["complete"]


def test_cells_that_processes_finish_in_any_order_are_written_in_the_order_asked_for_last(tmp_path):
    places = [("early", "x"), ("early", "y"), ("late", "z")]
    for i, order in enumerate((places, places[::-1])):
        with opened(tmp_path / str(i), "mine", Config()) as store:
            for study, key in order:
                assert store.get(study, key) is None
                store.keep(study, key, _cell(1.0)())
            for study, key in places:
                store(study, key, _never)
            store.finish({})
    first, second = (tmp_path / i / "results.json" for i in "01")
    assert first.read_bytes() == second.read_bytes()


def test_a_finished_file_does_not_change_when_it_is_finished_again(tmp_path):
    for _ in range(2):
        with opened(tmp_path, "mine", Config()) as store:
            store("sgd", "rate 1", _cell(1.0))
            store.finish({})
            content = (tmp_path / "results.json").read_bytes()
    assert (tmp_path / "results.json").read_bytes() == content


def _refused(directory, match, experiment="mine", config=Config()):
    before = (directory / "results.json").read_bytes()
    with (
        pytest.raises((InvalidInput, files.DamagedFile), match=match) as error,
        opened(directory, experiment, config) as store,
    ):
        store("sgd", "rate 2", _cell(1.0))
    assert str(directory / "results.json") in str(error.value)
    assert "choose another --out, or remove the file to begin anew" in str(error.value)
    assert (directory / "results.json").read_bytes() == before  # nothing is overwritten
    assert [path.name for path in directory.iterdir()] == ["results.json"]


@pytest.fixture
def begun(tmp_path):
    with opened(tmp_path, "mine", Config()) as store:
        store("sgd", "rate 1", _cell(1.0))
    return tmp_path


def test_other_experiments_and_configurations_are_refused(begun):
    _refused(begun, "of the experiment mine, not theirs", experiment="theirs")
    _refused(begun, r"another configuration \(epochs = 3, not 4\)", config=Config(epochs=4))
    fewer = dataclasses.make_dataclass("Config", [("epochs", int, 3)])
    _refused(begun, r"configuration \(hidden = \[4, 2\], not None\)", config=fewer())


def test_where_it_writes_and_by_how_many_processes_plays_no_part(begun):
    with opened(begun, "mine", Config(out="there", jobs=8)) as store:
        store("sgd", "rate 1", _never)


def test_damaged_files_are_refused(begun):
    path = begun / "results.json"
    path.write_text(path.read_text().replace("1.0", "1.5", 1))
    _refused(begun, "does not match its checksum")
    path.write_text('{"experiment": "mine", "config": {}}')
    _refused(begun, "has no checksum")


def test_another_version_is_refused(begun, monkeypatch):
    monkeypatch.setattr(resuming, "environment", _environment("versions", "9.9"))
    _refused(begun, "written by jaxinv .*, and this is 9.9")


def test_cells_of_another_machine_are_read_but_not_mixed_with_new_ones(begun, monkeypatch):
    monkeypatch.setattr(resuming, "environment", _environment("cpu", "another"))
    with opened(begun, "mine", Config()) as store:
        store("sgd", "rate 1", _never)
        with pytest.raises(InvalidInput, match=r"in another environment \(cpu = .*, not another\)"):
            store("sgd", "rate 2", _cell(1.0))
        store.finish({})
    assert files.read_json(begun / "results.json")["environment"]["cpu"] != "another"


def _environment(field, value):
    here = report.environment()
    here[field] = {**here["versions"], "jaxinv": value} if field == "versions" else value
    return lambda: here


def test_two_runs_do_not_write_to_one_directory(tmp_path):
    with opened(tmp_path, "mine", Config()) as store:
        store("sgd", "rate 1", _cell(1.0))
        with (
            pytest.raises(files.InUse, match="another run is writing here"),
            opened(tmp_path, "mine", Config()),
        ):
            pass
        store.finish({})  # which the attempt has not disturbed


def test_leftovers_of_a_killed_run_are_removed_at_the_next_start(begun):
    (begun / "results.jaxinv-part-abc.json").write_text("half of")
    (begun / "results.json.lock").write_text("1234\n")
    with opened(begun, "mine", Config()):
        names = {path.name for path in begun.iterdir()}
        assert names == {"results.json", "results.json.lock"}
    assert [path.name for path in begun.iterdir()] == ["results.json"]


def test_what_is_deterministic_has_no_times_and_no_machine():
    content = {"sha256": "0", "environment": {}, "x": [{"seconds_per_step": 1, "loss": 2}]}
    assert resuming.deterministic(content) == {"x": [{"loss": 2}]}


def _without(content, *keys):
    """A copy that lacks one key."""
    key, *rest = keys
    kept = {k: v for k, v in content.items() if k != key}
    return {**kept, key: _without(content[key], *rest)} if rest else kept


@pytest.mark.parametrize(
    "keys",
    [
        ("experiment",), ("config",), ("environment",), ("environment", "versions"),
        ("environment", "versions", "jaxinv"), ("studies",),
    ],
    ids=".".join,
)  # fmt: skip
def test_a_part_that_is_missing_behind_a_right_checksum_is_named(begun, keys):
    path = begun / "results.json"
    files.write_json(path, _without(files.read_json(path), *keys))
    with pytest.raises(files.DamagedFile, match=f"lacks .*{'.'.join(keys)}.*; choose another"):
        with opened(begun, "mine", Config()):
            pass


@pytest.mark.parametrize("wrong", [[], "text", None, {"sgd": []}, {"sgd": {"rate 1": 3}}])
def test_studies_of_another_kind_are_named(begun, wrong):
    path = begun / "results.json"
    files.write_json(path, {**files.read_json(path), "studies": wrong})
    with pytest.raises(files.DamagedFile, match="lacks studies"):
        with opened(begun, "mine", Config()):
            pass


def test_a_number_that_a_cell_lacks_is_named_with_the_file_and_the_cell(begun):
    path = begun / "results.json"
    with opened(begun, "mine", Config()) as store:
        cell = store("nested", "cell", lambda: {"curve": [{"loss": 1.0}]})
        assert cell["curve"][0]["loss"] == 1.0
    with opened(begun, "mine", Config()) as store:
        for read in (store("sgd", "rate 1", _never), store("nested", "cell", _never)["curve"][0]):
            with pytest.raises(files.DamagedFile, match=r"results.json: .*: .* lacks 'accuracy'"):
                read["accuracy"]
        assert store("sgd", "rate 1", _never).get("accuracy") is None
    assert files.read_json(path)["studies"]["nested"]["cell"] == {"curve": [{"loss": 1.0}]}
