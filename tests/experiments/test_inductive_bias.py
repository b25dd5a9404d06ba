"""The width sweep: its training loop, when it stops, what it says, and that it goes on."""

import copy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv import cli
from jaxinv.errors import InvalidInput
from jaxinv.experiments import files, inductive_bias, resuming
from jaxinv.experiments.inductive_bias import Config, Result, table, train, u_turn, verdict
from jaxinv.networks import init_mlp, mlp

SMALL = {"examples": 100, "batch_size": 50, "epochs": 60, "seeds": 2, "lr": 0.1, "loss": 0.05}
ARGV = ["reproduce", "inductive-bias", "--hidden", "2,32"]
ARGV += [w for k, v in SMALL.items() for w in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("inductive-bias")
    with pytest.MonkeyPatch.context() as patch:  # fewer norms compile in less time
        names = ("path_2", "spectral_product", "frobenius")
        chosen = {name: inductive_bias.MEASURES[name] for name in names}
        patch.setattr(inductive_bias, "MEASURES", chosen)
        assert cli.main([*ARGV, "--out", str(out)]) == 0
        first = files.read_json(out / "results.json")
        left = copy.deepcopy(first)  # as if it had been killed after the first width
        del left["studies"]["widths"]["32"]
        files.write_json(out / "results.json", left)
        assert cli.main([*ARGV, "--out", str(out)]) == 0
        again = files.read_json(out / "results.json")
    assert resuming.deterministic(again) == resuming.deterministic(first)
    assert (out / "widths.png").read_bytes().startswith(b"\x89PNG")
    return again


@pytest.mark.slow
def test_what_fits_stops_early_and_what_does_not_trains_on(small_run):
    narrow, wide = small_run["studies"]["widths"].values()
    assert narrow["first_zero"] == [None, None] and narrow["epochs"] == [60, 60]
    assert min(narrow["train_error"]) > 0 and narrow["test_error_at_first_zero"] == [None, None]
    assert wide["train_error"] == [0, 0] and max(wide["loss"]) <= 0.05
    for first, last in zip(wide["first_zero"], wide["epochs"], strict=True):
        assert 0 < first <= last < 60
    assert min(wide["smallest_margin"]) > 0  # all training examples are right


def test_the_loop_is_that_of_plain_steps():
    config = Config(hidden=(6,), **SMALL)
    data = inductive_bias._load(config)
    s = jax.jit(lambda key: train(config, data, 6, key))(jax.random.key(0))
    init_key, order_key = jax.random.split(jax.random.key(0))
    params = init_mlp(init_key, (64, 6, 10))
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    momentum = jax.tree.map(jnp.zeros_like, params)

    def loss(w, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(mlp(w, x), y).mean()

    @jax.jit
    def step(w, m, x, y):
        m = jax.tree.map(lambda m, g: 0.9 * m + g, m, jax.grad(loss)(w, x, y))
        return jax.tree.map(lambda w, m: w - 0.1 * m, w, m), m

    errors = []
    for epoch in range(int(s.epoch)):
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), 100)
        for rows in (order[:50], order[50:]):
            params, momentum = step(params, momentum, x[rows], y[rows])
        errors.append(float((mlp(params, x).argmax(-1) != y).mean()))
    assert int(s.first) == (1 + errors.index(0) if 0 in errors else -1)
    np.testing.assert_allclose(float(s.error), errors[-1], atol=1e-6)
    chex.assert_trees_all_close(s.params, params, rtol=1e-7, atol=1e-3)


def found(width, test, zero=True):
    norms = {name: [1.0, 1.0] for name in inductive_bias.MEASURES}
    return {
        "width": width, "parameters": width, "epochs": [5, 5], "train_error": [0.0, 0.0],
        "test_error": test, "first_zero": [3, 3] if zero else [3, None],
        "test_error_at_first_zero": test if zero else [test[0], None],
        "margin_quantile": [1.0, 1.0] if zero else [1.0, -1.0], "log_norms": norms,
    }  # fmt: skip


def test_a_u_turn_is_called_one_only_beyond_its_error():
    rising = [found(8, [4.0, 4.2]), found(64, [2.0, 2.1]), found(512, [3.0, 3.1])]
    noisy = [found(8, [4.0, 4.2]), found(64, [2.0, 2.4]), found(512, [1.8, 2.9])]
    falling = [found(8, [4.0, 4.2]), found(64, [2.0, 2.1])]
    assert u_turn(rising).seen and not u_turn(noisy).seen and not u_turn(falling).seen
    for cells, words in ((rising, "\na U-turn"), (noisy, "\nno U-turn"), (falling, "lowest at")):
        result = Result(Config(seeds=2), "digits", {"widths": {c["width"]: c for c in cells}})
        assert words in verdict(result)


def test_widths_that_do_not_fit_are_not_said_to():
    cells = {"8": found(8, [4.0, 4.2], zero=False), "64": found(64, [2.0, 2.1])}
    result = Result(Config(seeds=2), "digits", {"widths": cells})
    assert "all 2 seed(s): H = 64\n" in verdict(result)
    first, second = table(result).rows
    assert first[5] == "–" and second[5] == "2.05 ± 0.07"  # at the first zero error
    assert first[7] == "–" and second[7] == f"{1 / np.log(10):.2f}"  # no margin, no capacity


def test_large_batches_are_refused():
    with pytest.raises(InvalidInput, match="--batch-size"):
        inductive_bias.run(Config(examples=50))


@pytest.mark.slow
def test_norms_are_those_of_the_networks(small_run):
    config = Config(hidden=(2, 32), **SMALL)
    key = jax.random.key(1)  # the second seed
    s = jax.jit(lambda key: train(config, inductive_bias._load(config), 32, key))(key)
    layers = [np.asarray(s.params[f"Dense_{i}"]["kernel"], np.float64) for i in range(2)]
    logs = small_run["studies"]["widths"]["32"]["log_norms"]
    product = sum(np.log(np.linalg.norm(w, 2)) for w in layers)
    np.testing.assert_allclose(logs["spectral_product"][1], product, atol=1e-3)
    whole = np.sqrt(sum((np.asarray(a) ** 2).sum() for a in jax.tree.leaves(s.params)))
    np.testing.assert_allclose(logs["frobenius"][1], np.log(whole), atol=1e-4)
