"""What path semantics do not cover is refused: what, at which source line, why, what to do."""

import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinv import (
    JaxinvError,
    UnsupportedOperation,
    log_path_kappa,
    log_path_norm,
    path_kappa,
    path_norm,
    unit_path_norms,
)

FUNCTIONS = [path_norm, log_path_norm, path_kappa, log_path_kappa, unit_path_norms]
W = np.array([[1.0, -2.0, 0.5], [0.5, 3.0, -1.0]], np.float32)
X = np.ones((4, 2), np.float32)


# --- operations that are not positively homogeneous ---------------------------------------------
# Each function keeps the offending operation within its own lines, which the error must name.


def relu6(w, x):
    return jax.nn.relu6(x @ w)


def minimum_with_a_constant(w, x):
    return jnp.minimum(x @ w, 6.0)


def maximum_with_a_constant(w, x):
    return jnp.maximum(x @ w, 1.0)


def maximum_with_a_negative_constant(w, x):
    return jnp.maximum(x @ w, -1.0)


def clip(w, x):
    return jnp.clip(x @ w, -1.0, 1.0)


def clamp(w, x):
    return lax.clamp(0.0, x @ w, 6.0)


def tanh(w, x):
    return jnp.tanh(x @ w)


def sigmoid(w, x):
    return jax.nn.sigmoid(x @ w)


def gelu(w, x):
    return jax.nn.gelu(x @ w)


def exact_gelu(w, x):
    return jax.nn.gelu(x @ w, approximate=False)


def silu(w, x):
    return jax.nn.silu(x @ w)


def elu(w, x):
    return jax.nn.elu(x @ w)


def softplus(w, x):
    return jax.nn.softplus(x @ w)


def softmax(w, x):
    return jax.nn.softmax(x @ w)


def exponential(w, x):
    return jnp.exp(x @ w)


def cosine(w, x):
    return jnp.cos(x @ w)


def x_times_x(w, x):
    h = x @ w
    return h * h


def squared(w, x):
    return jnp.square(x @ w)


def to_the_power_two(w, x):
    return (x @ w) ** 2


def to_the_power_one_half(w, x):
    return jnp.abs(x @ w) ** 0.5


def square_root(w, x):
    return jnp.sqrt(jnp.abs(x @ w))


def reciprocal(w, x):
    return 1.0 / (x @ w)


def abs_times_x(w, x):
    h = x @ w
    return jnp.abs(h) * h


def relu_times_x(w, x):
    h = x @ w
    return jax.nn.relu(h) * h


def gated_linear_unit(w, x):
    h = x @ w
    return h[:, :1] * h[:, 1:]


def root_of_square(w, x):
    return jnp.sqrt((x @ w) ** 2)


def l2_normalisation(w, x):
    h = x @ w
    return h / jnp.linalg.norm(h, axis=-1, keepdims=True)


def ratio_of_units(w, x):
    h = x @ w
    return h[:, :1] / h[:, 1:]


def product_of_units(w, x):
    return jnp.prod(x @ w, axis=-1)


def cumulative_product(w, x):
    return jnp.cumprod(x @ w, axis=-1)


def attention(w, x):
    h = (x @ w)[:, :, None]
    return jax.nn.softmax(h @ jnp.swapaxes(h, 1, 2)) @ h


def linear_attention(w, x):
    h = (x @ w)[:, :, None]
    return h @ jnp.swapaxes(h, 1, 2)


def data_dependent_convolution(w, x):
    h = (x @ w)[:, :, None]
    layout = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(h, h[0, :, :, None], (1,), "VALID", dimension_numbers=layout)


def training_batch_norm(w, x):
    norm = nn.BatchNorm(use_running_average=False)
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    variables = {"params": {"scale": w[0], "bias": w[1]}, "batch_stats": stats}
    return norm.apply(variables, x @ w, mutable=["batch_stats"])[0]


def layer_norm(w, x):
    return nn.LayerNorm().apply({"params": {"scale": w[0], "bias": w[1]}}, x @ w)


def threshold(w, x):
    h = x @ w
    return jnp.where(h > 1, h, 0)


def gate_of_another_unit(w, x):
    h = x @ w
    return jnp.where(h[:, :1] > 0, h[:, 1:], 0.0)


def gate_between_two_units(w, x):
    h = x @ w
    return jnp.where(h[:, 0] > 0, h[:, 1], h[:, 2])


def comparison_of_two_units(w, x):
    h = x @ w
    return jnp.where(h[:, 0] > h[:, 1], h[:, 0], 0.0)


def gate_with_a_constant_branch(w, x):
    h = x @ w
    return jnp.where(h > 0, h, 1.0)


