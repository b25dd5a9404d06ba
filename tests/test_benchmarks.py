"""The benchmarks on networks of toy size: what they time, and what they write."""

import json

import jax
import jax.numpy as jnp
import kappa_resnet
import numpy as np
import pytest
import step_time
from _measure import interleaved_seconds, median_and_spread, publish, spelled

from jaxinv.resnet import ResNet

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


@pytest.mark.parametrize("make", [lambda: step_time.mlp_task((6, 8, 8, 3), 4),
                                  lambda: step_time.resnet_task(TINY, "tiny", 8, 4)])  # fmt: skip
def test_both_loops_train_from_one_start(make):
    comparison = step_time.compare(make(), steps=4, repeats=2)
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
