"""The path domain: a value stands for the sum over the paths into it of the product of |weight|^p.

One rule per operation, in `linear` and `piecewise`. To add an operation, add one rule there
and one row to `tests/paths/test_norms.py`.
"""

from __future__ import annotations

from jaxinv._interpreter.walk import Equation
from jaxinv._numerics import scaled
from jaxinv._numerics.scaled import Scaled
from jaxinv.paths import codes, linear, loops, piecewise
from jaxinv.paths.values import (
    Operand,
    Paths,
    Result,
    Sign,
    Weight,
    derived,
    not_homogeneous,
    of_signs,
)
from jaxinv.typing import ArrayLike, DType


class PathDomain:
    """Path semantics for one exponent p, in one dtype.

    `edges_only` refuses edge weights that are not monomials of the parameters (κ needs none).
    `streaming` allows products that cannot be differentiated in forward mode (see
    `_numerics.stream`). With `sample` only some elements of large weights are looked at to tell
    exponents and zeros.
    """

    rules = {
        primitive: codes.aware(rule) for primitive, rule in (linear.RULES | piecewise.RULES).items()
    }

    def __init__(
        self,
        p: float,
        dtype: DType,
        edges_only: bool,
        streaming: bool = False,
        sample: bool = False,
    ):
        self.p, self.dtype = p, dtype
        self.edges_only, self.streaming, self.sample = edges_only, streaming, sample

    def lenient(self) -> PathDomain:
        """The same domain, not yet refusing weights that are not edges."""
        return PathDomain(self.p, self.dtype, False, self.streaming, self.sample)

    def power(self, value: ArrayLike) -> Scaled:
        """|value|^p."""
        return scaled.power(value, self.p, self.dtype)

    def default(self, eqn: Equation, *inputs: Operand) -> Result:
        """Operations without a rule: allowed on parameters, signs, integers; or refused."""
        return _default(self, eqn, *inputs)

    scan = loops.scan
    switch = loops.switch


@codes.aware
def _default(domain: PathDomain, eqn: Equation, *inputs: Operand) -> Result:
    if not any(isinstance(v, Paths | Sign) for v in inputs):
        return derived(eqn, inputs)
    if not any(isinstance(v, Paths | Weight) for v in inputs):
        return of_signs(eqn, inputs)
    raise not_homogeneous(eqn)
