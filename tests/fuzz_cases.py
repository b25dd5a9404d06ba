"""Cases of the fuzz test: a call with a hostile argument, and what may come of it.

A case is right if the call raises a `JaxinvError` that says something, or returns what an oracle in
float64 NumPy, written without jaxinv, says. Functions without an oracle here may return anything
for arguments that are no trouble, but must refuse those that are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxinv
from jaxinv import invariance, reparam
from jaxinv.jacobians import fisher_information as fisher

SHAPES = [(2, 3, 1), (1, 1, 1), (3, 2, 2)]
EXPONENTS = (1.0, 2.0, 3.5)


def net(w, x):
    return jnp.maximum(x @ w["a"] + w["c"], 0) @ w["b"]


def loss_of(x):
    return lambda w: jnp.mean(net(w, x.astype(w["a"].dtype)) ** 2)


def draw(rng, shape, dtype=np.float32, decades=0.0):
    """Weights whose layers, units and elements are apart by up to so many decades."""

    def one(*size):
        layer = 10 ** rng.uniform(-decades, decades)
        values = rng.normal(size=size) * layer
        values[rng.random(size) < 0.1] = 0
        return values.astype(dtype)

    n, h, m = shape
    w = {"a": one(n, h), "b": one(h, m), "c": one(h)}
    return w, rng.normal(size=(3, n)).astype(dtype)


def flushed(w):
    """In float64, with what float32 holds as subnormal numbers taken for 0, as XLA does."""
    tiny = float(np.finfo(np.float32).tiny)
    wide = {k: np.asarray(v).astype(np.float64) for k, v in w.items()}
    return {k: np.where(np.abs(v) < tiny, 0, v) for k, v in wide.items()}


# --- oracles, in float64 NumPy ----------------------------------------------------------


def true_power(w, p):
    """γ_p^p, path by path; longdouble has the range of 10^±4932."""
    a, b, c = (np.abs(flushed(w)[k]).astype(np.longdouble) ** p for k in "abc")
    return ((a.sum(0) + c)[:, None] * b).sum()


def true_kappa(w, p):
    a, b, c = (np.abs(flushed(w)[k]).astype(np.longdouble) ** p for k in "abc")
    out = b.sum(1)
    into = a.sum(0) + c
    return {
        "a": np.broadcast_to(out, a.shape),
        "b": np.broadcast_to(into[:, None], b.shape),
        "c": out,
    }


def true_jacobian(w, x):
    """Rows by example and output; columns a, b, c."""
    w, x = flushed(w), np.asarray(x, np.float64)
    z = x @ w["a"] + w["c"]
    h, on = np.maximum(z, 0), (z > 0).astype(float)
    rows = []
    for i in range(len(x)):
        for o in range(w["b"].shape[1]):
            slope = on[i] * w["b"][:, o]
            by_b = np.zeros_like(w["b"])
            by_b[:, o] = h[i]
            rows.append(np.concatenate([np.outer(x[i], slope).ravel(), by_b.ravel(), slope]))
    return np.array(rows)


def true_unit(w):
    """Every unit's incoming weights over their norm, and the norms."""
    w = {k: v.astype(np.longdouble) for k, v in flushed(w).items()}
    norm = np.sqrt((w["a"] ** 2).sum(0) + w["c"] ** 2)
    safe = np.where(norm > 0, norm, 1)
    return norm, {"a": w["a"] / safe, "b": w["b"] * safe[:, None], "c": w["c"] / safe}


def true_balance(w):
    """Σ w² at the minimum of s²·in + out/s² for each unit."""
    w = {k: v.astype(np.longdouble) for k, v in flushed(w).items()}
    into, out = (w["a"] ** 2).sum(0) + w["c"] ** 2, (w["b"] ** 2).sum(1)
    return np.where((into > 0) & (out > 0), 2 * np.sqrt(into * out), into + out).sum()


def agree(found, expected, rtol, size=None, why=""):
    """Within rtol, inf where the dtype has no such number, 0 where it is below its range."""
    found = np.asarray(found)
    info = jnp.finfo(found.dtype)
    most, least = float(info.max), float(info.tiny)
    found = np.asarray(found, np.longdouble)
    expected = np.broadcast_to(np.asarray(expected, np.longdouble), found.shape)
    size = np.abs(expected) if size is None else np.asarray(size, np.longdouble)
    over = np.abs(expected) >= most * (1 - rtol)
    close = np.abs(found - expected) <= rtol * size + 4 * least
    with np.errstate(invalid="ignore"):
        close |= over & np.isinf(found) & (np.sign(found) == np.sign(expected))
    assert close.all(), f"{why}: found {found}, expected {expected}"


