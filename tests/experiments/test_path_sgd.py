"""The Path-SGD experiment: its starts, its training loop, and what its table claims."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv.errors import InvalidInput
from jaxinv.experiments import datasets, path_sgd
from jaxinv.experiments.path_sgd import Config, Curves, Result
from jaxinv.networks import init_mlp, mlp

# optax.adam itself mixes dtypes (its step count is an integer), so whole runs cannot be strict.
pytestmark = pytest.mark.usefixtures("standard_dtype_promotion")

SMALL = Config(hidden=(32, 24), epochs=2, batch_size=100)


@pytest.fixture(scope="module")
def result():
    return path_sgd.run(SMALL)


@pytest.fixture
def only(monkeypatch):
    """Compare fewer optimizers: most of the time of a small run is compilation."""

    def keep(*names):
        kept = {name: path_sgd.OPTIMIZERS[name] for name in names}
        monkeypatch.setattr(path_sgd, "OPTIMIZERS", kept)

    return keep


def test_the_unbalanced_start_computes_the_same_function(x64):
    params = init_mlp(jax.random.key(0), (7, 40, 24, 3), bias_std=1.0, dtype=jnp.float64)
    moved = jax.jit(path_sgd.unbalance)(jax.random.key(1), params)
    x = jax.random.normal(jax.random.key(2), (50, 7), jnp.float64)
    np.testing.assert_allclose(mlp(moved, x), mlp(params, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("width", "count"), [(3, 1), (40, 10), (512, 128), (1000, 128)])
def test_a_quarter_of_the_units_but_at_most_128_are_rescaled(width, count):
    params = init_mlp(jax.random.key(0), (5, width, 2))
    moved = jax.jit(path_sgd.unbalance)(jax.random.key(1), params)
    ratio = moved["Dense_0"]["kernel"] / params["Dense_0"]["kernel"]
    scale = ratio.mean(axis=0)
    assert int((jnp.abs(scale - 1) > 1e-4).sum()) == count
    # Incoming and outgoing factors of a unit are inverse to each other.
    outgoing = (moved["Dense_1"]["kernel"] / params["Dense_1"]["kernel"]).mean(axis=1)
    np.testing.assert_allclose(scale * outgoing, 1, rtol=1e-5)


def test_the_factors_are_ten_times_log_normal():
    params = init_mlp(jax.random.key(0), (1, 512, 512, 512, 512, 1), bias=False)
    moved = jax.jit(path_sgd.unbalance)(jax.random.key(1), params)
    # Incoming weights of a layer also carry the previous layer's outgoing factors, so divide
    # one row by the balanced one: the same outgoing factor in every entry of it.
    ratio = moved["Dense_0"]["kernel"][0] / params["Dense_0"]["kernel"][0]
    logs = jnp.log(ratio[jnp.abs(ratio - 1) > 1e-4] / 10)
    assert logs.shape == (128,)
    # 128 standard normal draws: the mean has standard deviation 0.09, that of the spread is 0.06.
    assert abs(logs.mean()) < 0.27 and abs(logs.std() - 1) < 0.2


def test_both_starts_begin_with_the_same_loss_and_error(result):
    assert set(result.curves) == set(path_sgd.OPTIMIZERS)
    for starts in result.curves.values():
        balanced, unbalanced = starts["balanced"], starts["unbalanced"]
        np.testing.assert_allclose(balanced.step_loss[:, 0], unbalanced.step_loss[:, 0], rtol=1e-5)
        assert balanced.test_error[0, 0] == unbalanced.test_error[0, 0]


def test_all_optimizers_see_the_same_first_minibatch(result):
    first = [starts["balanced"].step_loss[0, 0] for starts in result.curves.values()]
    assert len(set(first)) == 1


def test_path_sgd_follows_one_curve_from_both_starts_and_the_others_do_not(result):
    distance = {
        name: path_sgd.start_distance(*(starts[start].step_loss for start in path_sgd.STARTS))[0]
        for name, starts in result.curves.items()
    }
    assert distance["path_sgd"] < 1e-4
    assert all(distance[name] > 0.1 for name in ("sgd", "adagrad", "adam"))


def test_every_optimizer_learns_from_the_balanced_start(result):
    for starts in result.curves.values():
        loss = starts["balanced"].step_loss[0]
        assert loss[-3:].mean() < loss[0]


def test_sgd_is_the_loop_one_would_write(result):
    """The compiled scan against a plain Python loop over the same minibatches."""
    data = datasets.digits()
    init_key, _ = jax.random.split(jax.random.key(0))
    params = init_mlp(init_key, (64, 32, 24, 10))
    losses = []

    @jax.jit
    def loss_and_gradient(params, x, y):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(mlp(params, x), y).mean()

        return jax.value_and_grad(loss)(params)

    for epoch in range(SMALL.epochs):
        order_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), epoch))
        order = np.asarray(jax.random.permutation(order_key, len(data.x_train)))
        for rows in order[: 14 * 100].reshape(14, 100):
            loss, gradient = loss_and_gradient(params, data.x_train[rows], data.y_train[rows])
            params = jax.tree.map(lambda w, g: w - 0.1 * g, params, gradient)
            losses.append(loss)
    curves = result.curves["sgd"]["balanced"]
    np.testing.assert_allclose(curves.step_loss[0], losses, rtol=1e-4)
    predicted = mlp(params, jnp.asarray(data.x_test)).argmax(axis=1)
    error = 100 * np.mean(np.asarray(predicted) != data.y_test)
    np.testing.assert_allclose(curves.test_error[0, -1], error, rtol=1e-5)
    loss = optax.softmax_cross_entropy_with_integer_labels(mlp(params, data.x_train), data.y_train)
    np.testing.assert_allclose(curves.final_loss[0], loss.mean(), rtol=1e-4)


def test_seeds_side_by_side_are_the_seeds_one_by_one(result, only):
    only("path_sgd")
    together = path_sgd.run(Config(hidden=(32, 24), epochs=2, batch_size=100, seeds=2))
    curves = together.curves["path_sgd"]["balanced"]
    assert curves.step_loss.shape == (2, 28)
    np.testing.assert_allclose(
        curves.step_loss[0], result.curves["path_sgd"]["balanced"].step_loss[0], rtol=1e-3
    )
    assert not np.allclose(curves.step_loss[0], curves.step_loss[1], rtol=1e-3)


def test_dropout_is_in_the_training_loss_and_not_in_the_evaluation():
    params = init_mlp(jax.random.key(0), (6, 300, 4))
    x, y = jnp.ones((8, 6)), jnp.zeros(8, jnp.int32)
    losses = [
        path_sgd._loss(params, x, y, key=jax.random.key(seed), dropout=0.5) for seed in range(2)
    ]
    assert losses[0] != losses[1]
    without = path_sgd._loss(params, x, y, key=jax.random.key(0), dropout=0.0)
    np.testing.assert_allclose(path_sgd._evaluate(params, x, y)[0], without, rtol=1e-5)


def test_dropout_keeps_the_mean_of_every_hidden_unit():
    # One hidden layer and two opposite linear outputs: the logits' mean shows in the loss's mean.
    params = {
        "Dense_0": {"kernel": jnp.ones((1, 4000))},
        "Dense_1": {"kernel": jnp.full((4000, 2), 1 / 4000) * jnp.array([1.0, -1.0])},
    }
    x, y = jnp.ones((50, 1)), jnp.zeros(50, jnp.int32)
    dropped = path_sgd._loss(params, x, y, key=jax.random.key(0), dropout=0.3)
    kept = path_sgd._loss(params, x, y, key=jax.random.key(0), dropout=0.0)
    # 4000 units average the masks: the logits deviate by about 1%, the loss by a tenth of that.
    np.testing.assert_allclose(dropped, kept, rtol=5e-3)


def test_dropout_trains_path_sgd_to_one_curve_too(only):
    only("path_sgd")
    result = path_sgd.run(Config(hidden=(32,), epochs=1, dropout=0.3))
    starts = result.curves["path_sgd"]
    distance = path_sgd.start_distance(*(starts[start].step_loss for start in path_sgd.STARTS))
    assert distance[0] < 1e-4


def test_tuning_picks_the_best_rate_and_leaves_a_given_one_alone(monkeypatch, only):
    only("sgd", "adagrad")
    monkeypatch.setattr(path_sgd, "TUNING_RATES", (1e-6, 0.1))
    result = path_sgd.run(Config(hidden=(16,), epochs=1, tune=True, lr_adagrad=0.005))
    # SGD at 0.1 is best from the balanced start, and hopeless from the other.
    assert {start: rate for start, (rate, _) in result.tuned["sgd"].items()} == {
        "balanced": 0.1,
        "unbalanced": 1e-6,
    }
    assert result.learning_rates == {"sgd": 1e-6, "adagrad": 0.005}


def test_one_rate_serves_both_starts_and_each_has_its_own_best(monkeypatch):
    """Final losses by hand: the shared rate is that of the least worse loss, 2 at 0.03."""
    losses = {
        ("balanced", 0.01): 3.0, ("balanced", 0.03): 2.0, ("balanced", 0.1): 1.0,
        ("unbalanced", 0.01): 1.5, ("unbalanced", 0.03): 1.8, ("unbalanced", 0.1): np.nan,
    }  # fmt: skip

    class Made:
        def __call__(self, study, key, compute):
            start, rate = key.split(", ")
            final = [losses[start, float(rate)]]
            return {"step_loss": [[1.0]], "test_error": [[1.0]], "final_loss": final} | {
                "seconds_per_step": 1.0
            }

    kept = {"sgd": path_sgd.OPTIMIZERS["sgd"]}
    monkeypatch.setattr(path_sgd, "OPTIMIZERS", kept)
    monkeypatch.setattr(path_sgd, "TUNING_RATES", (0.01, 0.03, 0.1))
    result = path_sgd.run(Config(hidden=(4,), epochs=1, tune=True), store=Made())
    assert result.learning_rates == {"sgd": 0.03}
    best = {start: (rate, curves.final_loss[0]) for start, (rate, curves) in
            result.tuned["sgd"].items()}  # fmt: skip
    assert best == {"balanced": (0.1, 1.0), "unbalanced": (0.01, 1.5)}
    row = path_sgd.table(result).rows[0]
    assert row[1] == "0.03" and row[-2:] == ["0.1", "1"]


def test_in_float64_the_starts_of_path_sgd_agree_to_its_rounding(only):
    only("sgd", "path_sgd")
    result = path_sgd.run(Config(hidden=(16,), epochs=1, float64=True))
    gaps = {
        name: max(path_sgd.median_gap(*(starts[s].step_loss for s in path_sgd.STARTS)))
        for name, starts in result.exact.items()
    }
    assert gaps["path_sgd"] < 1e-13 < 1e-3 < gaps["sgd"]
    assert path_sgd.record(result)["median_gaps"]["float64"] == gaps
    # The same balanced start and minibatches as in float32.
    for name, starts in result.exact.items():
        np.testing.assert_allclose(
            starts["balanced"].step_loss, result.curves[name]["balanced"].step_loss, rtol=1e-3
        )


def test_tuning_never_picks_a_rate_that_diverges(monkeypatch, only):
    only("sgd")
    monkeypatch.setattr(path_sgd, "TUNING_RATES", (1e30, 1e-3))
    result = path_sgd.run(Config(hidden=(16,), epochs=1, tune=True))
    assert result.learning_rates["sgd"] == 1e-3


def test_progress_ends_at_one(only):
    only("sgd", "adagrad")
    fractions = []
    path_sgd.run(Config(hidden=(8,), epochs=2), lambda fraction, what: fractions.append(fraction))
    assert fractions == [(i + 1) / 8 for i in range(8)]


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(
        InvalidInput, match=r"a batch of 1438 is larger .*\(1437 images of digits\)"
    ):
        path_sgd.run(Config(batch_size=1438))


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"), [(600, 3, 8), (14, 20, 1), (14, 2, 7), (13, 5, 1), (1, 1, 1)]
)
def test_segments_divide_an_epoch(steps, epochs, expected):
    assert path_sgd._segments(steps, epochs) == expected


def _made_up(step_loss, test_error):
    curves = Curves(np.array(step_loss), np.array(test_error), np.array(step_loss)[:, -1], 0.002)
    return curves


@pytest.fixture
def diverging():
    good = _made_up([[2.0, 1.0, 0.5], [2.2, 1.0, 0.7]], [[90.0, 9.0], [90.0, 7.0]])
    bad = _made_up([[2.0, np.inf, np.nan], [2.2, 1.0, 0.4]], [[90.0, np.nan], [90.0, 8.0]])
    curves = {name: {"balanced": good, "unbalanced": bad} for name in path_sgd.OPTIMIZERS}
    rates = dict.fromkeys(curves, 0.1)
    tuned = {name: {s: (0.1, c) for s, c in starts.items()} for name, starts in curves.items()}
    return Result(Config(seeds=2, epochs=1), "made-up", rates, curves, tuned, curves)


def test_table_values_are_those_of_the_curves(result):
    rows = path_sgd.table(result).rows
    for (name, start), row in zip(
        ((name, start) for name in path_sgd.OPTIMIZERS for start in path_sgd.STARTS),
        rows,
        strict=True,
    ):
        starts = result.curves[name]
        assert row[:3] == [
            path_sgd.OPTIMIZERS[name].label,
            f"{result.learning_rates[name]:g}",
            start,
        ]
        assert float(row[3]) == pytest.approx(starts[start].final_loss[0], rel=6e-3)
        assert float(row[4]) == pytest.approx(starts[start].test_error[0, -1], abs=6e-3)
        assert float(row[7]) == pytest.approx(1e3 * starts[start].seconds_per_step, rel=6e-3)
        if start == "balanced":
            largest = max(
                abs(a - b)
                for a, b in zip(
                    starts["balanced"].step_loss[0], starts["unbalanced"].step_loss[0], strict=True
                )
            )
            assert float(row[5]) == pytest.approx(largest, rel=0.06)


def test_table_says_diverged_and_means_over_seeds(diverging):
    balanced, unbalanced = path_sgd.table(diverging).rows[:2]
    assert balanced[3:7] == ["0.6 ± 0.1", "8.00 ± 1.00", "diverged", "diverged"]
    assert unbalanced[3:5] == ["diverged", "diverged"]


def test_plot_survives_divergence(diverging, tmp_path):
    path_sgd.plot(diverging, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_plot_survives_divergence_at_the_second_of_many_steps(diverging, tmp_path):
    bad = diverging.curves["sgd"]["unbalanced"]
    bad = bad._replace(step_loss=np.array([[2.0] + [np.nan] * 200] * 2))
    path_sgd.plot(
        diverging._replace(curves={"sgd": {"balanced": bad, "unbalanced": bad}}),
        tmp_path / "curves.png",
    )
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_running_mean_begins_with_the_first_loss_and_keeps_constants():
    curves = np.full((2, 300), 3.0)
    np.testing.assert_allclose(path_sgd._running_mean(curves), curves)
    curves[:, 0] = 9.0  # width 6: in the first six means, the k-th of which has k terms
    expected = 3 + 6 / np.arange(1, 7)
    np.testing.assert_allclose(path_sgd._running_mean(curves)[0, :7], [*expected, 3])


def test_diverged_logits_have_no_error_rate():
    params = {"Dense_0": {"kernel": jnp.full((2, 3), jnp.nan)}}
    loss, error = path_sgd._evaluate(params, jnp.ones((4, 2)), jnp.zeros(4, jnp.int32))
    assert jnp.isnan(loss) and jnp.isnan(error)


def _mnist():
    default = Path(__file__).parents[2] / ".." / "shared" / "data" / "mnist"
    path = Path(os.environ.get("JAXINV_MNIST", default))
    if not path.is_dir():
        pytest.skip("no MNIST files; set JAXINV_MNIST to their directory")
    return path


def test_mnist_is_read():
    data = datasets.load(_mnist())
    assert data.x_train.shape == (60000, 784) and data.x_test.shape == (10000, 784)
    assert data.num_classes == 10 and data.x_train.max() == 1


@pytest.mark.slow
def test_mnist_path_sgd_learns_the_same_from_both_starts_and_sgd_collapses():
    result = path_sgd.run(Config(data=_mnist(), epochs=3))
    error = {
        (name, start): curves.test_error[0, -1]
        for name, starts in result.curves.items()
        for start, curves in starts.items()
    }
    assert abs(error["path_sgd", "balanced"] - error["path_sgd", "unbalanced"]) < 0.2
    assert error["path_sgd", "balanced"] < 3 and error["sgd", "balanced"] < 5
    assert not error["sgd", "unbalanced"] < 80  # NaN where it diverges
