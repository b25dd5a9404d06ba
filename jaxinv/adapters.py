"""From a model of flax, equinox, haiku or keras to the `(fn, params)` that jaxinv takes.

Every adapter gives the model in evaluation mode: batch statistics are the stored ones, dropout is
off, no random numbers are drawn. Whatever is not a parameter is closed over. Nothing is trained or
changed in the model itself. What a model returns, `fn` returns; a model with several inputs takes
them as one pytree, by way of a function or method that unpacks them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv.errors import InvalidInput
from jaxinv.typing import ArrayLike, Constant, Inputs, Network, Params, PyTree

# Arguments, attributes and fields that tell a model its mode, and the value for evaluation.
_MODES = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
    "inference": True,
}


def _evaluating(call: Callable[..., object], given: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a call that put it in evaluation mode, and those given, which win."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(call).parameters.values()
    modes = {p.name: _MODES[p.name] for p in parameters if p.kind in named and p.name in _MODES}
    return {**modes, **given}


def _not_in_evaluation() -> InvalidInput:
    return InvalidInput(
        "the model draws random numbers or changes its state, so it is not in evaluation mode. Let "
        "the model take its mode as an argument, and give that to the adapter: train=False."
    )


def _changed(before: list[Constant], after: list[Constant]) -> bool:
    """Whether arrays of a state are others than before: what is only read stays the same object."""
    return len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True))


def _differ(before: list[Constant], after: list[Constant]) -> bool:
    return not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def _zeros(leaf: ArrayLike) -> jax.Array:
    return jnp.zeros(jnp.shape(leaf), jnp.result_type(leaf))


# --- flax -----------------------------------------------------------------------------


def from_linen(
    module: Any, variables: Mapping[str, PyTree], *, method: Any = None, **options: object
) -> tuple[Network, Params]:
    """A flax linen module as `fn(params, x)`, and its parameters.

    Args:
        module: a `flax.linen.Module`.
        variables: what `module.init` returned, or training left: a collection "params", and others
            such as "batch_stats", which are closed over.
        method: a method of the module, or its name, or a function of the module and x; as in
            `module.apply`. Default `__call__`.
        options: arguments for every call. Those called `train`, `training`, `is_training`,
            `deterministic`, `use_running_average` or `inference` are set to evaluation mode where
            they are not given.

    Returns:
        `(fn, params)` with params = variables["params"], and fn(params, x) what the module returns.

    Raises:
        InvalidInput: if variables has no "params"; and, when fn is called, if the module wants
            random numbers or changes its state all the same.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxinv import rescaling_group
        >>> from jaxinv.adapters import from_linen
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        ...         return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))
        >>> x = jnp.ones((8, 2))
        >>> variables = Net().init(jax.random.key(0), x, train=False)
        >>> fn, params = from_linen(Net(), variables)
        >>> rescaling_group(fn, params, x).dim
        3
    """
    from flax import errors

    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise InvalidInput(
            f'variables must have the collection "params", as module.init returns them; they have '
            f'{found}. If these are the parameters alone, pass {{"params": params}}.'
        )
    state = {name: tree for name, tree in variables.items() if name != "params"}
    wrong = {
        n: v for n, v in _MODES.items() if n not in options and getattr(module, n, None) is (not v)
    }
    module = module.clone(**wrong) if wrong else module
    call = getattr(type(module), method) if isinstance(method, str) else method
    options = _evaluating(call or type(module).__call__, options)
    # flax takes a mode as a field or as an argument of the call, not as both.
    options = {
        n: v for n, v in options.items() if not (n in _MODES and getattr(module, n, None) is v)
    }

    def fn(params: Params, x: Inputs) -> PyTree:
        try:
            return module.apply({"params": params, **state}, x, method=method, **options)
        except (errors.InvalidRngError, errors.ModifyScopeVariableError) as error:
            raise _not_in_evaluation() from error

    return fn, variables["params"]


def from_nnx(model: Any, *, wrt: Any = None, **options: object) -> tuple[Network, Params]:
    """A flax nnx module as `fn(params, x)`, and its parameters.

    The model is split into its parameters and the rest; a copy of it is put in evaluation mode, so
    the model stays as it is. `flax.nnx.update(model, params)` puts parameters back.

    Args:
        model: a `flax.nnx.Module`.
        wrt: a filter of nnx that says which variables are parameters. Default `nnx.Param`.
        options: arguments for every call; those that name a mode are set as in `from_linen`.

    Returns:
        `(fn, params)` with params an `nnx.State`, and fn(params, x) what the model returns.

    Raises:
        InvalidInput: if the model has no such variables; and, when fn is called, if the model
            draws random numbers or changes batch statistics all the same.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> from jaxinv import path_norm
        >>> from jaxinv.adapters import from_nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(
        ...     nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs), nnx.relu,
        ...     nnx.Dropout(0.5, rngs=rngs), nnx.Linear(3, 1, rngs=rngs))
        >>> fn, params = from_nnx(model)
        >>> fn(params, jnp.ones((8, 2))).shape, bool(path_norm(fn, params, jnp.ones((8, 2))) > 0)
        ((8, 1), True)
    """
    from flax import nnx

    copy = nnx.clone(model)
    for _, module in nnx.iter_modules(copy):
        for name, value in _MODES.items():
            if isinstance(vars(module).get(name), bool):
                setattr(module, name, value)
    graph, params, *rest = nnx.split(copy, nnx.Param if wrt is None else wrt, ...)
    if not jax.tree.leaves(params):
        raise InvalidInput(
            "the model has no variables of the kind wrt, so there are no parameters."
        )
    options = _evaluating(type(model).__call__, options)
    fixed = nnx.Any(nnx.RngCount, nnx.BatchStat)
    before = jax.tree.leaves([nnx.filter_state(state, fixed) for state in rest])

    def state_after(params: Params, x: Inputs) -> list[Constant]:
        """Of one call on zeros, computed now, also inside of a trace."""
        with jax.ensure_compile_time_eval():
            weights, inputs = jax.tree.map(_zeros, (params, x))
            merged = nnx.merge(graph, weights, *rest, copy=True)
            merged(inputs, **options)
            return jax.tree.leaves(nnx.state(merged, fixed))

    def fn(params: Params, x: Inputs) -> PyTree:
        merged = nnx.merge(graph, params, *rest, copy=True)  # so that state stays what it is
        y = merged(x, **options)
        after = jax.tree.leaves(nnx.state(merged, fixed))
        # Behind nnx.jit a state that was only read is another object: then values must tell.
        if _changed(before, after) and _differ(before, state_after(params, x)):
            raise _not_in_evaluation()
        return y

    return fn, params


# --- equinox, haiku, keras ------------------------------------------------------------


def from_equinox(
    model: Any, state: Any = None, *, batched: bool = True, **options: object
) -> tuple[Network, Params]:
    """An equinox model as `fn(params, x)`, and its parameters.

    Args:
        model: an `equinox.Module`; layers such as `equinox.nn.Linear` take one example.
        state: its `equinox.nn.State`, as `equinox.nn.make_with_state` gives it or training left
            it, for models called as `model(x, state)`, which return `(y, state)`.
        batched: make fn take a batch, by `jax.vmap` over axis 0 of x; False if the model takes a
            batch itself.
        options: arguments for every call. A required `key` is None where it is not given, and
            those that name a mode are set as in `from_linen`.

    Returns:
        `(fn, params)` with params the model with None for whatever is not a float array, and
        fn(params, x) what the model returns, without the state. `equinox.combine(params, model)`
        puts parameters back.

    Raises:
        InvalidInput: if the model has no float arrays.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from jaxinv.adapters import from_equinox
        >>> fn, params = from_equinox(eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0)))
        >>> fn(params, jnp.ones((8, 2))).shape
        (8, 1)
    """
    eqx = importlib.import_module("equinox")

    params, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_inexact_array)
    if not jax.tree.leaves(params):
        raise InvalidInput("the model has no arrays of floats, so there are no parameters.")
    parameters = inspect.signature(model).parameters
    # Layers have had their mode set; an argument by which they also take one may be deprecated.
    modes = {n: p.default for n, p in parameters.items() if p.default is None and n in _MODES}
    found = _evaluating(model, options)
    options = {n: v for n, v in found.items() if n in options or n not in modes}
    if "key" in parameters and parameters["key"].default is inspect.Parameter.empty:
        options.setdefault("key", None)

    def fn(params: Params, x: Inputs) -> PyTree:
        whole = eqx.combine(params, static)

        def one(x: Inputs) -> PyTree:
            return whole(x, **options) if state is None else whole(x, state, **options)[0]

        return jax.vmap(one)(x) if batched else one(x)

    return fn, params


def from_haiku(
    transformed: Any, params: Params, state: Any = None, *, rng: Any = None, **options: object
) -> tuple[Network, Params]:
    """A transformed haiku function as `fn(params, x)`, and its parameters.

    Args:
        transformed: what `haiku.transform` or `haiku.transform_with_state` returned, also through
            `haiku.without_apply_rng`.
        params: what its `init` returned, or training left.
        state: the state likewise, for `transform_with_state`.
        rng: a key for functions that cannot do without; the same at every call. Evaluation
            needs none.
        options: arguments for every call; those that name a mode are set as in `from_linen`.

    Returns:
        `(fn, params)`, fn(params, x) what the function returns, without the state.

    Raises:
        InvalidInput: if state is missing, or given to a function without; and, when fn is called,
            if the function changes its state all the same.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> from jaxinv.adapters import from_haiku
        >>> net = hk.transform(lambda x: hk.nets.MLP([3, 1])(x))
        >>> x = jnp.ones((8, 2))
        >>> fn, params = from_haiku(net, net.init(jax.random.key(0), x))
        >>> fn(params, x).shape
        (8, 1)
    """
    stateful = type(transformed).__name__ == "TransformedWithState"
    if stateful and state is None:
        raise InvalidInput(
            "the function was transformed with state: pass the state that init returned."
        )
    if state is not None and not stateful:
        raise InvalidInput(
            "state was passed, but the function was transformed without: leave state out."
        )
    leading: list[PyTree] = [state] if stateful else []
    # without_apply_rng leaves no argument for a key behind params and state.
    names = list(inspect.signature(transformed.apply).parameters)
    if names[1 + len(leading) :][:1] == ["rng"]:
        leading.append(rng)
    options = _evaluating(transformed.apply, options)
    before = jax.tree.leaves(state)

    def fn(params: Params, x: Inputs) -> PyTree:
        y = transformed.apply(params, *leading, x, **options)
        if not stateful:
            return y
        y, after = y
        if _changed(before, jax.tree.leaves(after)):
            raise _not_in_evaluation()
        return y

    return fn, params


def from_keras(model: Any, **options: object) -> tuple[Network, Params]:
    """A keras 3 model or layer as `fn(params, x)`, and its parameters.

    Args:
        model: a built `keras.Model` or `keras.layers.Layer`, with the jax backend.
        options: arguments for every call, besides `training=False`.

    Returns:
        `(fn, params)` with params a dict of the trainable variables by their paths, and fn(params,
        x) what the model returns. Variables that are not trainable are closed over.

    Raises:
        InvalidInput: if keras runs on another backend, or the model is not built.

    Example:
        >>> from jaxinv.adapters import from_keras
        >>> import keras  # doctest: +SKIP
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])  # doctest: +SKIP
        >>> fn, params = from_keras(model)  # doctest: +SKIP
        >>> list(params)  # doctest: +SKIP
        ['sequential/dense/kernel', 'sequential/dense/bias']
    """
    backend = importlib.import_module("keras").backend.backend()
    if backend != "jax":
        raise InvalidInput(
            f"keras runs on {backend}. Set KERAS_BACKEND=jax in the environment before keras is "
            "imported."
        )
    trainable = list(model.trainable_variables)
    if not model.built or not trainable:
        raise InvalidInput(
            "the model is not built, or has no trainable variables: call it once on an input."
        )
    names = [v.path for v in trainable]
    if len(set(names)) < len(names):
        names = [f"{i}/{name}" for i, name in enumerate(names)]
    state = [v.value for v in model.non_trainable_variables]

    def fn(params: Params, x: Inputs) -> PyTree:
        weights = [params[name] for name in names]
        y, _ = model.stateless_call(weights, state, x, training=False, **options)
        return y

    return fn, {name: v.value for name, v in zip(names, trainable, strict=True)}


__all__ = ["from_equinox", "from_haiku", "from_keras", "from_linen", "from_nnx"]
