"""What is compiled: a call with numbers is few programs, and the next one like it none."""

import jax
import jax.numpy as jnp
import pytest

import jaxinv
from jaxinv import networks

SIZES = (5, 16, 12, 3)  # 335 parameters: ranks try the certificate first
W = networks.init_mlp(jax.random.key(0), SIZES, bias_std=0.1)
X = jax.random.normal(jax.random.key(1), (120, 5))

COMPILED: list[str] = []


def count(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(count)


def fresh(w, x):
    """The network as a new function, as a user's closure is at every call."""
    return networks.mlp(w, x)


CALLS = {
    "path_norm": lambda fn: jaxinv.path_norm(fn, W, X),
    "log_path_norm": lambda fn: jaxinv.log_path_norm(fn, W, X),
    "unit_path_norms": lambda fn: jaxinv.unit_path_norms(fn, W, X),
    "path_kappa": lambda fn: jaxinv.path_kappa(fn, W, X),
    "data_dependent_path_norm": lambda fn: jaxinv.data_dependent_path_norm(fn, W, X, alpha=0.5),
    "data_dependent_path_kappa": lambda fn: jaxinv.data_dependent_path_kappa(fn, W, X, alpha=0.5),
    "jacobian": lambda fn: jaxinv.jacobian(fn, W, X),
    "jacobian_gram": lambda fn: jaxinv.jacobian_gram(fn, W, X),
    "tangent_kernel": lambda fn: jaxinv.tangent_kernel(fn, W, X[:20]),
    "jacobian_rank": lambda fn: jaxinv.jacobian_rank(fn, W, X),
    "degrees_of_freedom": lambda fn: jaxinv.degrees_of_freedom(fn, W, X),
    "balance": lambda fn: jaxinv.balance(jaxinv.rescaling_group(fn, W, X), W),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_network_again_compiles_nothing(name):
    CALLS[name](lambda w, x: fresh(w, x))
    COMPILED.clear()
    CALLS[name](lambda w, x: fresh(w, x))
    assert len(COMPILED) == 0


@pytest.mark.parametrize("name", ["path_norm", "path_kappa", "jacobian", "jacobian_gram"])
def test_a_first_call_is_one_program(name):
    jax.clear_caches()
    jnp.zeros(())  # asked whether a transformation is under way
    COMPILED.clear()
    CALLS[name](fresh)
    assert len(COMPILED) == 1


def test_another_network_of_the_same_shapes_is_another_program():
    def other(w, x):
        return 2 * networks.mlp(w, x)

    once, twice = jaxinv.path_norm(fresh, W, X), jaxinv.path_norm(other, W, X)
    assert jnp.allclose(twice, 2 * once, rtol=1e-5)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_whole_calls_inside_of_transformations_give_the_same(transform):
    weights = jax.tree.map(lambda a: a[None], W) if transform is jax.vmap else W
    found = transform(lambda w: jaxinv.path_norm(networks.mlp, w, X))(weights)
    assert jnp.allclose(found.squeeze(), jaxinv.path_norm(networks.mlp, W, X), rtol=1e-5)


def test_an_ensemble_has_the_ranks_of_its_members():
    keys = jax.random.split(jax.random.key(2), 6)
    ensemble = jax.vmap(lambda k: networks.init_mlp(k, SIZES, bias_std=0.1))(keys)
    # A dead unit in one member: the certificate proves some of the ranks, not all.
    bias = ensemble["Dense_0"]["bias"]
    ensemble["Dense_0"]["bias"] = bias.at[2, 0].set(-100.0)
    ranks = jax.vmap(lambda w: jaxinv.jacobian_rank(networks.mlp, w, X).rank)(ensemble)
    proven = jaxinv.jacobian_rank(networks.mlp, W, X, method="certificate").rank
    alone = [
        int(jaxinv.jacobian_rank(networks.mlp, jax.tree.map(lambda a, i=i: a[i], ensemble), X).rank)
        for i in range(6)
    ]
    assert ranks.tolist() == alone
    assert proven > 0 and min(alone) < max(alone)


def test_an_update_outside_of_jit_compiles_few_programs_once():
    tx = jaxinv.path_sgd(0.1, networks.mlp, X[:1], momentum=0.9)
    gradient = jax.tree.map(jnp.ones_like, W)
    state = tx.init(W)
    jax.clear_caches()
    COMPILED.clear()
    _, state = tx.update(gradient, state, W)
    # κ is one; a quotient, its value and the momentum for each of at most six shapes.
    assert len(COMPILED) < 40
    COMPILED.clear()
    tx.update(gradient, state, W)
    assert len(COMPILED) == 0
