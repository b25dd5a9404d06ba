"""Inspection of a network: its numbers, its refusals, and the command on a user's file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinv
from jaxinv import cli, networks
from jaxinv.errors import InvalidInput
from jaxinv.inspection import inspect, load, unit_balance
from jaxinv.rescaling import rescaling_group

MODEL = """
import jax, jax.numpy as jnp

def net(w, x):
    h = jax.nn.relu(x @ w["in"] + w["bias"])
    return jnp.tanh(h @ w["mid"]) @ w["out"]

def model():
    w = {"in": jnp.ones((2, 3)), "bias": jnp.zeros(3), "mid": jnp.ones((3, 4)),
         "out": jnp.ones((4, 1))}
    return net, w, jax.ShapeDtypeStruct((1, 2), jnp.float32)

def linear():
    return (lambda w, x: x @ w), jnp.ones((2, 2)), jnp.ones((1, 2))

def needs(width):
    return None

def wrong():
    return 3

value = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def test_balance_is_the_ratio_of_the_norms_of_each_unit():
    w = networks.init_mlp(jax.random.key(0), (5, 4, 3, 2), bias_std=0.5)
    group = rescaling_group(networks.mlp, w, jnp.ones((1, 5)))
    ratios = []
    for i, width in enumerate((4, 3)):
        layer, following = w[f"Dense_{i}"], w[f"Dense_{i + 1}"]
        for j in range(width):
            incoming = np.append(layer["kernel"][:, j], layer["bias"][j])
            ratios.append(np.linalg.norm(incoming) / np.linalg.norm(following["kernel"][j]))
    np.testing.assert_allclose(unit_balance(group, w), ratios, rtol=1e-5)


def test_the_bound_on_the_degrees_of_freedom_is_reached_by_enough_inputs():
    w = networks.init_mlp(jax.random.key(0), (3, 4, 2), bias_std=0.5)
    x = jax.random.normal(jax.random.key(1), (40, 3))
    report = inspect(networks.mlp, w, x)
    assert report.most == jaxinv.degrees_of_freedom(networks.mlp, w, x).rank == 22
    assert report.as_dict()["degrees_of_freedom_at_most"] == 22


def test_what_ties_units_is_in_the_text_and_in_json():
    w = {"a": jnp.ones((2, 3)), "s": jnp.ones(1)}
    fn = lambda w, x: jax.nn.relu(x @ w["a"]).sum(-1, keepdims=True) * w["s"]  # noqa: E731
    report = inspect(fn, w, jnp.ones((1, 2)))
    assert "tied by sum at" in str(report)
    assert report.as_dict()["group"]["tied_by"][0]["operation"] == "sum"


def test_a_dead_unit_has_no_finite_ratio_and_json_says_null():
    w = [jnp.ones((1, 2)), jnp.array([[0.0], [1.0]])]
    report = inspect(lambda w, x: jax.nn.relu(x @ w[0]) @ w[1], w, jnp.ones((1, 1)))
    assert report.layers[0].ratio == (1.0, np.inf, np.inf)
    text = json.dumps(report.as_dict(), allow_nan=False)
    ratio = json.loads(text)["group"]["layers"][0]["incoming_over_outgoing_norm"]
    assert ratio == {"min": 1.0, "median": None, "max": None}


