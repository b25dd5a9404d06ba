"""What every public function checks of its arguments before it computes anything.

Every check is here once: what an array must be to be used at all, what parameters and inputs must
be, what an option must be, and what becomes of an exception that the user's function raises.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinv.errors import InvalidInput, JaxinvError
from jaxinv.typing import (
    Array,
    ArrayLike,
    Constant,
    DType,
    DTypeLike,
    Inputs,
    Likelihood,
    Params,
    PyTree,
    Solver,
)

_SHORT = reprlib.Repr()


def leaf_names(tree: PyTree, root: str) -> list[str]:
    """Readable names of the leaves of a pytree: `root/Dense_0/kernel`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = []
    # All leaves of flax nnx are the `value` of a variable, which says nothing.
    value = jax.tree_util.GetAttrKey("value")
    of_nnx = all(len(path) > 1 and path[-1] == value for path, _ in paths)
    for path, _ in paths:
        parts = []
        for entry in path[:-1] if of_nnx else path:
            part = getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))
            parts.append(str(part))
        names.append("/".join([root, *parts]) if root else "/".join(parts))
    return names


# --- arrays ---------------------------------------------------------------------------


def _check_usable(name: str, leaf: object, values: bool) -> None:
    """Raise `InvalidInput` unless jax can compute with `leaf` (its shape, if not `values`)."""
    if values and isinstance(leaf, jax.ShapeDtypeStruct):
        raise InvalidInput(f"{name} is a shape without values; pass the array itself.")
    if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    if values and getattr(leaf, "is_deleted", lambda: False)():
        raise InvalidInput(
            f"{name} has been deleted: its memory was donated to a jitted function "
            "(donate_argnums). Use the array which that function returned, or do not donate it."
        )
    try:
        jax.typeof(leaf)
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"{name} is not an array that jax can use: {error}\nConvert it, for instance with "
            "jnp.asarray(np.asarray(a, np.float32))."
        ) from error


def check_floats(
    name: str,
    leaf: Any,
    *,
    what: str = "parameters",
    finite: bool = True,
    values: bool = True,
    remedy: str = "",
    complex_numbers: bool = False,
) -> None:
    """Raise `InvalidInput` unless `leaf` is an array of real floats, or of complex ones if allowed.

    With `finite` its values are looked at, where they are concrete, that is outside `jit`.
    """
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise InvalidInput(
            f"{name} is a {type(leaf).__name__}, not an array. Convert it with jnp.asarray, or "
            "close over it if it is not a parameter."
            + (f"\n{remedy}" if callable(leaf) and remedy else "")
        )
    kinds = jnp.inexact if complex_numbers else jnp.floating
    if not jnp.issubdtype(leaf.dtype, kinds):
        raise InvalidInput(
            f"{name} has dtype {leaf.dtype}, but {what} must be real floating-point arrays."
            + (remedy and f"\n{remedy}")
        )
    _check_usable(name, leaf, values)
    if not finite or isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    # A float64 NumPy array is float32 to jax unless 64-bit types are on.
    used = jax.dtypes.canonicalize_dtype(leaf.dtype)
    bad = leaf.size - _finite(leaf, used)
    if bad:
        within = "" if used == leaf.dtype else f" (as {used}, since 64-bit types are off)"
        raise InvalidInput(
            f"{name} has {bad} non-finite (NaN or infinite) of {leaf.size} values{within}; a "
            "path through any of them has no length. Find the step that produced them, "
            "e.g. with jax.debug_nans."
        )


def _finite(leaf: Constant, dtype: DType) -> int:
    """How many values are finite in that dtype."""
    if isinstance(leaf, jax.Array) and not _in_memory(leaf):
        with jax.ensure_compile_time_eval():
            return int(jnp.isfinite(leaf).sum())
    # NumPy casts here: within jax a warning that it overflows ends the process if it is an error.
    with np.errstate(over="ignore", invalid="ignore"):
        return int(np.count_nonzero(np.isfinite(np.asarray(leaf).astype(dtype, copy=False))))


def _in_memory(leaf: jax.Array) -> bool:
    """Whether NumPy can look at an array where it is: jax would compile a program per shape."""
    return leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.devices())


