"""The invariance experiment: what it compares, what it measures, and what its table claims."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv import cli
from jaxinv.errors import InvalidInput
from jaxinv.experiments import files, invariance
from jaxinv.experiments.invariance import Config, Errors, Result

pytestmark = pytest.mark.usefixtures("standard_dtype_promotion")  # optax mixes dtypes

KEPT = ("sgd", "path_sgd, momentum", "sgd in normalised gauge", "natural gradient")
SMALL = ["--hidden", "6", "--batch-size", "20", "--steps", "3"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """One run of the whole command with few optimizers: nearly all of the time is compilation."""
    rows = invariance.optimizers()
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invariance, "optimizers", lambda: {name: rows[name] for name in KEPT})
        assert cli.main(["reproduce", "invariance", *SMALL, "--out", str(out)]) == 0
    return out, files.read_json(out / "results.json")


@pytest.mark.slow
def test_path_sgd_and_the_gauge_are_invariant_to_rescaling_and_sgd_is_not(small_run):
    errors, verdicts = small_run[1]["studies"], small_run[1]["verdicts"]
    for name in ("path_sgd, momentum", "sgd in normalised gauge"):
        row = errors[name]["rescaling"]
        assert verdicts[name]["rescaling"] == "invariant to rounding"
        assert max(row["first_step"], row["trajectory"], row["function"]) < 1e-11
    assert verdicts["sgd"]["rescaling"] == "not invariant"
    assert errors["sgd"]["rescaling"]["first_step"] > 0.1


@pytest.mark.slow
def test_the_natural_gradient_alone_is_invariant_to_a_general_reparametrisation(small_run):
    studies = dict(small_run[1]["studies"])
    row = studies.pop("natural gradient")
    assert max(row[kind]["first_function"] for kind in ("general", "rescaling")) < 1e-9
    assert small_run[1]["verdicts"]["natural gradient"] == {
        "general": "invariant to rounding",
        # Its pseudo-inverse is free in directions that the function does not see.
        "rescaling": "to first order in the function",
    }
    assert "sgd" in studies
    for name, row in studies.items():
        assert small_run[1]["verdicts"][name]["general"] == "not invariant"
        assert row["general"]["first_step"] > 0.01


@pytest.mark.slow
def test_the_command_writes_its_figure_and_numbers_and_leaves_32_bits(small_run):
    out, content = small_run
    assert sorted(path.name for path in out.iterdir()) == ["errors.png", "results.json", "table.md"]
    assert (out / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert content["group_dimension"] == 6 and content["config"]["steps"] == 3
    assert jnp.ones(1).dtype == jnp.float32


@pytest.mark.slow
def test_sgd_differs_by_the_square_of_the_derivative(small_run):
    """(∂w/∂θ)² g against g, with θ drawn again here."""
    from jaxinv.experiments import datasets
    from jaxinv.networks import init_mlp, mlp

    with jax.enable_x64(True):
        data = datasets.digits()
        x, y = jnp.asarray(data.x_train[:20], jnp.float64), jnp.asarray(data.y_train[:20])
        key, _ = jax.random.split(jax.random.key(0))
        theta = init_mlp(key, (64, 6, 10), bias_std=0.1, dtype=jnp.float64)
        w = invariance.general(theta)

        def loss(w):
            return optax.softmax_cross_entropy_with_integer_labels(mlp(w, x), y).mean()

        g = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(w))])
        slope = 1 + 0.3 * np.cosh(np.concatenate([t.ravel() for t in jax.tree.leaves(theta)]))
    expected = np.linalg.norm(g - slope**2 * g) / np.linalg.norm(slope**2 * g)
    measured = small_run[1]["studies"]["sgd"]["general"]["first_step"]
    np.testing.assert_allclose(measured, expected, rtol=1e-10)


def test_every_public_optimizer_of_optax_is_in_the_table_or_left_out_with_a_reason():
    public = set()
    for name in dir(optax):
        function = getattr(optax, name)
        if name.startswith(("_", "scale_by")):
            continue
        if inspect.isfunction(function) or isinstance(function, functools.partial):
            rates = {"learning_rate", "max_learning_rate"}
            if rates & set(inspect.signature(function).parameters):
                public.add(name)
    known = set(invariance.optimizers()) | set(invariance.LEFT_OUT)
    assert {"adam", "nadam", "lbfgs", "polyak_sgd"} <= public
    assert public - known == set()


def test_every_row_takes_a_step():
    params = {f"Dense_{i}": {"kernel": jnp.full((2, 2), 0.5)} for i in range(2)}
    setting = invariance.Setting(invariance.mlp, params, lambda params: params, jnp.ones((1, 2)))
    for name, make in invariance.optimizers().items():
        tx = make(0.1, setting)
        shapes = jax.eval_shape(lambda g, tx=tx: tx.update(g, tx.init(params), params)[0], params)
        assert jax.tree.structure(shapes) == jax.tree.structure(params), name


def test_a_run_that_diverged_is_not_called_invariant():
    assert invariance.verdict(Errors(1e-16, np.nan, np.nan, 1e-3), "rescaling") == "not invariant"
    assert invariance.verdict(Errors(0.3, 1e-3, 1e-3, 1e-16), "general") == "invariant to rounding"


def test_standing_still_in_the_first_step_is_not_called_invariant():
    """The first step of optax.rprop is 0 on both sides, so its error is 0 whatever it does next."""
    params = {"w": jnp.array([1.0, -2.0])}
    tx = optax.rprop(0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert not jnp.any(updates["w"])
    assert invariance.verdict(Errors(0.0, 0.23, 0.16, 0.0), "general") == "not invariant"


def test_table_and_plot_survive_divergence_and_exact_zeros(tmp_path):
    errors = {"sgd": {"rescaling": Errors(*[np.nan] * 4), "general": Errors(0, 0, 0, 0)}}
    result = Result(Config(), "made-up", 3, errors)
    rows = invariance.table(result).rows
    assert rows[0][2:] == ["diverged"] * 4 + ["not invariant"]
    assert rows[1][2:] == ["0.0e+00"] * 4 + ["invariant to rounding"]
    invariance.plot(result, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 5_000


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(InvalidInput, match="choose a smaller --batch-size"):
        invariance.run(Config(batch_size=5000))
