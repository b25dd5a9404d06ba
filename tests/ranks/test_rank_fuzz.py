"""Ranks of networks of exactly known rank: what is certain is right, and plain ones are certain."""

import numpy as np
import pytest

from tests.ground_truth import rank_fuzz
from tests.ground_truth.rank_fuzz import DTYPES, PROVEN, fuzz, mlp, snippet, table


def assert_honest(report):
    assert not report.faults, "\n".join(map(snippet, report.faults[:3]))


@pytest.mark.slow  # the same kinds of networks, of two sizes, are in test_certainty.py
def test_no_rank_is_certain_and_wrong():
    report = fuzz(144, 1, methods=("auto", "gram"), dtypes=(np.float64,), of=(mlp,))
    assert_honest(report)
    for kind in PROVEN:
        assert report.share(kind, "auto", np.float64) >= 0.95


def test_the_fuzz_sees_a_rank_that_is_certain_and_wrong(monkeypatch):
    right = rank_fuzz.jacobian_rank

    def one_less(*arguments, **options):
        found = right(*arguments, **options)
        return found._replace(rank=found.rank - 1, certain=found.rank > 0)

    monkeypatch.setattr(rank_fuzz, "jacobian_rank", one_less)
    rank_fuzz.compiled.cache_clear()
    report = fuzz(4, 0, methods=("svd",), dtypes=(np.float32,), of=(mlp,), only=("plain",))
    rank_fuzz.compiled.cache_clear()
    assert report.faults and "true_rank(mlp, w, x)" in snippet(report.faults[0])
    assert "| plain | svd, compiled | float32 | 4 | 4 | 4 | 4 | 0 |" in table(report)


@pytest.mark.slow
def test_no_rank_of_five_thousand_networks_is_certain_and_wrong():
    report = fuzz(5000, 0)
    print(table(report))
    assert_honest(report)
    for kind in PROVEN:
        assert report.share(kind, "auto", np.float64) >= 0.95
    assert {key[2] for key in report.counts} == {np.dtype(t).name for t in DTYPES}