def tolerance(dtype, good=1e-4):
    return max(good, 16 * float(jnp.finfo(dtype).eps)) if dtype != np.float64 else good


# --- right values ---------------------------------------------------------------------


def value_cases(rng, count):
    """(name, thunk) of random weights, from ordinary to the ends of the range of floats."""
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    decades = float(rng.choice([0, 3, 12]))
    dtype = [np.float32, np.float16, jnp.bfloat16, np.float64][int(rng.integers(4))]
    if dtype == np.float16:
        decades = min(decades, 1)
    w, x = draw(rng, shape, np.float32 if dtype == np.float64 else dtype, decades)
    p = EXPONENTS[int(rng.integers(len(EXPONENTS)))]
    rtol = 1e-4
    gamma = true_power(w, p)
    kappa = true_kappa(w, p)
    before = {k: v.copy() for k, v in w.items()}

    def norms():
        agree(COMPILED["norm", p](w, x), gamma ** (1 / np.longdouble(p)), rtol, why="path_norm")
        found = float(COMPILED["log_norm", p](w, x))
        if gamma > 0:
            assert abs(found - float(np.log(gamma) / p)) < 1e-4 * max(1, abs(found)), found
        else:
            assert found == -np.inf, found

    def kappas():
        found = COMPILED["kappa", p](w, x)
        for k in found:
            # Documented: NaN next to a sum 2^127 times larger, 0 below 10^-49 of γ^p.
            share = kappa[k] * np.abs(flushed(w)[k]) ** p
            lost = np.isnan(np.asarray(found[k])) | (share < 1e-49 * gamma)
            agree(np.where(lost, 0, found[k]), np.where(lost, 0, kappa[k]), rtol, why="κ")

    def jacobians():
        J = true_jacobian(w, x)
        coarse = tolerance(w["a"].dtype) * 8
        found = COMPILED["jacobian"](w, x)
        z = np.asarray(x, np.float64) @ flushed(w)["a"] + flushed(w)["c"]
        terms = np.abs(np.asarray(x, np.float64)) @ np.abs(flushed(w)["a"])
        if (np.abs(z) <= 100 * coarse * (terms + np.abs(flushed(w)["c"]))).any():
            return  # a gate within rounding: either side is right
        size = np.maximum(np.abs(J), np.abs(J).max(axis=1, keepdims=True) * 0 + 1e-30)
        top = np.concatenate([np.abs(J).max(axis=0, keepdims=True)] * len(J))
        agree(found, J, coarse * 10, np.maximum(size, top), why="jacobian")

    def gauges():
        group = group_of(shape)
        norm, unit = true_unit(w)
        near = tolerance(w["a"].dtype, 1e-3)
        agree(reparam.incoming_norms(group, w), norm, near, why="incoming_norms")
        found = jaxinv.normalize(group, w)
        for k in unit:
            agree(found.params[k], unit[k], near, why=f"normalize {k}")
        agree(jaxinv.balance(group, w).value, true_balance(w), near, why="balance")
        normal = jaxinv.weight_normalize(net, group).to_params(w)
        agree(normal["a"], unit["a"], near, why="weight_normalize")

    def steps():
        tx = TRANSFORMS[shape]
        g = {k: np.ones_like(v) for k, v in w.items()}
        found, _ = tx(g, w)
        two = true_kappa(w, 2.0)
        for k in g:
            values = np.asarray(found[k], np.float64)
            lost = np.isnan(values)
            lost |= two[k] * flushed(w)[k] ** 2 < 1e-49 * true_power(w, 2.0)
            right = np.where(two[k] > 0, 1 / np.where(two[k] > 0, two[k], 1), 0)
            vanished = (two[k] > 0) & (two[k] < 1e-37 * np.max(two[k])) & (values == 0)
            skip = lost | vanished
            kept = np.where(skip, 0, found[k]).astype(found[k].dtype)
            agree(kept, np.where(skip, 0, right), tolerance(w["a"].dtype), why="Path-SGD")

    def untouched():
        for k in w:
            assert (w[k] == before[k]).all(), "an argument was changed"

    choices = [("norm", norms), ("kappa", kappas), ("jacobian", jacobians), ("gauges", gauges)]
    choices += [("steps", steps)]
    for name, check in choices[:count]:
        yield f"{name} {shape} {np.dtype(dtype)} 10^±{decades:g} p={p}", check
    yield "arguments unchanged", untouched