_ONLY_FLOATS = (
    "Pass only the float leaves as params and close over the others; jaxinv.adapters does that for "
    "models of flax, equinox, haiku and keras."
)


_COLLECTIONS = ("batch_stats", "cache", "intermediates")  # what flax keeps beside parameters


def check_params(params: PyTree, *, values: bool = True, complex_numbers: bool = False) -> None:
    """Raise `InvalidInput` unless `params` is a non-empty pytree of finite float arrays.

    Values are looked at only where they are concrete, that is outside `jit`. Without `values`
    shapes will do. Complex numbers are refused unless said otherwise.
    """
    leaves = jax.tree.leaves(params)
    if inspect.isfunction(params):
        raise InvalidInput(
            "params is a function. Check the order of the arguments: (fn, params, x)."
        )
    if not leaves:
        raise InvalidInput(
            "params has no leaves, so there is nothing to compute with. Pass the pytree of weights "
            "(for flax: variables['params'])."
        )
    _check_no_statistics(params)
    for name, leaf in zip(leaf_names(params, "params"), leaves, strict=True):
        check_floats(
            name, leaf, values=values, remedy=_ONLY_FLOATS, complex_numbers=complex_numbers
        )


def _check_no_statistics(params: PyTree) -> None:
    """Raise `InvalidInput` for the variables of flax linen with more collections than one."""
    if not isinstance(params, Mapping) or "params" not in params:
        return
    others = [name for name in params if name in _COLLECTIONS]
    if others:
        raise InvalidInput(
            f"params holds all variables of a flax model, also {others[0]}, which are not "
            "parameters. Close over those: "
            "fn, params = jaxinv.adapters.from_linen(model, variables)."
        )


def _masked(leaf: object) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def check_start(params: Params) -> None:
    """`check_params` for the init of a transformation: leaves may be masked, even all of them.

    optax.tree.map_params calls it with a placeholder that has no leaves.
    """
    if jax.tree.leaves(params):
        check_params(params)


def check_like(tree: PyTree, params: PyTree, name: str) -> None:
    """Raise `InvalidInput` unless a tree holds floats in the structure and shapes of params.

    Where a leaf of the tree is masked (by optax.masked or optax.partition) anything will do.
    """
    structure: jax.tree_util.PyTreeDef
    leaves, structure = jax.tree.flatten(tree, is_leaf=_masked)
    try:
        weights = structure.flatten_up_to(params)
    except (ValueError, TypeError, KeyError):
        weights = None
    fits = weights is not None and all(
        _masked(a) or _masked(w) or not isinstance(w, list | tuple | dict)
        for a, w in zip(leaves, weights, strict=True)
    )
    if weights is None or not fits:
        raise InvalidInput(
            f"{name} must be a pytree like params, {jax.tree.structure(params)}, not {structure}."
        )
    names = iter(leaf_names(tree, name))
    for leaf, weight in zip(leaves, weights, strict=True):
        if _masked(leaf):
            continue
        leaf_name = next(names)
        if _masked(weight):
            continue
        check_floats(leaf_name, leaf, what="pytrees like params", finite=False)
        if leaf.shape != jnp.shape(weight):
            raise InvalidInput(
                f"{leaf_name} has shape {leaf.shape}, but the parameter has {jnp.shape(weight)}."
            )


def check_usable(tree: PyTree, name: str) -> None:
    """Raise `InvalidInput` unless every leaf is something with values that jax can use."""
    for leaf_name, leaf in zip(leaf_names(tree, name), jax.tree.leaves(tree), strict=True):
        _check_usable(leaf_name, leaf, True)


# --- inputs ---------------------------------------------------------------------------


