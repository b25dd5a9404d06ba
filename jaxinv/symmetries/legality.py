"""Is a change of the parameters a symmetry, and if not, which operation forbids it?

Rotating a residual stream, folding a gain into the next layer or equalising two layers leaves the
function alone only if every consumer of a value is changed to match. A value may change on the way,
as long as its change can be taken back: it is a linear image of what it was, h' = h·M + m. The
operation that forbids the change is the first whose operands are such images and whose result is
not: a nonlinearity, a sum of two terms that were changed differently, a consumer that was
forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import _checks
from jaxinv._interpreter import walk
from jaxinv._interpreter.walk import Equation, Value
from jaxinv.errors import InvalidInput
from jaxinv.typing import Array, ArrayLike, Inputs, Network, Params

_EQUAL = 1e3  # two values are the same if they differ by so many roundings of the parameters
_IMAGE = 1e4  # likewise for the residual of a fit
_ROWS = 1.2  # rows per unknown of a fit, for it to say anything


class SymmetryVerdict(NamedTuple):
    """Whether moved parameters compute the same function, and what stands in the way.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import is_symmetry
        >>> w = {"a": jnp.eye(2), "b": jnp.eye(2)}
        >>> x = jax.random.normal(jax.random.key(0), (20, 2))
        >>> turn = jnp.array([[0.6, -0.8], [0.8, 0.6]])
        >>> turned = {"a": turn, "b": turn.T}
        >>> is_symmetry(lambda w, x: x @ w["a"] @ w["b"], w, x, turned).same
        True
        >>> found = is_symmetry(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], w, x, turned)
        >>> found.same, [operation for operation, _ in found.forbidden_by]
        (False, ['relu'])
    """

    same: bool
    error: float  # largest difference of the outputs, relative to the largest output
    forbidden_by: tuple[
        tuple[str, str], ...
    ]  # (operation, source line), first in the program first
    undecided: int  # values with too few rows for a fit: pass more inputs

    def __str__(self) -> str:
        """The verdict in a sentence."""
        if self.same:
            return f"the same function (outputs differ by {self.error:.1e})"
        lines = [f"another function: outputs differ by {self.error:.1e} of the largest"]
        lines += [f"  forbidden by {name} at {where}" for name, where in self.forbidden_by]
        if self.undecided:
            lines.append(f"  {self.undecided} values undecided: pass more inputs")
        return "\n".join(lines)


class _Pair(Value):
    """A value with the given parameters, and with the moved ones."""

    __slots__ = ("after", "before", "blame", "of_x")

    def __init__(self, before: Array, after: Array, of_x: bool, blame: dict | None = None):
        self.before, self.after, self.of_x = before, after, of_x
        # Which operations made it what cannot be taken back; none where it is an image.
        self.blame: dict[tuple[str, str], None] = blame or {}


class _PairDomain:
    """Evaluates a program twice, and compares what each operation makes of its operands."""

    as_written = True
    rules: walk.Rules = {}

    def __init__(self, eps: float) -> None:
        self.eps = eps
        self.undecided = 0

    def default(self, eqn: Equation, *inputs: walk.Operand) -> walk.Result:
        pairs = [
            v if isinstance(v, _Pair) else _Pair(cast(Array, v), cast(Array, v), False)
            for v in inputs
        ]
        before = eqn.bind(*(p.before for p in pairs))
        after = eqn.bind(*(p.after for p in pairs))
        of_x = any(p.of_x for p in pairs)
        many = eqn.primitive.multiple_results
        outputs = []
        for a, b in zip(before if many else [before], after if many else [after], strict=True):
            blame: dict[tuple[str, str], None] = {}
            # The squares of a rotated stream are no image, but their sum is: all is well again.
            if of_x and not self._image(a, b):
                for pair in pairs:
                    blame |= pair.blame
                blame = blame or {(eqn.written, eqn.source): None}
            outputs.append(_Pair(a, b, of_x, blame))
        return outputs if many else outputs[0]

    def _image(self, before: Array, after: Array) -> bool:
        """Whether the one is an affine image of the other along its features."""
        if not jnp.issubdtype(before.dtype, jnp.floating):
            return bool((before == after).all())
        a, b = np.asarray(before), np.asarray(after)
        size = np.abs(a).max(initial=0)
        if np.abs(a - b).max(initial=0) <= _EQUAL * self.eps * max(size, np.finfo(float).tiny):
            return True
        if not a.ndim:
            return False
        decided = False
        limit = _IMAGE * self.eps
        for left, right in _matrices(a, b, limit):
            rows, features = left.shape
            if rows < _ROWS * (features + 1):
                continue
            decided = True
            if _fits(left, right, limit):
                return True
        if not decided:
            self.undecided += 1
        return not decided


def _matrices(
    a: np.ndarray, b: np.ndarray, limit: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The values as (rows, features), by whichever axes may be features."""
    features = a.shape[-1]
    yield a.reshape(-1, features), b.reshape(-1, features)
    yield a.reshape(len(a), -1), b.reshape(len(b), -1)
    for axis in range(1, a.ndim - 1):
        # One matrix per place along an axis, such as a head: together, features apart.
        heads = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
        fits = [
            _fits(h.reshape(-1, features), g.reshape(-1, features), limit)
            for h, g in zip(*heads, strict=True)
        ]
        rows = a.size // a.shape[axis] // features
        if rows >= _ROWS * (features + 1) and all(fits):
            yield np.zeros((features * 3 + 3, features)), np.zeros((features * 3 + 3, features))


