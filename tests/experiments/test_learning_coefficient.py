"""The experiment learning-coefficient: its models, its numbers, and what it says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinv import cli
from jaxinv.bayes import rlct
from jaxinv.experiments import files
from jaxinv.experiments import learning_coefficient as experiment

ARGV = ["reproduce", "learning-coefficient", "--chains", "2", "--steps", "20"]
ARGV += ["--hidden", "2", "--epochs", "5"]


@pytest.mark.parametrize(("widths", "rank"), [((3, 2, 3), 1), ((2, 5, 2), 0), ((2, 4, 3, 2), 2)])
def test_linear_models_are_the_products_that_theory_is_about(widths, rank):
    """mean ‖fn(w, x) − fn(w*, x)‖² = ‖B A − T‖² with a map T of the rank asked for."""
    fn, truth, x = experiment.linear(widths, rank)
    key = jax.random.key(0)
    w = jax.tree.map(lambda a: a + jax.random.normal(key, a.shape), truth)

    def product(layers):
        return np.linalg.multi_dot([np.asarray(layer["kernel"]) for layer in layers.values()])

    found = ((fn(w, x) - fn(truth, x)) ** 2).sum() / len(x)
    np.testing.assert_allclose(found, ((product(w) - product(truth)) ** 2).sum(), rtol=1e-5)
    assert np.linalg.matrix_rank(product(truth)) == rank


def test_the_settings_have_multiplicity_one_and_cover_the_four_cases():
    cases = set()
    for m, h, n, r in experiment.REDUCED_RANK:
        assert rlct.reduced_rank(m, h, n, r).multiplicity == 1
        cases.add((m + h < n + r, n + h < m + r, m + n < h + r))
    assert len(cases) == 4
    assert all(rlct.deep_linear(*setting).multiplicity == 1 for setting in experiment.DEEP_LINEAR)
    assert {rlct.deep_linear(*setting).multiplicity for setting in experiment.GROWING} >= {1, 2}


def test_a_teacher_is_regular_up_to_its_rescalings():
    for activation, ambiguities in (("ReLU", 4), ("tanh", 0)):
        fn, w, x = experiment.teacher(activation, (3, 4, 2))
        bounds = experiment.learning_coefficient_bounds(fn, w, x, "gaussian")
        assert (int(bounds.rank), bool(bounds.certain)) == (26 - ambiguities, True)


def test_one_estimate_is_that_of_the_library():
    config = experiment.Config(chains=3, steps=100)
    cell = experiment.cells(config)["reduced-rank"]["2-5-2, rank 0"]()
    assert (cell["exact"], cell["multiplicity"], cell["parameters"], cell["n"]) == (
        "2",
        1,
        20,
        10**4,
    )

    def loss(w):
        return ((w[0] @ w[1]) ** 2).sum() / 2

    found = experiment.local_learning_coefficient(
        loss, [jnp.zeros((2, 5)), jnp.zeros((5, 2))], 10**4, jax.random.key(0), beta=1.0,
        num_chains=3, num_steps=100, num_warmup=20,
    )  # fmt: skip
    # The same chains on a loss that is spelled out, up to rounding that grows along them.
    np.testing.assert_allclose(cell["value"], found.value, rtol=0.2)


FEW = {"networks": 1, "examples": 1}
MORE = {"networks": 1, "examples": 1, "trained": 1}


@pytest.fixture(scope="module", params=[FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=len)
def small_run(tmp_path_factory, request):
    out, chosen = tmp_path_factory.mktemp("learning-coefficient"), request.param
    with pytest.MonkeyPatch.context() as patch:  # few cells, since each is compiled apart
        full = experiment.cells
        patch.setattr(
            experiment, "cells",
            lambda config: {
                study: dict(list(thunks.items())[: chosen.get(study, 0)])
                for study, thunks in full(config).items()
            },
        )  # fmt: skip
        assert cli.main([*ARGV, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_the_command_writes_figure_and_numbers(small_run):
    assert (small_run / experiment.FIGURE).read_bytes().startswith(b"\x89PNG")
    studies = files.read_json(small_run / "results.json")["studies"]
    assert [cell["n"] for cell in studies["examples"].values()] == [100]
    for trained in studies["trained"].values():
        assert trained["parameters"] == 64 * 2 + 2 + 2 * 10 + 10 and trained["n"] == 1437
        assert trained["rank"] <= 160 - 2 - 11 and np.isfinite(trained["value"])


def cell(value, exact, multiplicity=1, **others):
    numbers = {"standard_error": 0.1, "rank": 3, "parameters": 8, "drift": 0.0, "n": 10**6}
    return {"value": value, "exact": exact, "multiplicity": multiplicity, **numbers, **others}


def test_errors_are_relative_to_the_exact_value_and_signed():
    studies = {
        "crossings": {"a": cell(0.9, "3/4"), "b": cell(0.5, "1")},
        "networks": {"c": cell(5.0, None, None)},
    }
    result = experiment.Result(experiment.Config(), studies)
    assert experiment.record(result) == {"largest_relative_error": {"crossings": 0.5}}
    rows = experiment.table(result).rows
    assert [row[5] for row in rows] == ["+20.0", "-50.0", ""]
    assert rows[0][6:8] == ["1.5", "4"]
