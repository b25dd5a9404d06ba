"""The experiment on Jeffreys' prior: what is compared, and what its posterior must show."""

import dataclasses

import numpy as np
import pytest

from jaxinv.experiments import bayes
from jaxinv.experiments.bayes import Config, difference
from jaxinv.experiments.report import markdown

pytestmark = pytest.mark.usefixtures("standard_dtype_promotion")


def cells(shift):
    """Two posteriors whose predictive means differ by a shift."""
    return {
        kind: {
            "mean": [1.0 + shift * i] * 16,
            "standard_error": [0.03 + 0.01 * i] * 16,
            "r_hat": [1.001] * 16,
            "ess": [1000.0 * (i + 1)] * 16,
            "log_density": {"r_hat": 1.004, "ess": 500.0},
            "divergences": 3,
        }
        for i, kind in enumerate(bayes.PARAMETRIZATIONS)
    }


RESULT = bayes.Result(Config(), {"jeffreys": cells(0.05), "gaussian": cells(-0.5)})


def test_differences_are_in_standard_errors():
    np.testing.assert_allclose(difference(cells(0.05)).z, 1.0)
    np.testing.assert_allclose(difference(cells(-0.5)).z, -10.0)
    assert bayes.record(RESULT)["differences"]["gaussian"]["z"].shape == (16,)


def test_the_table_shows_the_worst_of_every_posterior():
    rows = bayes.table(RESULT).rows
    assert rows[0] == ["Jeffreys", "plain", "1.0000 ± 0.0300", "1.0", "1.0040", "500", "3"]
    assert rows[3][:4] == ["Gaussian", "weight-normalised", "0.5000 ± 0.0400", "10.0"]
    assert "4 chains" in markdown(bayes.table(RESULT))


def test_the_figure_is_drawn(tmp_path):
    bayes.plot(RESULT, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_predictive_is_the_same_under_jeffreys_prior_and_not_under_a_gaussian_one(tmp_path):
    config = dataclasses.replace(Config(), out=tmp_path)
    result = bayes.run(config)
    for studies in result.studies.values():
        for cell in studies.values():
            assert max(*cell["r_hat"], cell["log_density"]["r_hat"]) <= 1.01
    assert np.abs(difference(result.studies["jeffreys"]).z).max() <= 3
    assert np.abs(difference(result.studies["gaussian"]).z).max() > 5