def check_inputs(x: Inputs, *, values: bool, finite: bool = False) -> None:
    """Raise `InvalidInput` unless `x` is a pytree of arrays with a leading batch axis.

    Without `values` shapes will do. With `finite` concrete values must be finite numbers.
    """
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise InvalidInput("x has no leaves; pass an array with a leading batch axis.")
    for name, leaf in zip(leaf_names(x, "x"), leaves, strict=True):
        _check_usable(name, leaf, values)
        shape = jnp.shape(leaf)
        if isinstance(leaf, bool | int | float) and isinstance(x, list | tuple):
            raise InvalidInput(
                f"x is a {type(x).__name__} of Python numbers. Pass an array, jnp.asarray(x); for "
                "a shape alone jax.ShapeDtypeStruct(shape, jnp.float32)."
            )
        if not shape:
            raise InvalidInput(
                f"{name} is a scalar, but every input needs a leading batch axis. "
                "Pass x[None] for one example, or close over settings that are not inputs."
            )
        if 0 in shape:
            raise InvalidInput(
                f"{name} has shape {shape}: an axis of length 0 leaves no input element. "
                "Pass at least one example"
                + ("." if values else " (only shapes are used, jax.ShapeDtypeStruct will do).")
            )
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise InvalidInput(
                f"{name} has dtype {leaf.dtype}; networks of complex numbers are not covered. Pass "
                "real and imaginary parts as two inputs."
            )
        if not finite or isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        if _finite(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype)) < leaf.size:
            raise InvalidInput(
                f"{name} has non-finite (NaN or infinite) values, for which nothing can be "
                "computed. Leave those examples out."
            )


def abstract_batch_of_one(x: Inputs) -> Inputs:
    """Shapes of `x` with every leading batch axis set to 1; the values of `x` play no part."""
    check_inputs(x, values=False)

    def one(leaf: ArrayLike | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))
        return jax.ShapeDtypeStruct((1, *jnp.shape(leaf)[1:]), dtype)

    return jax.tree.map(one, x)


# --- the user's functions -------------------------------------------------------------

# Where a library defines the class of its models, and how one becomes a function.
_MODELS = {
    "flax.linen": ("Module", "a flax linen module", "from_linen(model, variables)"),
    "flax.nnx": ("Module", "a flax nnx module", "from_nnx(model)"),
    "equinox": ("Module", "an equinox module", "from_equinox(model)"),
    "haiku": ("Module Transformed TransformedWithState", "of haiku", "from_haiku(net, params)"),
    "keras": ("Layer", "a keras layer or model", "from_keras(model)"),
}


def _takes_params_and_x(fn: Any) -> bool:
    """Whether an equinox module is called as `fn(params, x)`, which is for its class to choose."""
    try:
        parameters = inspect.signature(fn)
        arguments = list(parameters.bind(None, None).arguments)
    except (TypeError, ValueError):
        return False
    return arguments[1:] != ["state"]


def check_network(fn: Any, name: str = "fn") -> Any:
    """`fn`; raise `InvalidInput` unless it is a function, saying what makes one of a model.

    Libraries are told by the names of modules, so that none has to be imported.
    """
    whole = fn if isinstance(fn, type) else type(fn)
    for cls in whole.__mro__:
        for library, (classes, what, adapter) in _MODELS.items():
            if (
                not f"{cls.__module__}.".startswith(f"{library}.")
                or cls.__name__ not in classes.split()
            ):
                continue
            if library == "equinox" and _takes_params_and_x(fn):
                return fn
            raise InvalidInput(
                f"{name} is {what} ({whole.__name__}), not a function {name}(params, x). Make "
                f"one of it: {name}, params = jaxinv.adapters.{adapter}."
            )
    if not callable(fn):
        raise InvalidInput(
            f"{name} must be a function {name}(params, x), not {_SHORT.repr(fn)}. Check the order "
            "of the arguments: (fn, params, x) for functions, (learning_rate, fn, x) for path_sgd."
        )
    return fn


@contextlib.contextmanager
def calling(call: str, *arguments: PyTree, remedy: str = "") -> Iterator[None]:
    """A scope that runs the user's code: what it raises becomes `InvalidInput`, with the shapes.

    The original exception is the cause, so that its traceback is shown. Errors of jaxinv pass.
    """
    try:
        yield
    except JaxinvError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{_shown(a)}" for a in arguments)
        raise InvalidInput(
            f"{call} raised {type(error).__name__} when called with {shapes}: {error}"
            + (remedy and f"\n{remedy}")
        ) from _from_first_own_line(error)


# Lines in here are not the user's.
_INTERNAL = tuple(os.path.join(os.path.dirname(f), "") for f in (__file__, jax.__file__))


