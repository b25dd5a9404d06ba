"""What jaxinv sees in a network: parameters, symmetries, balance, path norm.

`jaxinv inspect MODULE:NAME` prints this report. NAME is a function without arguments that returns
`(fn, params, x)`; MODULE is a file (`model.py`) or an importable module (`package.model`).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv import _checks
from jaxinv._text import printable
from jaxinv.errors import InvalidInput, UnsupportedOperation
from jaxinv.paths.norms import log_path_norm
from jaxinv.rescaling.group import RescalingGroup, rescaling_group
from jaxinv.symmetries.group import symmetry_group
from jaxinv.typing import Inputs, Network, Params

_MOST_NAMES = 3
_MOST_CLASSES = 12


class Layer(NamedTuple):
    """The generators that scale the outputs of one leaf, and how balanced their units are."""

    name: str
    generators: int
    examples: tuple[str, ...]  # the first few names
    ratio: tuple[float, float, float]  # incoming/outgoing norm: smallest, median, largest


class Report(NamedTuple):
    """What `inspect` finds; `str` of it is the text that the command prints."""

    leaves: tuple[tuple[str, tuple[int, ...], str], ...]  # (name, shape, dtype)
    parameters: int
    dimension: int  # of the rescaling group
    layers: tuple[Layer, ...]
    unused: tuple[str, ...]
    pinned_by: tuple[tuple[str, str], ...]  # (operation, source line)
    tied_by: tuple[tuple[str, str], ...]  # the same, of what gives several units one scale
    matrices: tuple[str, ...]  # classes of matrix symmetries
    beyond_rescaling: int  # dimension of these matrices, less their diagonals
    log_path_norm: float | None  # natural logarithm of γ₂; None if refused
    refused: str | None  # why there is no path norm

    def __str__(self) -> str:
        """The report, for people."""
        leaves = [(printable(name), shape, dtype) for name, shape, dtype in self.leaves]
        width = max(len(name) for name, _, _ in leaves)
        lines = [f"{self.parameters} parameters"]
        for name, shape, dtype in leaves:
            size = f"{math.prod(shape):>9}"
            lines.append(f"  {name:<{width}} {size}  {dtype}{list(shape)}")
        lines.append(f"rescaling group of dimension {self.dimension}")
        for layer in self.layers:
            low, median, high = layer.ratio
            lines.append(f"  {layer.generators} scale the outputs of {printable(layer.name)}")
            spread = f"{low:.3g} to {high:.3g}, median {median:.3g}"
            lines.append(f"    incoming/outgoing norm of a unit: {spread}")
            lines += [f"    {printable(example)}" for example in layer.examples]
            more = layer.generators - len(layer.examples)
            lines += [f"    and {more} more"] if more else []
        lines += [f"  unused: {printable(name)}" for name in self.unused]
        lines += [f"  pinned by {name} at {printable(where)}" for name, where in self.pinned_by]
        lines += [f"  tied by {name} at {printable(where)}" for name, where in self.tied_by]
        if self.matrices:
            lines.append(f"matrix symmetries: {self.beyond_rescaling} dimensions beyond rescalings")
            lines += [f"  {printable(name)}" for name in self.matrices[:_MOST_CLASSES]]
            more = len(self.matrices) - _MOST_CLASSES
            lines += [f"  and {more} more"] if more > 0 else []
        lines.append(f"at most {self.most} degrees of freedom; jaxinv report counts them")
        if self.log_path_norm is None:
            lines.append("path norm refused:")
            lines += [f"  {printable(line)}" for line in str(self.refused).split("\n")]
        else:
            lines.append(f"path norm {_power_of_e(self.log_path_norm)} (p = 2)")
        return "\n".join(lines)

    @property
    def most(self) -> int:
        """Parameters less known symmetries: no more degrees of freedom at generic weights."""
        return self.parameters - self.dimension - self.beyond_rescaling

    def as_dict(self) -> dict[str, object]:
        """The report as plain values, for JSON, which has no infinities: they become None."""
        norm = self.log_path_norm
        return {
            "parameters": self.parameters,
            "leaves": [
                {"name": name, "shape": list(shape), "dtype": dtype, "size": math.prod(shape)}
                for name, shape, dtype in self.leaves
            ],
            "group": {
                "dimension": self.dimension,
                "layers": [
                    {
                        "name": layer.name,
                        "generators": layer.generators,
                        "examples": list(layer.examples),
                        "incoming_over_outgoing_norm": dict(
                            zip(("min", "median", "max"), map(_finite, layer.ratio), strict=True)
                        ),
                    }
                    for layer in self.layers
                ],
                "unused": list(self.unused),
                "pinned_by": [{"operation": a, "where": b} for a, b in self.pinned_by],
                "tied_by": [{"operation": a, "where": b} for a, b in self.tied_by],
            },
            "matrix_symmetries": {
                "dimension_beyond_rescalings": self.beyond_rescaling,
                "classes": list(self.matrices),
            },
            "degrees_of_freedom_at_most": self.most,
            "log_path_norm": None if norm is None else _finite(norm),
            "path_norm_refused": self.refused,
        }


def inspect(fn: Network, params: Params, x: Inputs) -> Report:
    """Report on the symmetries of a network.

    Args:
        fn: any JAX-traceable `fn(params, x) -> y`.
        params: pytree of float arrays.
        x: inputs with a leading batch axis, or `jax.ShapeDtypeStruct`s: matrix symmetries are then
            tried on random inputs.

    Returns:
        A `Report`. The balance of a unit is the ratio of the norms of all weights that its
        generator multiplies and of all that it divides; 0 or infinite if one side is all zeros.

    Raises:
        InvalidInput: for integer, NaN or missing params, or x without a batch axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv import networks
        >>> from jaxinv.inspection import inspect
        >>> w = {"Dense_0": {"kernel": jnp.array([[3.0], [4.0]])},
        ...      "Dense_1": {"kernel": jnp.array([[2.0]])}}
        >>> print(inspect(networks.mlp, w, jnp.ones((1, 2))))
        3 parameters
          Dense_0/kernel         2  float32[2, 1]
          Dense_1/kernel         1  float32[1, 1]
        rescaling group of dimension 1
          1 scale the outputs of Dense_0/kernel
            incoming/outgoing norm of a unit: 2.5 to 2.5, median 2.5
            Dense_0/kernel → Dense_1/kernel
        at most 2 degrees of freedom; jaxinv report counts them
        path norm 10 (p = 2)
    """
    _checks.check_params(params)
    group, matrices, beyond = _symmetries(fn, params, x)
    leaves = jax.tree.leaves(params)
    names = [name or "params" for name in _checks.leaf_names(params, "")]
    ratios = unit_balance(group, params)
    layer_of, generator_names = np.array(group.layers), group.names
    layers = []
    for layer in dict.fromkeys(group.layers):
        members = np.flatnonzero(layer_of == layer)
        examples = tuple(generator_names[j] for j in members[:_MOST_NAMES])
        ordered = np.sort(ratios[members])
        # The middle value rather than the mean of two, which of 0 and infinity is none.
        spread = (float(ordered[0]), float(ordered[len(ordered) // 2]), float(ordered[-1]))
        layers.append(Layer(layer, len(members), examples, spread))
    norm, refused = None, None
    try:
        norm = float(log_path_norm(fn, params, x))
    except UnsupportedOperation as error:
        refused = str(error)
    return Report(
        leaves=tuple(
            (name, tuple(jnp.shape(leaf)), str(leaf.dtype))
            for name, leaf in zip(names, leaves, strict=True)
        ),
        parameters=sum(int(leaf.size) for leaf in leaves),
        dimension=group.dim,
        layers=tuple(layers),
        unused=group.unused,
        pinned_by=group.pinned_by,
        tied_by=group.tied_by,
        matrices=matrices,
        beyond_rescaling=beyond,
        log_path_norm=norm,
        refused=refused,
    )


def _symmetries(
    fn: Network, params: Params, x: Inputs
) -> tuple[RescalingGroup, tuple[str, ...], int]:
    """Rescalings, the names of classes of matrices, and the dimension of the latter."""
    try:
        found = symmetry_group(fn, params, x)
    except UnsupportedOperation:  # what cannot be tried in float64 is not reported
        return rescaling_group(fn, params, x), (), 0
    return found.rescaling, tuple(c.name for c in found.classes), found.beyond_rescaling


def unit_balance(group: RescalingGroup, params: Params) -> np.ndarray:
    """Ratio of the norms of the weights that each generator multiplies and divides, (dim,).

    (Σ_{B_ej>0} B_ej w_e² / Σ_{B_ej<0} |B_ej| w_e²)^{1/2}: 1 everywhere at the member of smallest
    norm of a feed-forward network. NaN where both sides are all zeros.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinv.inspection import unit_balance
        >>> from jaxinv.rescaling import rescaling_group
        >>> w = [jnp.full((1, 1), 8.0), jnp.full((1, 1), 2.0)]
        >>> group = rescaling_group(lambda w, x: (x @ w[0]) @ w[1], w, jnp.ones((1, 1)))
        >>> unit_balance(group, w).tolist()
        [4.0]
    """
    # In NumPy: operation by operation, jax would compile some for the shape of every leaf.
    totals = np.zeros(group.structure.num_classes)
    for leaf, terms in zip(jax.tree.leaves(params), group.indices, strict=True):
        squares = np.square(np.asarray(abs(leaf), np.float64))
        for ids in terms:
            np.add.at(totals, np.broadcast_to(np.asarray(ids), squares.shape), squares)
    rows, columns, coefficients = (np.asarray(v) for v in group[:3])
    picked = totals[rows] * coefficients
    sides = np.zeros((2, group.dim))
    np.add.at(sides, ((coefficients < 0).astype(int), columns), np.abs(picked))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(sides[0] / sides[1])


def load(target: str) -> tuple[Network, Params, Inputs]:
    """Import `MODULE:NAME` and call it: `(fn, params, x)`.

    Args:
        target: `path/to/file.py:NAME`, or `package.module:NAME`, which is also looked for in the
            current directory. NAME is a function without arguments.

    Returns:
        what the function returns.

    Raises:
        InvalidInput: saying what is wrong with the target, its module or what it returns.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.py"
        >>> _ = path.write_text("def model():\\n    return (lambda w, x: x @ w), 1.0, 2.0\\n")
        >>> load(f"{path}:model")[1:]
        (1.0, 2.0)
    """
    module_name, colon, name = target.rpartition(":")
    if not (module_name and colon and name):
        raise InvalidInput(
            f"{target!r} is not of the form MODULE:NAME, such as model.py:model, where model() "
            "returns (fn, params, x)"
        )
    module = _import(module_name)
    factory: Callable[[], object] | None = getattr(module, name, None)
    if not callable(factory):
        raise InvalidInput(f"{module_name} has no function {name!r}; give one without arguments")
    try:
        found = factory()
    except TypeError as error:
        raise InvalidInput(
            f"{target} must work without arguments and return (fn, params, x): {error}"
        ) from error
    if not (isinstance(found, tuple) and len(found) == 3 and callable(found[0])):
        raise InvalidInput(
            f"{target}() returned {type(found).__name__}, but must return the tuple (fn, params, x)"
        )
    return found


def _import(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix != ".py":
        sys.path.insert(0, "")  # as `python -m` does: a module in the current directory is found
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise InvalidInput(f"{name} cannot be imported: {error}") from error
        finally:
            sys.path.remove("")
    if not path.is_file():
        raise InvalidInput(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as `python file.py` does, so that it finds its siblings
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise InvalidInput(f"{path} cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _power_of_e(exponent: float) -> str:
    """e^exponent in decimals, or as a power of ten where it has many digits."""
    decimal = exponent / math.log(10)
    return f"{math.exp(exponent):.4g}" if abs(decimal) < 5 else f"10^{decimal:.4g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


__all__ = ["Layer", "Report", "inspect", "unit_balance"]
