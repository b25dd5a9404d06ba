"""The driver and the training loop that experiments share."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv.errors import InvalidInput
from jaxinv.experiments import resuming, training


@training.driver
def run(config, running):
    """Square one number."""
    thunks = {"one": lambda: {"value": config**2}}
    return resuming.compute({"squares": thunks}, *running)["squares"]["one"]["value"]


def test_a_driven_run_tells_how_far_it_is_and_computes_only_what_the_store_lacks():
    store, told = resuming.Store(), []
    assert run(3) == 9
    assert run(3, lambda *what: told.append(what), store) == 9
    assert told == [(0.0, "squares: one")]
    assert run(4, store=store) == 9  # what the store holds, whatever the config is
    assert (run.__name__, run.__doc__) == ("run", "Square one number.")
    assert list(inspect.signature(run).parameters) == ["config", "progress", "store"]


@pytest.mark.parametrize(("examples", "whole"), [(None, "(1437 images of digits)"), (50, "of 50 ")])
def test_a_batch_larger_than_the_training_set_is_refused(examples, whole):
    with pytest.raises(InvalidInput, match="a batch of 2000 is larger") as error:
        training.images(None, 2000, examples)
    assert whole in str(error.value)


def test_every_example_is_in_one_minibatch_of_an_epoch():
    rows = training.shuffled(jax.random.key(0), 10, 3)
    assert rows.shape == (3, 3) and len(set(rows.ravel().tolist())) == 9
    assert (rows != training.shuffled(jax.random.key(1), 10, 3)).any()


@pytest.mark.parametrize("warm_up", [False, True])
def test_training_is_the_loop_one_would_write(warm_up):
    optimizer = optax.sgd(0.1, momentum=0.5)
    rounds = [jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])]

    @jax.jit
    def descend(w, state, targets):
        return training.descend(lambda w, t: (w - t) ** 2, optimizer, w, state, targets)

    w = jnp.asarray(0.5)
    found = training.train(descend, float, w, optimizer.init(w), rounds, warm_up=warm_up)
    value, velocity, losses, measured = 0.5, 0.0, [], [0.5]
    for targets in np.array(rounds).tolist():
        for t in targets:
            losses.append((value - t) ** 2)
            velocity = 0.5 * velocity + 2 * (value - t)
            value -= 0.1 * velocity
        measured.append(value)
    np.testing.assert_allclose(np.concatenate(found.losses), losses, rtol=1e-5)
    np.testing.assert_allclose(found.measured, measured, rtol=1e-5)
    np.testing.assert_allclose(found.params, value, rtol=1e-5)
    assert len(found.seconds) == 2


def test_the_optimizer_sees_what_else_belongs_to_a_minibatch():
    def update(updates, state, params=None, *, batch):
        return batch - params, state

    optimizer = optax.GradientTransformationExtraArgs(lambda w: (), update)
    w, _, _ = training.descend(
        lambda w, t: w, optimizer, jnp.zeros(()), (), jnp.arange(3.0), extra=lambda t: {"batch": t}
    )
    assert w == 2
