"""Which mistake was made, where `fn` raises on the batch of one that it is traced with.

The user's own x is tried first: only if that works is it a matter of batch sizes. Then what people
get wrong is tried, one thing at a time, on shapes alone: a change after which `fn` runs is named.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinv._interpreter.source import is_users
from jaxinv.errors import InvalidInput, JaxinvError
from jaxinv.typing import ArrayLike, Inputs, Network, Params, PyTree

ANY_SIZE = (
    "fn must accept any batch size (reshape with -1 or x.shape[0] in place of a fixed batch size) "
    "and fit these params. If axis 0 of x does not count examples, say which axis does "
    "(batch_axis=1), or that x is one input (batch_axis=None)."
)
IN_FLOAT64 = (
    "A fn that makes float32 arrays of its own (the carry of a recurrent cell) cannot run in "
    "float64: ask for dtype=jnp.float32 where there is that option."
)


class Attempt(NamedTuple):
    """A call of `fn` that failed on a batch of one: shapes as given, and the exception."""

    fn: Network
    params: PyTree
    x: PyTree
    cause: BaseException | None
    runs: bool  # on x as it was given

    def with_x(self, change: Callable[[jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]) -> bool:
        """Whether `fn` runs on another x."""
        return _output(self.fn, self.params, jax.tree.map(change, self.x)) is not None


class Mistake(NamedTuple):
    """What people get wrong."""

    made: Callable[[Attempt], bool]
    remedy: str


def raise_mistake(error: InvalidInput, fn: Network, params: Params, x: Inputs) -> None:
    """Raise the error, the mistake first, with the user's line; not if `fn` runs on x as given."""
    shapes, given = _shapes(params), _shapes(x)
    output = _output(fn, shapes, given)
    if output is not None and not _is_one_example(fn, shapes, given, output):
        return
    cause = error.__cause__
    attempt = Attempt(fn, shapes, given, cause, output is not None)
    said = [str(error).removesuffix(f"\n{ANY_SIZE}"), *_where(cause)]
    remedy = next((mistake.remedy for mistake in _MISTAKES if mistake.made(attempt)), None)
    lines = [*said, _OWN_BUG.remedy] if remedy is None else [remedy, *said]
    raise InvalidInput("\n".join(lines)) from cause


def check_outputs(outputs: PyTree) -> None:
    """Raise `InvalidInput` unless there are any."""
    if not jax.tree.leaves(outputs):
        raise InvalidInput(
            "fn returned no array. It must return the outputs of the network: look for a missing "
            "`return`."
        )


def looks_like_a_loss(outputs: PyTree) -> bool:
    """Whether all that `fn` returns is one number."""
    return [a.shape for a in jax.tree.leaves(outputs)] == [()]


def noting_a_loss(error: JaxinvError, outputs: PyTree) -> JaxinvError:
    """The error of a function that mixes examples; it says so if that looks like a loss."""
    return type(error)(f"{_LOSS.remedy}\n{error}") if looks_like_a_loss(outputs) else error


# --- what is tried ------------------------------------------------------------------------


def _output(fn: Network, params: PyTree, x: PyTree) -> PyTree:
    """The shapes that `fn` returns, or None where it raises, whatever that is."""
    try:
        return jax.eval_shape(lambda params, x: fn(params, x), params, x)
    except Exception:
        return None


def _shapes(tree: PyTree) -> PyTree:
    def shape(a: ArrayLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(a), jax.dtypes.canonicalize_dtype(jnp.result_type(a)))

    return jax.tree.map(shape, tree)


def _with_axis(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *a.shape), a.dtype)


def _of_integers(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, jnp.int32)


def _only_in_float32(a: Attempt) -> bool:
    """Whether it is only in 64-bit arithmetic that `fn` raises."""
    if a.runs or not any(s.dtype == jnp.float64 for s in jax.tree.leaves((a.params, a.x))):
        return False
    with jax.enable_x64(False):
        return _output(a.fn, _shapes(a.params), _shapes(a.x)) is not None


def _is_one_example(fn: Network, params: PyTree, x: PyTree, output: PyTree) -> bool:
    """Whether `fn` runs on x with a batch axis before it too, and x by itself has none."""
    counts = {a.shape[0] for a in jax.tree.leaves(x)}
    apart = all(a.shape[:1] and a.shape[0] in counts for a in jax.tree.leaves(output))
    return not apart and _output(fn, params, jax.tree.map(_with_axis, x)) is not None


def _needs_more(a: Attempt) -> bool:
    """Whether `fn` has to be given more, or less, than params and x."""
    try:
        inspect.signature(a.fn).bind(None, None)
    except TypeError:
        return True
    except ValueError:
        pass
    return False


def _needs_a_key(a: Attempt) -> bool:
    """Whether it is a random key that a layer misses, by what libraries say then."""
    said = type(a.cause).__name__ + str(a.cause)
    return any(word in said for word in ("InvalidRng", "PRNG", "requires a key", "rngs"))


def _where(error: BaseException | None) -> list[str]:
    """The innermost line of the user's own that an exception went through."""
    frames = [] if error is None else traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if is_users(f.filename)]
    return [f"  where: {f.filename}:{f.lineno} ({f.name})" for f in own[-1:]]


_OWN_BUG = Mistake(
    lambda a: True,
    remedy="fn raises this on x as given, too. Call fn(params, x) by itself to see where.",
)
_LOSS = Mistake(
    lambda a: False,
    remedy="fn returns one number, as a loss does: pass the network whose outputs the loss takes.",
)
_MISTAKES = (
    Mistake(_only_in_float32, remedy=IN_FLOAT64),
    Mistake(
        lambda a: a.runs or a.with_x(_with_axis),
        remedy="x has no batch axis: pass x[None] for one example, or batch_axis=None.",
    ),
    Mistake(
        _needs_more,
        remedy="jaxinv calls fn(params, x). Close over the rest: "
        "lambda params, x: fn(params, x, 0).",
    ),
    Mistake(
        _needs_a_key,
        remedy="A layer asks for random numbers, as in training. Call the model in evaluation "
        "mode: deterministic=True or train=False (flax), inference=True (equinox), training=False.",
    ),
    Mistake(
        lambda a: _output(a.fn, a.x, a.params) is not None,
        remedy="params and x are swapped: fn(x, params) runs. The order is (fn, params, x).",
    ),
    Mistake(
        lambda a: _output(jax.vmap(a.fn, (None, 0)), a.params, a.x) is not None,
        remedy="fn takes one example: pass jax.vmap(fn, in_axes=(None, 0)), or batch_axis=None.",
    ),
    Mistake(
        lambda a: a.with_x(_of_integers),
        remedy="fn takes integers (tokens): pass x.astype(int), or an integer ShapeDtypeStruct.",
    ),
    Mistake(
        lambda a: len(getattr(a.params, "shape", ())) == 1,
        remedy="These params are one vector. If optax.flatten made it, put the transformation of "
        "jaxinv outside of it: κ needs to know which weight is which.",
    ),
)


__all__ = [
    "ANY_SIZE",
    "IN_FLOAT64",
    "check_outputs",
    "looks_like_a_loss",
    "noting_a_loss",
    "raise_mistake",
]