_GROUPS: dict = {}


def group_of(shape):
    if shape not in _GROUPS:
        w, x = draw(np.random.default_rng(0), shape)
        _GROUPS[shape] = jaxinv.rescaling_group(net, w, x)
    return _GROUPS[shape]


def _compiled():
    table = {("jacobian"): jax.jit(lambda w, x: jaxinv.jacobian(net, w, x))}
    for p in EXPONENTS:
        table["norm", p] = jax.jit(lambda w, x, p=p: jaxinv.path_norm(net, w, x, p=p))
        table["log_norm", p] = jax.jit(lambda w, x, p=p: jaxinv.log_path_norm(net, w, x, p=p))
        table["kappa", p] = jax.jit(lambda w, x, p=p: jaxinv.path_kappa(net, w, x, p=p))
    return table


COMPILED = _compiled()


def _step(shape):
    x = np.zeros((1, shape[0]), np.float32)

    @jax.jit
    def step(g, w):
        x_ = x.astype(w["a"].dtype)
        tx = jaxinv.scale_by_path_kappa(net, x_)
        return tx.update(g, tx.init(w), w)

    return step


TRANSFORMS = {shape: _step(shape) for shape in SHAPES}

# --- refusals -------------------------------------------------------------------------


def bad_params(rng, w):
    """(what is wrong, params): none of these can be computed with."""
    k = ["a", "b", "c"][int(rng.integers(3))]
    spoilt = w[k].copy()
    spoilt.flat[int(rng.integers(spoilt.size))] = rng.choice([np.nan, np.inf, -np.inf])
    gone = jnp.array(w[k])
    gone.delete()
    odd = [np.int32, np.int8, np.uint8, bool, np.complex64, object, np.longdouble, ">f4", "U4"]
    dtype = odd[int(rng.integers(len(odd)))]
    other = np.ones((7, *w[k].shape[1:]), np.float32)
    yield "not finite", {**w, k: spoilt}
    yield f"dtype {dtype}", {**w, k: w[k].astype(dtype)}
    yield "deleted", {**w, k: gone}
    yield "masked", {**w, k: np.ma.masked_array(w[k])}
    yield "list", {**w, k: w[k].tolist()}
    yield "string", {**w, k: "weights"}
    yield "missing", {i: v for i, v in w.items() if i != k}
    yield "None", {**w, k: None}
    yield "shape", {**w, k: other}
    yield "empty", {}
    yield "no tree", object()
    yield "key", {**w, k: jax.random.key(0)}


def bad_inputs(rng, x):
    gone = jnp.array(x)
    gone.delete()
    yield "scalar", np.float32(1)
    yield "no batch", x[:0]
    yield "no features", x[:, :0]
    yield "complex", x.astype(np.complex64)
    yield "object", x.astype(object)
    yield "longdouble", x.astype(np.longdouble)
    yield "string", "digits"
    yield "None", None
    yield "wide", np.ones((2, x.shape[1] + 1 + int(rng.integers(5))), np.float32)
    yield "object()", object()


def needs_values(rng, x):
    """Inputs that only functions of shapes accept."""
    gone = jnp.array(x)
    gone.delete()
    spoilt = x.copy()
    spoilt.flat[int(rng.integers(x.size))] = rng.choice([np.nan, np.inf])
    yield "not finite", spoilt
    yield "deleted", gone
    yield "shape", jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _updated(tx, w, **extra):
    return tx.update(w, tx.init(w), w, **extra)


