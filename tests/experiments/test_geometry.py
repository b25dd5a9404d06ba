"""The geometry experiment: cells, resuming, and what the invariant methods must show."""

import copy
import json

import numpy as np
import pytest

from jaxinv import cli
from jaxinv.errors import InvalidInput
from jaxinv.experiments import files, geometry, resuming
from jaxinv.experiments.geometry import Config, best

ARGV = ["reproduce", "geometry", "--hidden", "8", "--epochs", "1", "--examples", "200"]


SLOW = pytest.param(("sgd", "path", "data-dependent-0.5"), marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[("sgd", "path"), SLOW], ids=len)
def small_run(tmp_path_factory, request):
    """Some methods at two rates; the other methods have tests of their own."""
    out = tmp_path_factory.mktemp("geometry")
    with pytest.MonkeyPatch.context() as patch:
        chosen = {name: geometry.METHODS[name] for name in request.param}
        patch.setattr(geometry, "METHODS", chosen)
        patch.setattr(geometry, "RATES", (0.1, 0.01))
        assert cli.main([*ARGV, "--seeds", "2", "--out", str(out)]) == 0
        first = files.read_json(out / "results.json")
        # What an interrupted run has left is kept; what is missing is computed again.
        left = copy.deepcopy(first)
        del left["studies"]["path"]["balanced, 0.01"]
        files.write_json(out / "results.json", left)
        assert cli.main([*ARGV, "--seeds", "2", "--out", str(out)]) == 0
        again = files.read_json(out / "results.json")
    assert resuming.deterministic(again) == resuming.deterministic(first)
    assert again["studies"]["sgd"] == first["studies"]["sgd"]  # the measured times too
    assert json.dumps(again) != json.dumps(first)  # one of the times is another
    return out, again


@pytest.mark.slow
def test_cells_hold_every_seed_and_epoch(small_run):
    cells = small_run[1]["studies"]["sgd"]
    assert set(cells) == {f"{s}, {r}" for s in ("balanced", "unbalanced") for r in (0.1, 0.01)}
    for cell in cells.values():
        assert np.shape(cell["loss"]) == np.shape(cell["error"]) == (2, 2)
        assert cell["seconds"] > 0


@pytest.mark.slow
def test_starts_are_one_function_and_invariant_methods_do_not_tell_them_apart(small_run):
    assert {"sgd", "path"} <= set(small_run[1]["studies"])
    for name, cells in small_run[1]["studies"].items():
        here, there = (np.array(cells[f"{s}, 0.1"]["loss"]) for s in ("balanced", "unbalanced"))
        np.testing.assert_allclose(here[:, 0], there[:, 0], rtol=1e-5)
        if name == "sgd":
            assert np.abs(here[:, 1] - there[:, 1]).max() > 1e-2
        else:
            np.testing.assert_allclose(here, there, rtol=1e-3)


@pytest.mark.slow
def test_the_best_rate_has_the_lowest_loss(small_run):
    cells = small_run[1]["studies"]["path"]
    found = best(cells, "balanced")
    finals = [np.mean([s[-1] for s in c["loss"]]) for k, c in cells.items() if k[0] == "b"]
    assert found.loss[:, -1].mean() == min(finals)


@pytest.mark.slow
def test_the_command_writes_a_figure(small_run):
    assert (small_run[0] / "starts.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_ends_above_its_start_diverged():
    error = np.full((1, 2), 50.0)
    for losses, expected in (((2.0, 1.0), False), ((2.0, 3.0), True), ((2.0, np.nan), True)):
        assert geometry.Best(0.1, np.array([losses]), error, 1.0).diverged == expected


def test_large_batches_are_refused():
    with pytest.raises(InvalidInput, match="--batch-size"):
        geometry.run(Config(examples=50))


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one():
    options = {"hidden": (4,), "epochs": 1, "examples": 100, "seeds": 1}
    alone = geometry.run(Config(jobs=1, **options)).studies
    together = geometry.run(Config(jobs=2, **options)).studies
    for name, cells in alone.items():
        for key, cell in cells.items():
            assert together[name][key]["loss"] == cell["loss"], (name, key)