def _from_first_own_line(error: Exception) -> Exception:
    """The exception with a traceback that begins in the user's code."""
    lines = error.__traceback__
    while lines is not None and lines.tb_frame.f_code.co_filename.startswith(_INTERNAL):
        lines = lines.tb_next
    return error if lines is None else error.with_traceback(lines)


_MOST_SHOWN = 8  # arrays


def _shown(tree: PyTree) -> str:
    """The shapes and dtypes in a pytree."""

    def one(leaf: object) -> str:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return type(leaf).__name__
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    leaves = list(map(one, jax.tree.leaves(tree)))
    if len(leaves) > _MOST_SHOWN or not isinstance(tree, dict | list | tuple) and leaves[1:]:
        first = ", ".join(leaves[:_MOST_SHOWN])
        more = ", …" if len(leaves) > _MOST_SHOWN else ""
        return f"{type(tree).__name__} of {len(leaves)} arrays ({first}{more})"
    return str(jax.tree.map(one, tree)).replace("'", "")


# --- options --------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """A real number known now, or None."""
    if isinstance(value, jax.core.Tracer | str | bytes) or np.ndim(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def real(name: str, value: object, accept: Callable[[float], bool], expected: str) -> float:
    """An option as a float; `InvalidInput` unless it is a fixed real number that is accepted."""
    found = _number(value)
    if found is None or math.isnan(found) or not accept(found):
        raise InvalidInput(f"{name} must be {expected}, not {value!r}.")
    return found


def integer(name: str, value: Any, least: int, also: str = "") -> int:
    """An option as an int; `InvalidInput` unless it is a fixed integer >= least."""
    found = None if isinstance(value, bool) else _number(value)
    if found is None or not math.isfinite(found) or int(found) != found or found < least:
        raise InvalidInput(f"{name} must be {also}a fixed integer >= {least}, not {value!r}.")
    return int(value)


def check_key(name: str, key: object) -> Array:
    """A PRNG key; `InvalidInput` unless it is one, typed or of raw bits."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed else dtype == jnp.uint32 and len(shape or ()) == 1):
        raise InvalidInput(f"{name} must be a key such as jax.random.key(0), not {key!r}.")
    return cast(Array, key)


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `InvalidInput` unless an option is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidInput(f"{name} must be one of {', '.join(choices)}, not {value!r}.")


# --- options that several packages share ------------------------------------------------


def check_exponent(p: object) -> None:
    """Raise `InvalidInput` unless p is a fixed real number with 1 <= p < inf."""
    accept = lambda p: 1 <= p < float("inf")  # noqa: E731
    real("p", p, accept, "a fixed real number with 1 <= p < inf")


def check_alpha(alpha: object) -> float:
    """alpha as a float; `InvalidInput` unless it is a fixed number in [0, 1]."""
    return real("alpha", alpha, lambda a: 0 <= a <= 1, "a fixed number in [0, 1]")


def check_probes(probes: object) -> None:
    """Raise `InvalidInput` unless probes is None or a fixed integer >= 1."""
    if probes is not None:
        integer("probes", probes, 1, also="None or ")


def check_natural_options(
    likelihood: Likelihood,
    damping: float | Array,
    solver: object,
    rtol: object,
    max_iterations: object,
    dtype: DTypeLike | None = None,
) -> float | Array:
    """Raise `InvalidInput` for options that make no sense; the damping as a float or a tracer.

    Example:
        >>> from jaxinv._checks import check_natural_options
        >>> check_natural_options("softmax", 1, "auto", None, 10)
        1.0
    """
    one_of("likelihood", likelihood, get_args(Likelihood))
    one_of("solver", solver, get_args(Solver))
    if rtol is not None:
        real("rtol", rtol, lambda r: r >= 0, ">= 0")
    integer("max_iterations", max_iterations, 1)
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise InvalidInput(f"dtype must be float32 or float64, not {jnp.dtype(dtype)}.")
    if jnp.shape(damping) != ():
        raise InvalidInput(f"damping must be a scalar, not of shape {jnp.shape(damping)}.")
    if isinstance(damping, jax.core.Tracer):
        return damping
    return real("damping", damping, lambda d: 0 <= d < float("inf"), "finite and >= 0")
