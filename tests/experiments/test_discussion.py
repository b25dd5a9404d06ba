"""The experiment discussion: ranks within their bounds, and runs that go on where they stopped."""

import math

import jax
import numpy as np
import pytest

from jaxinv import cli, networks
from jaxinv.experiments import discussion, files

FLAGS = {"width": "3", "networks": "2", "examples": "40", "epochs": "2", "draws": "10"}
FLAGS |= {"parameters": "60", "depths": "1,3", "layer-widths": "3", "bias-std": "0.5"}


def command(out, **changed):
    flags = [text for name, value in (FLAGS | changed).items() for text in (f"--{name}", value)]
    return ["reproduce", "discussion", *flags, "--out", str(out)]


def made_up(params, x):
    """The layout of ranks, without a program for every study: numbers that a rank may be."""
    count, d = len(jax.tree.leaves(params)[0]), sum(a[0].size for a in jax.tree.leaves(params))
    group = sum(layer["bias"].shape[-1] for layer in list(params.values())[:-1])
    lists = {"rank": [d - group - 1] * count, "upper": [d - group] * count}
    return {"d": d, "group": group, "examples": len(x), **lists, "certain": count}


@pytest.fixture(scope="module")
def run_without_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discussion, "ranks", made_up)
        assert cli.main(command(out)) == 0
    return out, files.read_json(out / "results.json")["studies"]


# Compiled anew for every study: all tests of it are slow.
@pytest.fixture(scope="module", params=[pytest.param("run", marks=pytest.mark.slow)])
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    # As in every test, so that these find the programs that are compiled here.
    with jax.numpy_dtype_promotion("strict"):
        assert cli.main(command(out)) == 0
    return out, files.read_json(out / "results.json")["studies"]


def every_cell(studies):
    for cells in studies.values():
        for cell in cells.values():
            yield from cell.get("ranks", {"": cell}).values()


def test_no_rank_exceeds_its_bounds(small_run):
    cells = list(every_cell(small_run[1]))
    assert len(cells) > 20
    for cell in cells:
        ranks, uppers = np.array(cell["rank"]), np.array(cell["upper"])
        assert (ranks >= 1).all() and (ranks <= uppers).all()
        assert (uppers <= cell["d"] - cell["group"]).all()
        assert 0 <= cell["certain"] <= len(ranks)


def test_parameters_and_hidden_units_are_those_of_the_architecture(run_without_ranks):
    studies = run_without_ranks[1]
    assert {(c["d"], c["group"]) for c in studies["inputs"].values()} == {
        (64 * 3 + 3 + 3 * 3 + 3 + 3 * 10 + 10, 6)
    }
    assert {(c["d"], c["group"]) for c in studies["draws"].values()} == {(164, 16)}
    assert len(studies["depth"]) > 1 and len(studies["shape"]) > 1
    for cell in studies["depth"].values():
        assert (cell["d"], cell["group"]) == (cell["depth"] * 12 + 4, 3 * cell["depth"])
    for cell in studies["shape"].values():
        assert cell["group"] == cell["width"] * cell["depth"]
        # No other width comes closer to the budget than half of what one unit more adds.
        assert abs(cell["d"] - 60) <= (9 + 4 + cell["depth"] * (2 * cell["width"] + 2)) / 2


def test_the_rank_grows_with_the_inputs_and_has_at_most_a_row_for_each_output(small_run):
    for name in ("digits", "standard normal"):
        cells = [c for c in small_run[1]["examples"].values() if c["inputs"] == name]
        assert [c["examples"] for c in cells] == [1, 2, 5, 10, 20, 40]
        ranks = np.array([c["rank"] for c in cells])
        assert (np.diff(ranks, axis=0) >= 0).all()
        assert (ranks <= 10 * np.array([[c["examples"]] for c in cells])).all()
        # The biases of the last layer alone give every output on its own.
        assert (ranks[0] == 10).all()
        # All inputs are the same as in the study of distributions.
        assert ranks[-1].tolist() == small_run[1]["inputs"][name]["rank"]


def test_half_of_the_inputs_show_no_more(small_run):
    for cell in small_run[1]["depth"].values():
        assert (np.array(cell["rank_of_half"]) <= np.array(cell["rank"])).all()


def test_an_ensemble_has_the_ranks_that_numpy_finds_for_its_members(small_run):
    params = discussion.draw(3, (3, 3, 1), 10, 0.5)
    x = jax.random.normal(jax.random.key(1), (128, 3))
    with jax.enable_x64(True):
        w = jax.tree.map(lambda a: a.astype("float64"), params)
        rows = jax.jit(jax.vmap(jax.jacrev(networks.mlp), (0, None)))(w, x.astype("float64"))
    J = np.concatenate([np.reshape(leaf, (10, 128, -1)) for leaf in jax.tree.leaves(rows)], 2)
    expected = np.linalg.matrix_rank(J).tolist()
    assert discussion.ranks(params, x)["rank"] == expected
    assert small_run[1]["depth"]["width 3, depth 1"]["rank"] == expected


def test_training_starts_at_the_drawn_networks(small_run):
    start = small_run[1]["training"]["epoch 0"]["ranks"]["training images"]["rank"]
    assert start == small_run[1]["inputs"]["digits"]["rank"]


def test_training_lowers_the_loss(run_without_ranks):
    cells = list(run_without_ranks[1]["training"].values())
    assert [cell["epoch"] for cell in cells] == [0, 1, 2]
    losses = np.array([cell["loss"] for cell in cells])
    assert losses.shape == (3, 2) and (losses[-1] < losses[0]).all()
    assert (losses[0] > math.log(10) / 2).all()


def test_a_run_computes_only_what_is_missing_and_finds_the_same(
    run_without_ranks, tmp_path, monkeypatch
):
    out, studies = run_without_ranks
    content = files.read_json(out / "results.json")
    missing = ("inputs", "scales"), ("draws", "biases zero")
    for study, cell in missing:
        del content["studies"][study][cell]
    files.write_json(tmp_path / "results.json", content)
    computed = []

    def watched(params, x):
        computed.append(x.shape)
        return made_up(params, x)

    monkeypatch.setattr(discussion, "ranks", watched)
    assert cli.main(command(tmp_path)) == 0
    assert computed == [(40, 64), (200, 6)]
    again = files.read_json(tmp_path / "results.json")
    assert again["studies"] == studies and again["complete"]
    # Nothing is measured in seconds here, so that not a byte differs.
    assert (tmp_path / "results.json").read_bytes() == (out / "results.json").read_bytes()


def test_what_an_interrupted_run_has_found_is_kept(tmp_path, monkeypatch):
    count = 0

    def interrupted(params, x):
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        return made_up(params, x)

    monkeypatch.setattr(discussion, "ranks", interrupted)
    assert cli.main(command(tmp_path)) == 130
    content = files.read_json(tmp_path / "results.json")
    assert not content["complete"]
    assert list(content["studies"]["examples"]) == ["digits, 1", "digits, 2", "digits, 5"]


def test_the_command_writes_a_figure(run_without_ranks):
    assert (run_without_ranks[0] / "studies.png").read_bytes().startswith(b"\x89PNG")