OF_SHAPES = {
    "path_norm": lambda w, x: jaxinv.path_norm(net, w, x),
    "log_path_norm": lambda w, x: jaxinv.log_path_norm(net, w, x),
    "path_kappa": lambda w, x: jaxinv.path_kappa(net, w, x),
    "log_path_kappa": lambda w, x: jaxinv.log_path_kappa(net, w, x),
    "unit_path_norms": lambda w, x: jaxinv.unit_path_norms(net, w, x),
    "rescaling_group": lambda w, x: jaxinv.rescaling_group(net, w, x),
    "path_sgd": lambda w, x: _updated(jaxinv.path_sgd(0.1, net, x), w),
    "path_metric_sgd": lambda w, x: _updated(jaxinv.path_metric_sgd(0.1, net, x), w),
    "path_metric_product": lambda w, x: jaxinv.path_metric_product(net, w, x, w),
}
OF_VALUES = {
    "jacobian": lambda w, x: jaxinv.jacobian(net, w, x),
    "jacobian fwd": lambda w, x: jaxinv.jacobian(net, w, x, mode="fwd"),
    "jacobian_gram": lambda w, x: jaxinv.jacobian_gram(net, w, x),
    "tangent_kernel": lambda w, x: jaxinv.tangent_kernel(net, w, x),
    "jacobian_operator": lambda w, x: jaxinv.jacobian_operator(net, w, x),
    "jacobian_rank": lambda w, x: jaxinv.jacobian_rank(net, w, x),
    "jacobian_spectrum": lambda w, x: jaxinv.jacobian_spectrum(net, w, x),
    "degrees_of_freedom": lambda w, x: jaxinv.degrees_of_freedom(net, w, x),
    "fisher": lambda w, x: fisher.fisher(net, w, x, "gaussian"),
    "natural_gradient": lambda w, x: _updated(
        jaxinv.natural_gradient(0.1, net, "gaussian"), w, batch=x
    ),
    "data_dependent_path_norm": lambda w, x: jaxinv.data_dependent_path_norm(net, w, x, alpha=0.5),
    "data_dependent_path_kappa": lambda w, x: jaxinv.data_dependent_path_kappa(
        net, w, x, alpha=0.5
    ),
    "data_dependent_path_sgd": lambda w, x: _updated(
        jaxinv.data_dependent_path_sgd(0.1, net, alpha=0.5), w, batch=x
    ),
    "data_dependent_normalize": lambda w, x: jaxinv.data_dependent_normalize(net, alpha=0.5).fn(
        w, x
    ),
    "batch_norm_as_reparam": lambda w, x: jaxinv.batch_norm_as_reparam(net).statistics(w, x),
}


def of_group(group, x):
    u = np.ones(group.dim, np.float32)
    loss = loss_of(x)
    key = jax.random.key(0)
    return {
        "normalize": lambda w: jaxinv.normalize(group, w),
        "balance": lambda w: jaxinv.balance(group, w),
        "path_condition": lambda w: jaxinv.path_condition(group, w, w),
        "distance": lambda w: jaxinv.distance_mod_rescaling(group, w, w),
        "gradient_orthogonality": lambda w: jaxinv.gradient_orthogonality(loss, w, group),
        "equivariance_error": lambda w: jaxinv.equivariance_error(
            optax.sgd(0.1), loss, w, invariance.by_rescaling(group, u), 1
        ),
        "local_learning_coefficient": lambda w: jaxinv.local_learning_coefficient(
            loss, w, 100, key, num_chains=1, num_steps=1, num_warmup=0
        ),
    }


def of_group_any_value(group, x):
    """A NaN passes through these, as through any step of training; nothing else does."""
    u = np.ones(group.dim, np.float32)
    return {
        "rescale": lambda w: jaxinv.rescale(group, w, u),
        "rescale_gradient": lambda w: jaxinv.rescale_gradient(group, w, u),
        "tangent_vectors": lambda w: jaxinv.tangent_vectors(group, w, dense=True),
        "weight_normalize": lambda w: jaxinv.weight_normalize(net, group).fn(w, x),
        "tangent_gradient": lambda w: _updated(reparam.tangent_gradient(group), w),
        "incoming_norms": lambda w: reparam.incoming_norms(group, w),
    }


