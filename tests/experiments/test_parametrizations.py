"""The parametrizations experiment: the same functions for ReLU, others for sigmoid."""

import numpy as np
import pytest

from jaxinv import cli
from jaxinv.errors import InvalidInput
from jaxinv.experiments import files, parametrizations
from jaxinv.experiments.parametrizations import Config


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    argv = [
        "--hidden",
        "16",
        "--epochs",
        "2",
        "--batch-size",
        "200",
        "--seeds",
        "2",
        "--out",
        str(out),
    ]
    assert cli.main(["reproduce", "parametrizations", *argv]) == 0
    content = files.read_json(out / "results.json")
    networks = {}
    for name, row in content["networks"].items():
        cells = content["studies"][name]
        assert len(cells) == 6  # three parametrisations, two seeds
        for seed in range(2):
            suffix = f", seed {seed}"
            curves = {k.removesuffix(suffix): c for k, c in cells.items() if k.endswith(suffix)}
            networks[name if seed == 0 else f"{name}, again"] = {**row, "curves": curves}
    return out, networks


@pytest.mark.slow
def test_relu_versions_start_from_one_function_and_projection_keeps_it(small_run):
    relu = small_run[1]["relu"]
    assert relu["group_dimension"] == 16 and relu["same_class"]
    assert relu["projection_change"] < 1e-5
    losses = [curves["step_loss"][0] for curves in relu["curves"].values()]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    assert all(curves["start_difference"] < 1e-5 for curves in relu["curves"].values())


@pytest.mark.slow
def test_sigmoid_has_no_rescalings_and_projection_changes_the_function(small_run):
    sigmoid = small_run[1]["sigmoid"]
    assert sigmoid["group_dimension"] == 0 and not sigmoid["same_class"]
    assert sigmoid["projection_change"] > 0.01
    assert sigmoid["curves"]["unconstrained"]["start_difference"] == 0
    again = small_run[1]["sigmoid, again"]["curves"]["unconstrained"]
    assert again["step_loss"] != sigmoid["curves"]["unconstrained"]["step_loss"]
    assert sigmoid["curves"]["constrained"]["start_difference"] > 0.01


@pytest.mark.slow
def test_constrained_and_normalised_start_together_and_part(small_run):
    assert len(small_run[1]) == 4  # ReLU and sigmoid, two seeds
    for network in small_run[1].values():
        constrained, normalised = (network["curves"][k] for k in ("constrained", "normalised"))
        np.testing.assert_allclose(
            constrained["start_difference"], normalised["start_difference"], atol=1e-5
        )
        assert constrained["step_loss"][-1] != normalised["step_loss"][-1]


@pytest.mark.slow
def test_every_version_learns(small_run):
    for network in small_run[1].values():
        assert len(network["curves"]) == 3
        for curves in network["curves"].values():
            assert curves["final_loss"] < curves["step_loss"][0]
            assert len(curves["step_loss"]) == 14 and len(curves["test_error"]) == 3


@pytest.mark.slow
def test_the_command_writes_a_figure(small_run):
    assert (small_run[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(InvalidInput, match="choose a smaller --batch-size"):
        parametrizations.run(Config(batch_size=5000))