def _fits(left: np.ndarray, right: np.ndarray, limit: float) -> bool:
    """Whether right = left·M + m for some M and m."""
    wide = np.concatenate([left, np.ones((len(left), 1))], axis=1)
    found, *_ = np.linalg.lstsq(wide, right, rcond=1e-12)
    size = np.abs(right).max(initial=0)
    return bool(np.abs(wide @ found - right).max(initial=0) <= limit * size)


def is_symmetry(fn: Network, params: Params, x: Inputs, moved: Params) -> SymmetryVerdict:
    """Whether other parameters compute the same function, and which operation forbids it if not.

    Args:
        fn: the network `fn(params, x) -> y`.
        params: pytree of float arrays.
        x: inputs; more examples than features, so that an image can be told from a coincidence.
        moved: the parameters after the change, a pytree like params.

    Returns:
        A `SymmetryVerdict`, of outputs in float64, up to 1000 roundings of the params' dtype. It
        names every operation that turns values which were changed in a way that can be taken back
        into one that cannot.

    Raises:
        InvalidInput: if `moved` is not a pytree like params, or for values that are not finite.

    Notes:
        The verdict `same` is about these inputs. Loops count as one operation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxinv.symmetries import is_symmetry
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> w = {"a": jax.random.normal(keys[0], (3, 4)),
        ...      "g": 1 + jax.random.uniform(keys[1], (4,)),
        ...      "b": jax.random.normal(keys[2], (4, 2)), "c": jax.random.normal(keys[3], (4, 2))}
        >>> def net(w, x):  # the gain g has two consumers
        ...     h = jnp.tanh(x @ w["a"]) * w["g"]
        ...     return h @ w["b"] + jnp.tanh(h @ w["c"])
        >>> x = jax.random.normal(jax.random.key(1), (30, 3))
        >>> folded = w | {"g": jnp.ones(4), "b": w["g"][:, None] * w["b"]}
        >>> print([o for o, _ in is_symmetry(net, w, x, folded).forbidden_by])  # c was forgotten
        ['dot_general']
        >>> is_symmetry(net, w, x, folded | {"c": w["g"][:, None] * w["c"]}).same
        True
    """
    _checks.check_network(fn)
    _checks.check_params(params)
    _checks.check_params(moved)
    _checks.check_like(moved, params, "moved")
    _checks.check_inputs(x, values=True, finite=True)
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((params, moved, x))):
        raise InvalidInput("is_symmetry compares numbers, and cannot run under jit or vmap.")

    def double(leaf: ArrayLike) -> Array:
        a = jnp.asarray(leaf)
        return a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a

    eps = max(float(jnp.finfo(a.dtype).eps) for a in jax.tree.leaves((params, moved)))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        before, after, inputs = (jax.tree.map(double, t) for t in (params, moved, x))
        trace = walk.trace(lambda w, x: fn(w, x), before, inputs)
        domain = _PairDomain(eps)
        weights = [
            _Pair(a, b, False)
            for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        ]
        data = [_Pair(a, a, True) for a in jax.tree.leaves(inputs)]
        outputs = walk.interpret(trace, weights, data, domain)
        pairs = [v for v in outputs if isinstance(v, _Pair)]
        errors = [_relative(v.before, v.after) for v in pairs]
    error = max(errors, default=0.0)
    same = error <= _EQUAL * eps
    blame = {found: None for pair in pairs for found in pair.blame}
    if not blame:
        # Only the outputs differ: they are images of what they were, and nothing takes that back.
        last = walk.output_equation(trace)
        blame = {(last.name, last.source): None}
    return SymmetryVerdict(same, error, () if same else tuple(blame), domain.undecided)


def _relative(before: Array, after: Array) -> float:
    a, b = np.asarray(before, np.float64), np.asarray(after, np.float64)
    size = np.abs(a).max(initial=0)
    return float(np.abs(a - b).max(initial=0) / size) if size else float(np.abs(b).max(initial=0))