def bad_options(rng, w, x):
    """Options out of range or of a wrong kind."""
    wrong = [np.nan, np.inf, -1, "two", None, 1j, [1, 2], object(), -0.5]
    value = wrong[int(rng.integers(len(wrong)))]
    group = group_of((x.shape[1], w["a"].shape[1], w["b"].shape[1]))
    key, loss = jax.random.key(0), loss_of(x)
    yield f"p={value!r}", lambda: jaxinv.path_norm(net, w, x, p=value)
    yield f"alpha={value!r}", lambda: jaxinv.data_dependent_path_norm(net, w, x, alpha=value)
    yield f"norm={value!r}", lambda: jaxinv.balance(group, w, norm=value)
    yield f"chunk={value!r}", lambda: jaxinv.jacobian(net, w, x, chunk=value)
    yield f"mode={value!r}", lambda: jaxinv.jacobian(net, w, x, mode=value)
    yield f"method={value!r}", lambda: jaxinv.jacobian_rank(net, w, x, method=value)
    yield f"every={value!r}", lambda: jaxinv.scale_by_path_kappa(net, x, every=value)
    yield (
        f"zero_kappa={value!r}",
        lambda: jaxinv.scale_by_path_kappa(net, x, zero_kappa=value),
    )
    if value is not None:
        yield (
            f"key={value!r}",
            lambda: jaxinv.data_dependent_path_sgd(0.1, net, alpha=0.5, key=value),
        )
    yield f"likelihood={value!r}", lambda: fisher.fisher(net, w, x, value)
    yield (
        f"solver={value!r}",
        lambda: jaxinv.scale_by_natural_gradient(net, "gaussian", solver=value),
    )
    yield f"damping={value!r}", lambda: jaxinv.path_metric_sgd(0.1, net, x, damping=value)
    yield f"kind={value!r}", lambda: jaxinv.random_rescaling(group, key, kind=value)
    yield f"std={value!r}", lambda: jaxinv.random_rescaling(group, key, std=value)
    yield f"u={value!r}", lambda: jaxinv.rescale(group, w, np.ones(group.dim + 1, np.float32))
    yield f"eps={value!r}", lambda: jaxinv.batch_norm_as_reparam(net, eps=value)
    yield (
        f"steps={value!r}",
        lambda: jaxinv.equivariance_error(optax.sgd(0.1), loss, w, lambda w: w, value),
    )
    yield (
        f"num_examples={value!r}",
        lambda: jaxinv.local_learning_coefficient(loss, w, value, key),
    )
    yield (
        f"num_chains={value!r}",
        lambda: jaxinv.local_learning_coefficient(loss, w, 10, key, num_chains=value),
    )
    yield (
        f"sampler={value!r}",
        lambda: jaxinv.local_learning_coefficient(loss, w, 10, key, sampler=value),
    )


def refusals(rng):
    """(name, thunk) of calls that must raise a `JaxinvError`."""
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    w, x = draw(rng, shape)
    group = group_of(shape)
    functions = {**OF_SHAPES, **OF_VALUES}
    for wrong, params in bad_params(rng, w):
        for name, function in functions.items():
            if (name, wrong) == ("rescaling_group", "deleted"):
                continue  # Shapes are enough for it.
            yield f"{name}: params {wrong}", lambda f=function, q=params: f(q, x)
        for name, function in of_group(group, x).items():
            yield f"{name}: params {wrong}", lambda f=function, q=params: f(q)
        if wrong != "not finite":
            for name, function in of_group_any_value(group, x).items():
                yield f"{name}: params {wrong}", lambda f=function, q=params: f(q)
    for wrong, inputs in bad_inputs(rng, x):
        for name, function in functions.items():
            yield f"{name}: x {wrong}", lambda f=function, q=inputs: f(w, q)
    for wrong, inputs in needs_values(rng, x):
        for name, function in OF_VALUES.items():
            yield f"{name}: x {wrong}", lambda f=function, q=inputs: f(w, q)
    yield from bad_options(rng, w, x)
    for name, tx in {
        "path_sgd": jaxinv.path_sgd(0.1, net, x),
        "natural_gradient": jaxinv.natural_gradient(0.1, net, "gaussian"),
        "path_metric_sgd": jaxinv.path_metric_sgd(0.1, net, x),
    }.items():
        state = tx.init(w)
        yield f"{name}: no params", lambda tx=tx, s=state: tx.update(w, s, batch=x)
        for wrong, g in bad_params(rng, w):
            if wrong != "not finite":
                yield (
                    f"{name}: gradient {wrong}",
                    lambda tx=tx, s=state, g=g: tx.update(g, s, w, batch=x),
                )