def gate_with_an_affine_branch(w, x):
    h = x @ w
    return jnp.where(h > 0, h, 0.1 * h - 1.0)


def gate_moved_by_one(w, x):
    h = x @ w
    return jnp.where(jnp.roll(h, 1, axis=1) > 0, h, 0.0)


def sign_alone(w, x):
    return jnp.sign(x @ w)


def step(w, x):
    return jnp.where(x @ w > 0, 1.0, 0.0)


def indicator(w, x):
    return (x @ w > 0).astype(jnp.float32)


def rounding(w, x):
    return jnp.round(x @ w)


def truncation(w, x):
    return (x @ w).astype(jnp.int32).astype(jnp.float32)


def argmax(w, x):
    return jnp.argmax(x @ w, axis=-1).astype(jnp.float32)


def data_dependent_index(w, x):
    h = x @ w
    return jnp.take_along_axis(h, jnp.argmax(h, axis=1, keepdims=True), axis=1)


def data_dependent_order(w, x):
    h = x @ w
    return lax.sort([h[:, 0], h[:, 1]], num_keys=1)[1]


def branch_on_data(w, x):
    h = x @ w
    return lax.cond(h[0, 0] > 0, lambda h: h, lambda h: 2.0 * h, h)


def loop_until_data(w, x):
    return lax.while_loop(lambda h: h[0, 0] > 0, lambda h: h - 1.0, x @ w)


def tangent_of_a_network(w, x):
    return jax.jvp(lambda x: jax.nn.relu(x @ w), (x,), (jnp.ones_like(x),))[1]


def infinite_constant(w, x):
    return x @ w + jnp.inf


REFUSED = {
    # function: the primitives that may be named, whichever of them is met first
    relu6: "min",
    minimum_with_a_constant: "min",
    maximum_with_a_constant: "max",
    maximum_with_a_negative_constant: "max",
    clip: "max|min|clamp",
    clamp: "clamp",
    tanh: "tanh",
    sigmoid: "logistic",
    gelu: "integer_pow",
    exact_gelu: "erfc?|mul",
    silu: "logistic|mul",
    elu: "expm1|select_n",
    softplus: "logaddexp|max|exp|log1p",
    softmax: "exp|sub|max",
    exponential: "exp",
    cosine: "cos",
    x_times_x: "mul",
    squared: "square",
    to_the_power_two: "integer_pow|square",
    to_the_power_one_half: "pow|sqrt",
    square_root: "sqrt",
    reciprocal: "div|integer_pow",
    abs_times_x: "mul",
    relu_times_x: "mul",
    gated_linear_unit: "mul",
    root_of_square: "integer_pow|square",
    l2_normalisation: "square|mul|integer_pow|dot_general",
    ratio_of_units: "div",
    product_of_units: "reduce_prod",
    cumulative_product: "cumprod",
    attention: "dot_general",
    linear_attention: "dot_general",
    data_dependent_convolution: "conv_general_dilated",
    training_batch_norm: "square|mul|integer_pow",
    layer_norm: "square|mul|integer_pow",
    threshold: "gt",
    gate_of_another_unit: "select_n",
    gate_between_two_units: "select_n",
    comparison_of_two_units: "gt",
    gate_with_a_constant_branch: "select_n",
    gate_with_an_affine_branch: "select_n",
    gate_moved_by_one: "select_n",
    sign_alone: "sign|copy|output|return",
    step: "select_n|output|return",
    indicator: "convert_element_type|output|return",
    rounding: "round",
    truncation: "convert_element_type",
    argmax: "argmax",
    data_dependent_index: "argmax|gather",
    data_dependent_order: "sort",
    branch_on_data: "cond",
    loop_until_data: "while",
    tangent_of_a_network: "select_n|mul",
    infinite_constant: "add",
}


def assert_says_what_where_why_and_what_to_do(error, fn, primitives):
    text = str(error)
    named = re.search(r"what:\s+(\w+)", text)
    assert named and re.fullmatch(primitives, named[1]), text
    where = re.findall(r"test_refusals\.py:(\d+)", text)
    lines, first = inspect.getsourcelines(fn)
    assert where and all(first <= int(n) < first + len(lines) for n in where), (first, text)
    assert re.search(r"why:\s+\S.{20}", text), text
    assert re.search(r"do:\s+\S.{10}", text), text


@pytest.mark.parametrize(
    ("fn", "primitives"), REFUSED.items(), ids=lambda a: getattr(a, "__name__", "")
)
def test_operations_without_path_semantics_are_refused_by_name(fn, primitives):
    with pytest.raises(UnsupportedOperation) as caught:
        path_norm(fn, W, X)
    assert_says_what_where_why_and_what_to_do(caught.value, fn, primitives)
    assert isinstance(caught.value, JaxinvError) and isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_function_refuses_also_under_jit(function):
    with pytest.raises(UnsupportedOperation, match="tanh"):
        function(tanh, W, X)
    with pytest.raises(UnsupportedOperation, match="tanh"):
        jax.jit(lambda w: function(tanh, w, X))(W)


