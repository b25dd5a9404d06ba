"""The public interface changes only where a change is meant."""

import ast
import inspect
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxinv
from tests import api

FACE = Path(jaxinv.__file__)
REFERENCE = FACE.parent.parent / "docs" / "reference"


def test_the_public_interface_is_the_recorded_one():
    recorded = set(api.FILE.read_text(encoding="utf-8").splitlines())
    found = set(api.interface().splitlines())
    gone, new = sorted(recorded - found), sorted(found - recorded)
    assert not gone and not new, (
        f"gone: {gone}\nnew: {new}\n"
        "If that is meant, record it with `make api` and commit the diff."
    )


def test_names_at_the_top_are_those_of_the_packages():
    names = api.public_names()
    below = {home for name, home in names.items() if name.count(".") > 1}
    top = {name: home for name, home in names.items() if name.count(".") == 1}
    assert {n for n, home in top.items() if home not in below} == {"jaxinv.batch_first"}
    imports = [n for n in ast.parse(FACE.read_text()).body if isinstance(n, ast.ImportFrom)]
    imported = {a.name for n in imports if n.module.startswith("jaxinv.") for a in n.names}
    assert sorted(imported) == sorted(jaxinv.__all__) == sorted(set(jaxinv.__all__))


def _types_in(annotation) -> set[type]:
    found = {annotation} if isinstance(annotation, type) else set()
    return found.union(*map(_types_in, typing.get_args(annotation)))


def test_the_types_of_results_and_states_are_public():
    names = api.public_names()
    homes = set(names.values())
    for name in names:
        value = api.named(name)
        if inspect.isfunction(value):
            for result in _types_in(typing.get_type_hints(value).get("return")):
                own = result.__module__.startswith("jaxinv.")
                assert not own or f"{result.__module__}.{result.__name__}" in homes, (name, result)
    w, x = jaxinv.networks.init_mlp(jax.random.key(0), (2, 2, 1)), jnp.ones((1, 2))
    for optimizer in (
        jaxinv.scale_by_path_kappa(jaxinv.networks.mlp, x),
        jaxinv.scale_by_data_dependent_path_kappa(jaxinv.networks.mlp, alpha=0.5),
        jaxinv.scale_by_path_metric(jaxinv.networks.mlp, x),
        jaxinv.scale_by_natural_gradient(jaxinv.networks.mlp, "gaussian"),
    ):
        state = type(optimizer.init(w))
        assert f"{state.__module__}.{state.__name__}" in homes


def test_every_public_name_is_documented_and_has_a_page_of_the_reference():
    homes = set(api.public_names().values())
    for home in homes - {f"jaxinv.typing.{name}" for name in jaxinv.typing.__all__}:
        assert api.named(home).__doc__, home  # an alias of a type cannot hold one
    if not REFERENCE.is_dir():
        pytest.skip("the documentation is not in this tree")
    pages = "".join(page.read_text() for page in REFERENCE.glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, re.M)
    assert len(shown) == len(set(shown))
    missing = {h for h in homes if not {h, h.rpartition(".")[0]} & set(shown)}
    empty = {s for s in shown if not any(h == s or h.rpartition(".")[0] == s for h in homes)}
    assert not missing and not empty
