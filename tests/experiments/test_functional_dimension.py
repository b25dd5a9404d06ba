"""The experiment functional-dimension: bounds of small networks against independent facts."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import cli
from jaxinv.experiments import functional_dimension as experiment

CELLS = {
    "initialisation": {
        "depth 1, width 2": {
            "depth": 1, "width": 2, "parameters": [9, 9], "rescaling": [2, 2], "lower": [7, 5],
            "upper": [7, 7], "certain": [True, False], "units_short": [0.0, 0.5],
            "units_without_boundary": [0.0, 0.5],
        }
    },
    "training": {
        "epoch 0": {
            "epoch": 0,
            "seeds": [
                {
                    "loss": 2.3,
                    "all inputs": {"parameters": 160, "lower": 158, "upper": 158, "certain": True,
                                   "units_short": 0.0},
                    "segments between images": {"parameters": 160, "lower": 79, "upper": 158,
                                                "certain": False, "units_short": 1.0},
                }
            ],
        }
    },
}  # fmt: skip


def test_the_table_says_what_is_proven_and_the_figure_is_drawn(tmp_path):
    config = experiment.Config(depths=(1,), layer_widths=(2,), draws=2, hidden=(2,), seeds=1)
    result = experiment.Result(config, CELLS)
    rows = experiment.table(result).rows
    assert rows[0][1:] == ["9", "all inputs", "50 %", "14.3 %", "25 %"]  # (0 + 2/7)/2
    assert [row[3:] for row in rows[1:]] == [["100 %", "0 %", "0 %"], ["0 %", "50 %", "100 %"]]
    experiment.plot(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_bounds_of_one_network_are_those_of_the_library():
    params = experiment.init_mlp(experiment.jax.random.key(0), (2, 2, 1), bias_std=0.1)
    region = experiment.everywhere(jnp.zeros((1, 2)))
    measured = experiment._measured(params, region)
    found = experiment.functional_dimension(experiment.mlp, params, region)
    assert (measured["lower"], measured["upper"]) == (found.lower, found.upper)
    assert measured["units_short"] == np.mean(found.layers[0].missing > 0)


@pytest.mark.slow
def test_a_small_run(tmp_path):
    flags = ["--depths", "1", "--layer-widths", "2,3", "--draws", "2", "--hidden", "2"]
    flags += ["--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.main(["reproduce", "functional-dimension", *flags]) == 0
    studies = json.loads((tmp_path / "results.json").read_text())["studies"]
    for cell in studies["initialisation"].values():
        # w·(w + 1) + w + 1 parameters, a rescaling per unit.
        width = cell["width"]
        assert cell["upper"] == [width * (width + 1) + 1] * 2
    at = studies["training"]["epoch 1"]["seeds"][0]
    assert at["segments between images"]["lower"] <= at["all inputs"]["lower"] <= 158