WRAPPERS = {
    "jit": jax.jit,
    "remat": lambda f: jax.checkpoint(f),
    "scan": lambda f: lambda w, x: lax.scan(lambda h, _: (f(w, x), None), f(w, x), None, 2)[0],
    "vmap": lambda f: lambda w, x: jax.vmap(lambda r: f(w, r[None])[0])(x),
    "cond": lambda f: lambda w, x: lax.cond(True, f, f, w, x),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_no_wrapper_hides_an_operation(wrap):
    with pytest.raises(UnsupportedOperation) as caught:
        path_norm(wrap(relu6), W, X)
    assert_says_what_where_why_and_what_to_do(caught.value, relu6, "min")


def test_the_line_of_the_caller_is_shown_where_a_library_wrote_the_operation():
    with pytest.raises(UnsupportedOperation, match=r"normalization\.py:\d+.*test_refusals\.py:\d+"):
        path_norm(layer_norm, W, X)


def test_a_saturated_path_of_a_hundred_weights_is_not_counted():
    """Peers accept relu6 and report a path of length 6, or 100, for a function bounded by 6."""
    with pytest.raises(UnsupportedOperation, match="relu6"):
        path_norm(lambda w, x: jax.nn.relu6(x * w), np.full((1, 1), 100.0, np.float32), X[:, :1])


def test_indices_computed_from_activations_are_refused():
    def route(w, x):
        return w[jnp.argmax(x @ w, axis=-1)]

    with pytest.raises(JaxinvError, match="argmax") as caught:
        path_norm(route, W, X)
    assert "test_refusals.py" in str(caught.value)


# --- parameters that are no edges ----------------------------------------------------------------


def weight_norm(w, x):
    v = w["v"] / jnp.linalg.norm(w["v"], axis=0)
    return x @ (v * w["g"])


def batch_norm_with_variance_in_params(w, x):
    return x @ w["v"] * (lax.rsqrt(w["variance"]) * w["g"])


def divided_by_a_parameter(w, x):
    return x @ w["v"] / w["g"]


def exponential_parametrisation(w, x):
    return x @ w["v"] * jnp.exp(w["g"])


NOT_EDGES = {
    weight_norm: "v",
    batch_norm_with_variance_in_params: "variance",
    divided_by_a_parameter: "g",
    exponential_parametrisation: "g",
}
PARAMS = {"v": W, "g": np.full(3, 2.0, np.float32), "variance": np.full(3, 4.0, np.float32)}


@pytest.mark.parametrize(("fn", "leaf"), NOT_EDGES.items())
def test_kappa_refuses_parameters_that_are_no_edges_and_names_them(fn, leaf):
    for function in (path_kappa, log_path_kappa):
        with pytest.raises(UnsupportedOperation, match="nonlinear") as caught:
            function(fn, PARAMS, X)
        assert f"params/{leaf}" in str(caught.value)
        assert_says_what_where_why_and_what_to_do(caught.value, fn, "mul|div|dot_general")


def test_the_norm_is_defined_where_kappa_is_not():
    """The edge's weight is its effective value, whatever it was computed from."""
    norms = {
        weight_norm: 2 * np.sqrt(3),  # Columns of norm one, times two.
        batch_norm_with_variance_in_params: np.linalg.norm(W),
        divided_by_a_parameter: np.linalg.norm(W) / 2,
        exponential_parametrisation: np.linalg.norm(W) * np.exp(2),
    }
    for fn, norm in norms.items():
        np.testing.assert_allclose(path_norm(fn, PARAMS, X), norm, rtol=1e-6)


@pytest.mark.parametrize("function", [jax.nn.softmax, jax.nn.log_softmax])
def test_softmax_at_the_end_is_named_and_the_logits_are_asked_for(function):
    with pytest.raises(UnsupportedOperation, match=r"softmax`(?s:.*)return the logits"):
        path_norm(lambda w, x: function(x @ w), W, X)


def test_the_layer_that_an_operation_is_part_of_is_named():
    with pytest.raises(UnsupportedOperation, match="`square`, part of `LayerNorm`, of two values"):
        path_norm(nn.LayerNorm().apply, {"params": {"scale": X[0], "bias": X[0]}}, X)
    with pytest.raises(UnsupportedOperation, match="`min`, part of `relu6`, with a value"):
        path_norm(relu6, W, X)
