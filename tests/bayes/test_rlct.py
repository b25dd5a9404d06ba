"""Exact learning coefficients against values worked out by hand, each by another argument."""

import itertools
from fractions import Fraction as F

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinv import InvalidInput
from jaxinv.bayes import deep_linear, normal_crossing, reduced_rank

# (M, H, N, r): (λ, m), by hand. K = ‖BA − B₀A₀‖² up to constants.
BY_HAND = {
    # One hidden unit, no signal: K = ‖a‖²‖b‖². In polar coordinates ρ²σ² with ρ^{M−1} σ^{N−1}:
    # λ = min(M, N)/2, attained twice if M = N.
    (1, 1, 1, 0): (F(1, 2), 2),
    (2, 1, 1, 0): (F(1, 2), 1),
    (1, 1, 2, 0): (F(1, 2), 1),
    (2, 1, 2, 0): (F(1), 2),
    (3, 1, 2, 0): (F(1), 1),
    (5, 1, 2, 0): (F(1), 1),
    (2, 1, 7, 0): (F(1), 1),
    (4, 1, 4, 0): (F(2), 2),
    # One input, one output, no signal: K = q², q = Σ_i a_i b_i a regular quadratic form of 2H
    # variables. A blow-up of the origin has ratio 2H/4, the cone q = 0 outside it 1/2.
    (1, 2, 1, 0): (F(1, 2), 1),
    (1, 3, 1, 0): (F(1, 2), 1),
    (1, 6, 1, 0): (F(1, 2), 1),
    # As many hidden units as the rank of the truth: the maps of rank H near it form a manifold of
    # dimension H(M + N − H), on which the model is regular.
    (3, 1, 3, 1): (F(5, 2), 1),
    (4, 2, 3, 2): (F(5), 1),
    (2, 2, 2, 2): (F(2), 1),
    (5, 3, 4, 3): (F(9), 1),
    # A truth of full rank min(M, N): every map near it is realised, and MN numbers count.
    (2, 5, 2, 2): (F(2), 1),
    (3, 4, 2, 2): (F(3), 1),
    (1, 4, 6, 1): (F(3), 1),
    # Many hidden units and no signal (case 4): take A of full rank; y = BA x is free, λ = MN/2.
    (2, 5, 2, 0): (F(2), 1),
    (2, 9, 3, 1): (F(3), 1),
    # One spare hidden unit beside a truth of rank 1: the Schur complement of the regular part
    # (M + N − 1 numbers) leaves K = ‖a‖²‖b‖² with M − 1 and N − 1 components.
    (3, 2, 3, 1): (F(5, 2) + F(1), 2),
    (4, 2, 3, 1): (F(6, 2) + F(1), 1),
    (2, 2, 2, 1): (F(3, 2) + F(1, 2), 2),
    (3, 2, 2, 1): (F(4, 2) + F(1, 2), 1),
}


@pytest.mark.parametrize("sizes", BY_HAND, ids=str)
def test_reduced_rank_by_hand(sizes):
    assert reduced_rank(*sizes) == BY_HAND[sizes]
    assert deep_linear(sizes[:3], sizes[3]) == BY_HAND[sizes]


def test_the_values_by_hand_cover_all_four_cases():
    def case(m, h, n, r):
        return (m + h < n + r, n + h < m + r, m + n < h + r)

    found = {case(*sizes) for sizes in BY_HAND}
    assert len(found) == 4 and len(BY_HAND) >= 20


SMALL = [
    (m, h, n, r)
    for m, h, n in itertools.product(range(1, 7), repeat=3)
    for r in range(min(m, h, n) + 1)
]


def test_two_published_theorems_agree_wherever_both_speak():
    """The formula of 2024 for any depth, at two layers, is the four cases of 2005."""
    for m, h, n, r in SMALL:
        assert deep_linear((m, h, n), r) == reduced_rank(m, h, n, r), (m, h, n, r)


def test_bounds_and_symmetries():
    for m, h, n, r in SMALL:
        value, multiplicity = reduced_rank(m, h, n, r)
        # A rank-r truth has r(M + N − r) regular directions; the model has at most MN, and
        # H(M + N) parameters.
        assert F(r * (m + n - r), 2) <= value <= F(min(m * n, h * (m + n)), 2)
        assert multiplicity in (1, 2)
        assert reduced_rank(n, h, m, r) == (value, multiplicity)
        assert reduced_rank(m, h + 1, n, r).value >= value


