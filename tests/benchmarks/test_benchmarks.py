"""The benchmarks on networks of toy size: what they time, and what they write."""

import json

import functional_dimension
import growth
import jax
import jax.numpy as jnp
import kappa_resnet
import numpy as np
import peers
import pytest
import step_time
from _measure import interleaved_seconds, median_and_spread, publish, spelled
from resnet import ResNet

from jaxinv import networks

TINY = ResNet(10, small_inputs=True, stage_sizes=(1,))


def test_timings_are_interleaved_and_alternate_in_order():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = interleaved_seconds(functions, repeats=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert seconds["a"].shape == seconds["b"].shape == (3,)


def test_spread_is_the_interquartile_range():
    values = np.arange(101.0)
    assert median_and_spread(values) == {"median": 50.0, "iqr": 50.0}
    assert spelled(values) == "50 (5e+01)"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: step_time.mlp_task((6, 8, 8, 3), 4), id="mlp"),
        pytest.param(
            lambda: step_time.resnet_task(TINY, "tiny", 8, 4), id="resnet", marks=pytest.mark.slow
        ),
    ],
)
def test_both_loops_train_from_one_start(make):
    # Two steps, as they are spelled out in the program on a CPU.
    comparison = step_time.compare(make(), steps=2, repeats=2)
    sgd, path = comparison["losses"]["SGD"], comparison["losses"]["Path-SGD"]
    assert sgd[0] == path[0] and sgd[-1] != path[-1]
    assert np.isfinite(sgd).all() and np.isfinite(path).all()
    assert comparison["ratio"].shape == (2,)


def test_the_step_table_has_the_competitor_beside_ours(tmp_path, capsys):
    comparison = step_time.compare(step_time.mlp_task((6, 8, 3), 4), steps=2, repeats=2)
    table = step_time.to_table([comparison])
    assert [row[1] for row in table.rows] == ["SGD", "Path-SGD"]
    publish("step_time", table, {"comparisons": [comparison]}, tmp_path)
    content = json.loads((tmp_path / f"step_time-{jax.default_backend()}.json").read_text())
    assert content["environment"]["versions"]["jax"] == jax.__version__
    assert len(content["comparisons"][0]["ratio"]) == 2
    assert "| Path-SGD |" in (tmp_path / "step_time-cpu.md").read_text()
    assert "Path-SGD" in capsys.readouterr().out


def test_kappa_of_a_resnet_is_measured():
    row = kappa_resnet.measure("tiny", TINY, size=8, repeats=2)
    assert row["all_finite"] and jnp.isfinite(row["log_path_norm"])
    assert row["run_seconds"].shape == (2,) and row["trace_seconds"] > 0
    assert kappa_resnet.to_table([row]).rows[0][0] == "tiny"


@pytest.mark.parametrize("make", [lambda: peers.mlp_network((5, 7, 3)),
                                  lambda: peers.resnet_network(8, TINY)])  # fmt: skip
def test_kappa_written_by_hand_in_pytorch_is_ours(make):
    """The comparison itself raises where they differ."""
    torch = pytest.importorskip("torch")
    title, fn, params, stats, shape = make()
    keys = iter(jax.random.split(jax.random.key(2), 99))
    stats = jax.tree.map(lambda a: jax.random.uniform(next(keys), a.shape, minval=0.5), stats)
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), params)
    if stats:  # fresh statistics would hide a wrong use of them
        fn = lambda w, x: TINY.apply({"params": w, "batch_stats": stats}, x, False)  # noqa: E731
    found = peers.kappa((title, fn, params, stats, shape), 1, torch.get_num_threads())
    assert [c.task.split(" of ")[0] for c in found] == ["κ", "path norm"]
    assert all("PyTorch" in c.seconds for c in found)
    rows = peers.to_table(found).rows
    assert [row[1] for row in rows[:2]] == ["jaxinv", "PyTorch"]


def test_the_loop_over_units_ends_balanced():
    params = networks.init_mlp(jax.random.key(0), (3, 5, 4, 2), bias_std=0.5)
    (first, bias), (second, _), _ = peers.loop_over_units(params)
    incoming = (first**2).sum(0) + bias**2
    np.testing.assert_allclose(incoming, (second**2).sum(1), rtol=1e-4)


def test_balance_meets_the_loop_and_a_peer_that_fails_has_a_row():
    found = peers.balancing(1, (3, 5, 4, 2))
    assert [list(c.seconds) for c in found] == [["jaxinv", "NumPy loop"]] * 2
    failed = peers.Comparison("step", {"jaxinv": np.ones(2)}, {"other": "does not run: why"})
    assert peers.to_table([failed]).rows[1] == ["step", "other", "–", "–", "does not run: why"]
    try:
        raise KeyError("name")
    except KeyError as error:
        assert peers.described(error).startswith("KeyError: 'name' (test_benchmarks.py, test_bal")


def test_growth_is_fitted_and_drawn(tmp_path):
    sizes = (2, 4, 8)
    assert growth.exponent(sizes, [3 * s**2 for s in sizes]) == pytest.approx(2)
    curve = growth.measure("κ", "width", (2, 3, 4), {"depth": 2, "inputs": 5}, 1)
    assert all(b > 0 for b in curve.bytes)
    assert growth.to_table([curve]).rows[-1][2] == "exponent"
    growth.plot([curve], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_dimensions_keep_what_was_measured_of_other_networks(tmp_path):
    cell = {"method": "boundary", "network": "a", "lower": 3, "upper": 4, "certain": False}
    cell |= {"parameters": 10, "seconds": 1.0, "cpu_seconds": 2.0, "peak_bytes": 3e9, "cpu": "c"}
    larger = {**cell, "network": "b", "parameters": 1000, "seconds": 100.0, "certain": True}
    expected = ["a", "10", "boundary", "[3, 4]", "1.0", "2.0", "3.00", "c"]
    assert functional_dimension.row(cell) == expected
    assert functional_dimension.row(larger)[3] == "3"
    assert functional_dimension.exponent([cell, larger], "seconds") == pytest.approx(1)
    assert functional_dimension.before(tmp_path) == []
    table = step_time.Table("t", ["x"], [["y"]])
    publish("functional_dimension", table, {"cells": [cell]}, tmp_path)
    assert functional_dimension.before(tmp_path)[0]["network"] == "a"
