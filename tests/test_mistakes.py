"""What a newcomer gets wrong: the message names that mistake and the remedy.

Each row is a call, and what its message must say. Nothing of this may pass silently.
"""

import pathlib
import re
import traceback

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from jaxinv import (
    JaxinvError,
    degrees_of_freedom,
    jacobian_rank,
    natural_gradient,
    networks,
    path_norm,
    path_sgd,
    random_rescaling,
    rescaling_group,
)

X = jnp.ones((6, 4))
W = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2))}
TOKENS = {"table": jnp.ones((9, 3)), "b": jnp.ones((3, 2))}


def net(w, x):
    return jax.nn.relu(x @ w["a"]) @ w["b"]


def of_tokens(w, x):
    return w["table"][x].sum(1) @ w["b"]


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x)))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(h))


MODEL = Classifier()
VARIABLES = MODEL.init(jax.random.key(0), X)
MLP, STATIC = eqx.partition(eqx.nn.MLP(4, 2, 5, 1, key=jax.random.key(0)), eqx.is_array)


def training(params, x, rngs=None):
    variables = {"params": params, "batch_stats": VARIABLES["batch_stats"]}
    return MODEL.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])[0]


def update(optimizer):
    return optimizer.update(W, optimizer.init(W), W)


def fails(w, x):
    raise ZeroDivisionError("division by zero")


MISTAKES = {
    "a module as fn": (
        lambda: path_norm(MODEL, VARIABLES["params"], X),
        r"a flax linen module \(Classifier\).*from_linen",
    ),
    "variables as params": (
        lambda: rescaling_group(MODEL.apply, VARIABLES, X),
        r"batch_stats, which are not parameters.*from_linen",
    ),
    "a number as fn": (
        lambda: path_sgd(net, 0.1, X),
        r"fn must be a function.*not 0.1.*\(learning_rate, fn, x\) for path_sgd",
    ),
    "a likelihood as fn": (lambda: natural_gradient(0.1, "softmax", "softmax"), "fn must be a fun"),
    "fn as params": (lambda: path_norm(W, net, X), "params is a function.*order"),
    "params and x swapped": (lambda: path_norm(net, X, W), "params and x are swapped"),
    "x without batch axis": (lambda: path_norm(net, W, X[0]), r"pass x\[None\] for one example"),
    "x without batch axis, ranks": (lambda: jacobian_rank(net, W, X[0]), r"pass x\[None\]"),
    "equinox without vmap": (
        lambda: path_norm(lambda p, x: eqx.combine(p, STATIC)(x), MLP, X),
        r"fn takes one example: pass jax.vmap\(fn, in_axes=\(None, 0\)\)",
    ),
    "tokens as floats": (lambda: path_norm(of_tokens, TOKENS, X), r"pass x.astype\(int\)"),
    "a missing random key": (
        lambda: path_norm(training, VARIABLES["params"], X),
        r"asks for random numbers.*deterministic=True",
    ),
    "training mode": (
        lambda: path_norm(
            lambda p, x: training(p, x, {"dropout": jax.random.key(0)}), VARIABLES["params"], X
        ),
        r"part of `BatchNorm`.*use_running_average=True in flax, training=False",
    ),
    "a third argument": (
        lambda: path_norm(lambda w, x, rng: net(w, x), W, X),
        r"Close over the rest: lambda params, x: fn\(params, x, 0\)",
    ),
    "a seed for a key": (lambda: random_rescaling(rescaling_group(net, W, X), 0), "key must be"),
    "no return": (lambda: degrees_of_freedom(lambda w, x: None, W, X), "missing `return`"),
    "a loss as fn": (lambda: path_norm(lambda w, x: net(w, x).mean(), W, X), "as a loss does"),
    "a squared loss in path_sgd": (
        lambda: update(path_sgd(0.1, lambda w, x: (net(w, x) ** 2).mean(), X)),
        "fn returns one number, as a loss does",
    ),
    "optax.flatten": (
        lambda: update(optax.flatten(path_sgd(0.1, net, X))),
        "These params are one vector. If optax.flatten",
    ),
    "a softmax at the end": (
        lambda: path_norm(lambda w, x: jax.nn.softmax(net(w, x)), W, X),
        "return the logits; leave softmax to the loss",
    ),
    "text for a number": (lambda: path_sgd("0.1", net, X), "learning_rate must be a number"),
    "a list of numbers as x": (
        lambda: path_norm(net, W, [[1.0, 2.0, 3.0, 4.0]]),
        r"^x is a list of Python numbers. Pass an array, jnp.asarray\(x\)",
    ),
    "a shape as x": (lambda: path_norm(net, W, (6, 4)), r"for a shape alone jax.ShapeDtypeStruct"),
    "a bug in fn": (
        lambda: path_norm(fails, W, X),
        r"ZeroDivisionError.*where: .*test_mistakes.py.*\(fails\).*on x as given, too",
    ),
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(call, message):
    with pytest.raises(JaxinvError, match=f"(?s){message}"):
        call()


def test_the_page_of_mistakes_quotes_what_is_said():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "mistakes.md").read_text("utf-8")
    rows = re.findall(r"^\| .* \| .* \| (`+)(.*?)\1 \|$", page, re.M)
    assert len(rows) >= 15
    said = []
    for call, _ in MISTAKES.values():
        with pytest.raises(JaxinvError) as caught:
            call()
        said.append(str(caught.value))
    for _, quote in rows:
        assert any(quote.strip() in message for message in said), quote


def test_a_batch_of_fixed_size_is_told_from_a_mistake():
    def fixed(w, x):
        return net(w, x.reshape(6, 4))

    with pytest.raises(JaxinvError, match="fn must accept any batch size"):
        path_norm(fixed, W, X)
    assert jacobian_rank(fixed, W, X).rank > 0  # Jacobians take the batch whole


def test_the_error_of_fn_is_the_cause():
    with pytest.raises(JaxinvError) as caught:
        path_norm(fails, W, X)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_mistake_comes_first_and_a_model_does_not_fill_the_message():
    with pytest.raises(JaxinvError) as caught:
        path_norm(lambda p, x: eqx.combine(p, STATIC)(x), MLP, X)
    first, second, where = str(caught.value).split("\n")
    assert first.startswith("fn takes one example")
    assert "MLP of 4 arrays (float32[5,4], float32[5]" in second and "test_mistakes.py" in where


def test_the_traceback_of_a_bug_begins_at_the_line_of_the_user():
    with pytest.raises(JaxinvError) as caught:
        jacobian_rank(fails, W, X)
    assert caught.value.__cause__ is not None
    first = traceback.extract_tb(caught.value.__cause__.__traceback__)[0]
    assert first.filename == __file__ and first.name == "fails"


def test_one_collection_of_variables_is_params():
    model = nn.Dense(2)
    assert path_norm(model.apply, model.init(jax.random.key(0), X), X) > 0


def test_nothing_of_this_hides_what_works():
    params = networks.init_mlp(jax.random.key(0), (4, 3))
    assert path_norm(networks.mlp, params, X) > 0
