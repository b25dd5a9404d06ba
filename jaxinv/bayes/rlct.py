"""Exact learning coefficients (real log canonical thresholds) of models that are solved.

The Bayesian free energy of a singular model is n·L + λ·log n − (m − 1)·log log n + O(1): λ, the
learning coefficient, counts parameters as d/2 does in a regular model, and m is its multiplicity.
Both follow from the pole of ζ(z) = ∫ K(w)^z φ(w) dw that is closest to 0, with K the
Kullback-Leibler divergence to the truth: the pole is −λ, its order m. What is here is exact, as
fractions, and is the ground truth for estimates.

Reference: Watanabe, "Algebraic geometry and statistical learning theory", Cambridge University
Press 2009, chapters 1 and 6.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from jaxinv.errors import InvalidInput


class LearningCoefficient(NamedTuple):
    """An exact learning coefficient with its multiplicity.

    Example:
        >>> from jaxinv.bayes import LearningCoefficient
        >>> print(LearningCoefficient(Fraction(3, 4), 2))
        3/4 (multiplicity 2)
    """

    value: Fraction  # λ
    multiplicity: int  # m

    def __str__(self) -> str:
        """λ and m, for people."""
        return f"{self.value} (multiplicity {self.multiplicity})"


def normal_crossing(
    exponents: Sequence[int], prior: Sequence[int] | None = None
) -> LearningCoefficient:
    """λ of K(w) = Π_i |w_i|^{k_i} at the origin, with prior Π_i |w_i|^{h_i}.

    λ = min_i (h_i + 1)/k_i over k_i > 0, and m is how many i attain it: ζ(z) is a product of the
    integrals ∫ |w|^{k_i z + h_i} dw, each with one pole.

    Args:
        exponents: k_i ≥ 0, at least one of them positive.
        prior: h_i ≥ 0, all 0 by default: a prior that is positive at the origin.

    Returns:
        A `LearningCoefficient`.

    Raises:
        InvalidInput: if exponents are negative, all 0, or of another number than those of the
            prior.

    References:
        Watanabe 2009 (see the module), Theorem 2.7 and Definition 2.7.

    Example:
        >>> from jaxinv.bayes import normal_crossing
        >>> print(normal_crossing((2, 4)))  # w₁²w₂⁴
        1/4 (multiplicity 1)
        >>> print(normal_crossing((2, 2)))  # (w₁w₂)²
        1/2 (multiplicity 2)
    """
    k = _integers("exponents", exponents)
    h = _integers("prior", [0] * len(k) if prior is None else prior)
    if len(h) != len(k):
        raise InvalidInput(f"{len(k)} exponents need as many of the prior, not {len(h)}.")
    if not any(k):
        raise InvalidInput("exponents are all 0: K = 1 has no zero, so there is no λ.")
    poles = [Fraction(hi + 1, ki) for hi, ki in zip(h, k, strict=True) if ki]
    return LearningCoefficient(min(poles), poles.count(min(poles)))


def reduced_rank(inputs: int, hidden: int, outputs: int, true_rank: int) -> LearningCoefficient:
    """λ of reduced-rank regression y = B A x + noise, A: hidden × inputs, B: outputs × hidden.

    With M inputs, H hidden units, N outputs and a true map of rank r, one of four cases holds:

    1. N + r ≤ M + H, M + r ≤ N + H and H + r ≤ M + N: with s = (H + r) + M + N,
       8λ = s² − 2((H + r)² + M² + N²), m = 1 for even s; 8λ is 1 more and m = 2 for odd s;
    2. M + H < N + r: 2λ = HM − Hr + Nr, m = 1;
    3. N + H < M + r: 2λ = HN − Hr + Mr, m = 1;
    4. M + N < H + r: 2λ = MN, m = 1.

    Args:
        inputs: M ≥ 1.
        hidden: H ≥ 1.
        outputs: N ≥ 1.
        true_rank: r, from 0 to the smallest of the others.

    Returns:
        A `LearningCoefficient`: the smallest λ over all parameters that realise the true map. The
        local one is larger at those where A or B has a rank above r.

    Raises:
        InvalidInput: for sizes below 1 or a rank that the model does not have.

    References:
        Aoyagi, Watanabe, "Stochastic complexities of reduced rank regression in Bayesian
        estimation", Neural Networks 18, 2005, Main Theorem.

    Example:
        >>> from jaxinv.bayes import reduced_rank
        >>> print(reduced_rank(inputs=3, hidden=2, outputs=3, true_rank=1))
        7/2 (multiplicity 2)
    """
    m, h, n, r = _sizes((inputs, hidden, outputs), true_rank)
    if m + h < n + r:
        return LearningCoefficient(Fraction(h * m - h * r + n * r, 2), 1)
    if n + h < m + r:
        return LearningCoefficient(Fraction(h * n - h * r + m * r, 2), 1)
    if m + n < h + r:
        return LearningCoefficient(Fraction(m * n, 2), 1)
    total = h + r + m + n
    odd = total % 2
    eighths = total**2 - 2 * ((h + r) ** 2 + m**2 + n**2) + odd
    return LearningCoefficient(Fraction(eighths, 8), 1 + odd)


def deep_linear(widths: Sequence[int], true_rank: int) -> LearningCoefficient:
    """λ of a deep linear network y = W_L ⋯ W_1 x + noise, of any depth.

    With M_s = widths[s] − r there is one set Σ of ℓ + 1 layers, those of the smallest widths, with
    max_Σ M < min_{not Σ} M and ℓ·max_Σ M ≤ S < ℓ·min_{not Σ} M, where S = Σ_{s∈Σ} M_s. Then

        λ = (r(H_0 + H_L) − r²)/2 + a(ℓ − a)/(4ℓ) − (ℓ − 1)S²/(4ℓ) + ½ Σ_{s<t∈Σ} M_s M_t,

    m = a(ℓ − a) + 1, with a = S − ℓ·(⌈S/ℓ⌉ − 1).

    Args:
        widths: (inputs, hidden, ..., outputs), at least two.
        true_rank: rank of the true map, from 0 to the smallest width.

    Returns:
        A `LearningCoefficient`, the smallest over the parameters that realise the true map.

    Raises:
        InvalidInput: as for `reduced_rank`.

    References:
        Aoyagi, "Consideration on the learning efficiency of multiple-layered neural networks with
        linear units", Neural Networks 172, 2024, Theorem 1.

    Example:
        >>> from jaxinv.bayes import deep_linear, reduced_rank
        >>> print(deep_linear((3, 2, 3), true_rank=1) == reduced_rank(3, 2, 3, 1))
        True
        >>> print(deep_linear((4, 4, 4, 4), true_rank=0))
        11/2 (multiplicity 3)
    """
    *sizes, r = _sizes(tuple(widths), true_rank)
    excess = sorted(h - r for h in sizes)
    for count in range(2, len(excess) + 1):
        chosen, rest = excess[:count], excess[count:]
        ell, total = count - 1, sum(chosen)
        if total < ell * chosen[-1]:
            continue
        if rest and not (chosen[-1] < rest[0] and total < ell * rest[0]):
            continue
        ceiling = -(-total // ell)
        a = total - ell * (ceiling - 1)
        pairs = (total**2 - sum(c * c for c in chosen)) // 2
        value = (
            Fraction(r * (sizes[0] + sizes[-1]) - r * r, 2)
            + Fraction(a * (ell - a), 4 * ell)
            - Fraction((ell - 1) * total**2, 4 * ell)
            + Fraction(pairs, 2)
        )
        return LearningCoefficient(value, a * (ell - a) + 1)
    raise AssertionError(f"no set of layers fits {sizes}, {r}")  # the theorem says that one does


def _integers(name: str, values: Sequence[int]) -> list[int]:
    try:
        found = [operator.index(v) for v in values]
    except TypeError as error:
        raise InvalidInput(f"{name} must be integers, not {list(values)}.") from error
    if any(v < 0 for v in found):
        raise InvalidInput(f"{name} must be >= 0, not {found}.")
    return found


def _sizes(widths: tuple[int, ...], true_rank: int) -> list[int]:
    *sizes, rank = _integers("widths and true_rank", (*widths, true_rank))
    if len(sizes) < 2 or min(sizes) < 1:
        raise InvalidInput(f"widths must be two or more numbers >= 1, not {sizes}.")
    if rank > min(sizes):
        raise InvalidInput(
            f"true_rank is {rank}, but no network of widths {sizes} has a rank above {min(sizes)}."
        )
    return [*sizes, rank]