def test_the_text_says_what_was_pinned_and_refused_and_where(file, capsys):
    assert cli.main(["inspect", f"{file}:model"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("25 parameters\n") and "float32[3, 4]" in printed
    assert "rescaling group of dimension 3" in printed and "3 scale the outputs of in" in printed
    assert "in out 0 → mid in 0" in printed
    # Incoming (1, 1, 0), outgoing four ones.
    assert "incoming/outgoing norm of a unit: 0.707 to 0.707" in printed
    assert "pinned by tanh at" in printed and "model.py:6" in printed
    assert "path norm refused:\n  `tanh` of values that depend on x" in printed


def test_json_holds_the_same(file, capsys):
    assert cli.main(["inspect", f"{file}:model", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["parameters"] == 25 and content["group"]["dimension"] == 3
    assert content["leaves"][2] == {
        "name": "mid",
        "shape": [3, 4],
        "dtype": "float32",
        "size": 12,
    }
    assert content["group"]["layers"][0]["generators"] == 3
    assert content["group"]["pinned_by"][0]["operation"] == "tanh"
    assert content["log_path_norm"] is None and "tanh" in content["path_norm_refused"]


def test_a_network_without_hidden_units_has_a_path_norm(file, capsys):
    assert cli.main(["inspect", f"{file}:linear", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["group"]["dimension"] == 0 and content["path_norm_refused"] is None
    assert content["log_path_norm"] == pytest.approx(np.log(2))
    assert content["leaves"][0]["name"] == "params"


def test_a_module_in_the_current_directory_is_found(file, monkeypatch):
    file.rename(file.with_name("inspected_model.py"))
    monkeypatch.chdir(file.parent)
    assert load("inspected_model:linear")[1].shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needs", "must work without arguments"),
        ("wrong", "returned int, but must return the tuple"),
        ("value", "has no function 'value'"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_a_wrong_target_is_one_line(file, name, message, capsys):
    assert cli.main(["inspect", f"{file}:{name}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("jaxinv: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("model.py", "not of the form MODULE:NAME"),
        ("no/such/file.py:f", "no such file"),
        ("no_such_module_anywhere:f", "cannot be imported"),
    ],
)
def test_a_target_that_cannot_be_imported_is_refused(target, message):
    with pytest.raises(InvalidInput, match=message):
        load(target)


HOSTILE = "w\x1b[2J\x9b31m\nfake line \ud800\u202e λ"
ESCAPED = r"w\x1b[2J\x9b31m\nfake line \ud800\u202e λ"


def test_names_cannot_write_to_the_terminal():
    w = {HOSTILE: jnp.ones((2, 3)), "out": jnp.ones((3, 1)), HOSTILE + "unused": jnp.ones(1)}
    report = inspect(lambda w, x: jax.nn.relu(x @ w[HOSTILE]) @ w["out"], w, jnp.ones((1, 2)))
    text = str(report)
    assert ESCAPED in text and f"unused: {ESCAPED}unused" in text
    assert not any(c in text for c in "\x1b\x9b\ud800\u202e") and "\nfake" not in text
    assert report.leaves[1][0] == HOSTILE  # values are as they are


def test_the_command_prints_hostile_names_in_any_form(tmp_path, capsys):
    path = tmp_path / "model.py"
    path.write_text(
        "import jax, jax.numpy as jnp\n"
        f"NAME = {ascii(HOSTILE)}\n"
        "def model():\n"
        "    w = {NAME: jnp.ones((2, 3)), 'out': jnp.ones((3, 1))}\n"
        "    return (lambda w, x: jax.nn.relu(x @ w[NAME]) @ w['out']), w, jnp.ones((1, 2))\n"
        "def bad():\n"
        "    return (lambda w, x: w[NAME]), {NAME: jnp.ones(1, int)}, jnp.ones((1, 2))\n"
    )
    assert cli.main(["inspect", f"{path}:model"]) == 0
    assert ESCAPED in capsys.readouterr().out
    assert cli.main(["inspect", "--json", f"{path}:model"]) == 0
    printed = capsys.readouterr().out
    printed.encode("utf-8")
    assert "λ" in printed and not any(c in printed for c in "\x1b\x9b\u202e")
    assert json.loads(printed)["leaves"][1]["name"] == HOSTILE
    assert cli.main(["inspect", f"{path}:bad"]) == 2
    error = capsys.readouterr().err
    error.encode("utf-8")
    assert "int32" in error and "\x1b" not in error
    page = tmp_path / "page.html"
    assert cli.main(["report", f"{path}:model", "--out", str(page)]) == 0
    written = page.read_text(encoding="utf-8")
    assert "\x1b" not in written and r"\u001b[2J" in written
    assert cli.main(["inspect", "no\x1bwhere:model"]) == 2
    assert r"no\x1bwhere" in capsys.readouterr().err


def test_matrix_symmetries_are_named_in_text_and_json():
    w = {"in": jnp.ones((3, 2)) + jnp.eye(3, 2), "out": jnp.ones((2, 3)) + jnp.eye(2, 3)}
    report = inspect(
        lambda w, x: x @ w["in"] @ w["out"], w, jax.ShapeDtypeStruct((1, 3), "float32")
    )
    assert "matrix symmetries: 2 dimensions beyond rescalings\n  GL(2): in out ~ out in" in str(
        report
    )
    assert report.as_dict()["matrix_symmetries"]["classes"] == ["GL(2): in out ~ out in"]
    relu = inspect(lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"], w, jnp.ones((1, 3)))
    assert relu.matrices == () and "matrix" not in str(relu)
