"""The experiment degrees-of-freedom: sums of parameters and spectra against independent facts."""

import argparse
import contextlib
import io
import json

import numpy as np
import pytest

from jaxinv import cli
from jaxinv.errors import InvalidInput
from jaxinv.experiments import datasets, degrees_of_freedom
from jaxinv.pages import experiment_page

HIDDEN = 2  # as in the example of `run`, whose programs are then found in the cache
PARAMETERS = 64 * HIDDEN + HIDDEN + HIDDEN * 10 + 10


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    # As many normal inputs as there are digits: programs are compiled once for both.
    argv = ["--hidden", str(HIDDEN), "--examples", "1437", "--bias-std", "0.5", "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["reproduce", "degrees-of-freedom", *argv]) == 0
    content = json.loads((out / "results.json").read_text())
    return out, content["studies"]["seed 0"], printed.getvalue()


@pytest.mark.slow
def test_every_parameter_is_counted_once(small_run):
    assert {"standard normal", "digits"} <= set(small_run[1])  # else the loops below see nothing
    for split in small_run[1].values():
        terms = [split[name] for name in ("rank", "rescaling", "dead", "unexplained", "unseen")]
        assert sum(terms) == split["parameters"] == PARAMETERS
        # What no symmetry explains leaves the rank without a proof from above.
        assert min(terms) >= 0 and split["certain"] == (split["unexplained"] == 0)
        assert split["group_dimension"] == HIDDEN  # one rescaling per hidden unit
        assert split["rank"] <= PARAMETERS - HIDDEN


@pytest.mark.slow
def test_normal_inputs_lose_nothing_but_the_rescalings(small_run):
    split = small_run[1]["standard normal"]
    found = split["rank"], split["rescaling"], split["dead"], split["unexplained"]
    assert found == (PARAMETERS - HIDDEN, HIDDEN, 0, 0)


@pytest.mark.slow
def test_the_weights_of_pixels_that_are_always_zero_are_dead(small_run):
    split = small_run[1]["digits"]
    assert split["examples"] == 1437
    blank = np.flatnonzero((datasets.digits().x_train == 0).all(axis=0))
    assert len(blank) == 3
    names = {f"Dense_0/kernel[{pixel}, :]" for pixel in blank}
    assert names <= set(split["dead_names"])
    assert split["dead"] == sum(split["dead_by_leaf"].values()) >= HIDDEN * len(blank)


@pytest.mark.slow
def test_the_cliff_of_the_spectrum_is_at_the_rank(small_run):
    for split in small_run[1].values():
        s, r = np.array(split["spectra"]["float64"]), split["rank"]
        assert len(s) == PARAMETERS and (np.diff(s) <= 0).all()
        assert s[r - 1] == split["smallest"] > 1e3 * s[r]
        assert s[r] < split["error"] < s[r - 1]
        # float32 agrees where the values are far above its rounding.
        np.testing.assert_allclose(split["spectra"]["float32"][:20], s[:20], rtol=1e-4)
        assert split["numpy_rank"]["float64"] == r


@pytest.mark.slow
def test_the_page_shows_what_the_run_printed(small_run):
    page = experiment_page(small_run[0])
    table = json.loads(page.split('id="data">')[1].split("</script>")[0])["table"]
    printed = [line.split() for line in small_run[2].splitlines()]
    assert len(table["rows"]) == 2
    for row in table["rows"]:
        assert " ".join(row).split() in printed


def test_numpy_rank_is_that_of_numpy():
    random = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        A = (random.normal(size=(30, 12)) * 0.1 ** np.arange(12)).astype(dtype)
        s = np.linalg.svd(A, compute_uv=False)
        assert degrees_of_freedom.numpy_rank(s, 30, 12) == np.linalg.matrix_rank(A)


def _split(examples, parameters):
    spectra = {name: np.array([1.0]) for name in degrees_of_freedom.PRECISIONS}
    counts = (1, 2, 0, 0, parameters - 3)
    ranks = dict.fromkeys(degrees_of_freedom.PRECISIONS, 1)
    return degrees_of_freedom.Split(
        "noise", 0, examples, examples * 10, parameters, 2, *counts, False, 1.0, 0.0, [], {},
        spectra, ranks,
    )  # fmt: skip


def test_the_table_says_when_there_are_too_few_inputs():
    config = degrees_of_freedom.Config()
    for examples, told in ((30, True), (31, False)):  # 10 rows each, for 301 parameters
        result = degrees_of_freedom.Result(config, (1, 1), [_split(examples, 301)])
        title = degrees_of_freedom.table(result).title
        assert ("limited by 300 rows; at least 31 inputs are needed" in title) == told
    assert (
        "limited"
        not in degrees_of_freedom.table(
            degrees_of_freedom.Result(config, (1, 1), [_split(30, 300)])
        ).title
    )


def test_pooling_averages_squares_and_refuses_what_has_none():
    x = np.random.default_rng(0).normal(size=(3, 36))
    found = degrees_of_freedom.pooled(x, 3)
    for i in range(2):
        for j in range(2):
            square = x.reshape(3, 6, 6)[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            np.testing.assert_allclose(found[:, 2 * i + j], square.mean((1, 2)))
    for pixels, side in ((36, 4), (35, 2)):
        with pytest.raises(InvalidInput, match="choose a --pool that divides"):
            degrees_of_freedom.pooled(np.zeros((1, pixels)), side)


@pytest.mark.slow
def test_the_table_writes_the_sum_and_where_the_dead_are(small_run):
    printed = " ".join(small_run[2].split())
    split = small_run[1]["digits"]
    dead = split["dead_by_leaf"]["Dense_0/kernel"]
    assert f"dead on digits, seed 0: {dead} in Dense_0/kernel" in printed
    names = ("parameters", "rank", "rescaling", "dead", "unexplained", "unseen")
    terms = " ".join(str(split[name]) for name in names)
    assert f"digits 0 1437 {terms} {'yes' if split['certain'] else 'no'}" in printed


@pytest.mark.slow
def test_the_command_writes_a_figure(small_run):
    assert (small_run[0] / "spectra.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "wide"])
def test_a_spread_that_is_none_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number of 0 or more"):
        degrees_of_freedom.spread(text)


@pytest.mark.slow
def test_the_default_network_has_3402_degrees_of_freedom_on_normal_inputs():
    result = degrees_of_freedom.run(degrees_of_freedom.Config())
    normal, digits = result.splits
    assert (normal.parameters, normal.rank, normal.rescaling) == (3466, 3402, 64)
    assert (normal.dead, normal.unexplained, normal.certain) == (0, 0, True)
    assert digits.rank + digits.rescaling + digits.dead + digits.unexplained == 3466
