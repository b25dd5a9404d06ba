"""The public interface changes only where a change is meant."""

import jaxinv
from tests import api


def test_the_public_interface_is_the_recorded_one():
    recorded = set(api.FILE.read_text(encoding="utf-8").splitlines())
    found = set(api.interface().splitlines())
    gone, new = sorted(recorded - found), sorted(found - recorded)
    assert not gone and not new, (
        f"gone: {gone}\nnew: {new}\n"
        "If that is meant, record it with `make api` and commit the diff."
    )


def test_every_public_name_is_documented():
    for name in jaxinv.__all__:
        assert getattr(jaxinv, name).__doc__, name