def test_cases_meet_without_a_jump():
    """On the border of two cases both formulas give the same λ."""
    met = [0, 0, 0]
    for m, h, n, r in SMALL:
        s = h + r + m + n
        first = F(s**2 - 2 * ((h + r) ** 2 + m**2 + n**2), 8)
        if m + h == n + r:
            met[0] += 1
            assert first == F(h * m - h * r + n * r, 2)
        if n + h == m + r:
            met[1] += 1
            assert first == F(h * n - h * r + m * r, 2)
        if m + n == h + r:
            met[2] += 1
            assert first == F(m * n, 2)
    assert min(met) > 10


@pytest.mark.parametrize("depth", range(1, 8))
def test_a_chain_of_single_units_is_a_monomial(depth):
    assert deep_linear((1,) * (depth + 1), 0) == normal_crossing((2,) * depth)


@pytest.mark.parametrize(
    ("widths", "rank", "expected"),
    [
        ((3, 2), 0, (F(3), 1)),  # one layer: linear regression, MN/2
        ((3, 2), 2, (F(3), 1)),
        # y = b c a·x with scalars between: K = ‖a‖² c² ‖b‖², so min(M, 1, N)/2.
        ((3, 1, 1, 2), 0, (F(1, 2), 1)),
        ((1, 1, 1, 2), 0, (F(1, 2), 2)),
        ((2, 1, 1, 2), 1, (F(3, 2), 1)),  # a truth of rank one: the regular manifold, M + N − 1
        # All layers of a truth of full rank are regular up to the gauge: n² numbers count.
        ((2, 2, 2, 2), 2, (F(2), 1)),
        ((3, 3, 3, 3, 3), 3, (F(9, 2), 1)),
        # Very wide hidden layers: the product is free, MN/2.
        ((2, 9, 9, 2), 0, (F(2), 1)),
    ],
)
def test_deep_linear_by_hand(widths, rank, expected):
    assert deep_linear(widths, rank) == expected


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.data())
def test_deep_linear_bounds(widths, data):
    rank = data.draw(st.integers(0, min(widths)))
    value, multiplicity = deep_linear(widths, rank)
    m, n = widths[0], widths[-1]
    parameters = sum(a * b for a, b in itertools.pairwise(widths))
    assert F(rank * (m + n - rank), 2) <= value <= F(min(m * n, parameters), 2)
    assert multiplicity >= 1
    assert deep_linear(widths[::-1], rank) == (value, multiplicity)
    # A wider layer never makes the model simpler.
    i = data.draw(st.integers(1, max(1, len(widths) - 2)))
    if i < len(widths) - 1:
        wider = [w + (j == i) for j, w in enumerate(widths)]
        assert deep_linear(wider, rank).value >= value


@pytest.mark.parametrize(
    ("exponents", "prior", "expected"),
    [
        ((2,), None, (F(1, 2), 1)),  # a regular parameter
        ((2, 4), None, (F(1, 4), 1)),
        ((2, 2), None, (F(1, 2), 2)),
        ((4, 4, 2), None, (F(1, 4), 2)),
        ((2, 0), None, (F(1, 2), 1)),  # a parameter that does not matter
        ((2, 4), (0, 3), (F(1, 2), 1)),  # ∫ w^{4z+3} dw has its pole at −1
        ((2, 4), (0, 1), (F(1, 2), 2)),
    ],
)
def test_normal_crossings(exponents, prior, expected):
    assert normal_crossing(exponents, prior) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normal_crossing((0, 0)), "no zero"),
        (lambda: normal_crossing((2, -1)), ">= 0"),
        (lambda: normal_crossing((2.0,)), "integers"),
        (lambda: normal_crossing((2, 2), (0,)), "as many"),
        (lambda: reduced_rank(2, 1, 2, 2), "true_rank"),
        (lambda: reduced_rank(0, 1, 2, 0), ">= 1"),
        (lambda: deep_linear((3,), 0), "two or more"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
