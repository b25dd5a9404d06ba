# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Is your optimizer invariant?
#
# An optimizer is invariant to a change of parameters $w = w(\theta)$ if a step in $\theta$ is the
# same step as one in $w$, to first order:
#
# $$\Delta w = \frac{\partial w}{\partial \theta}\, \Delta\theta$$
#
# Here an optimizer of our own is tested against the changes that a ReLU network does not notice,
# the rescalings of its units, and then mended in two ways.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits

from jaxinv import (
    equivariance_error,
    gradient_orthogonality,
    path_kappa,
    path_sgd,
    random_rescaling,
    rescaling_group,
)
from jaxinv.invariance import by_rescaling
from jaxinv.networks import init_mlp, mlp
from jaxinv.reparam import in_gauge

SHORT = os.environ.get("JAXINV_SHORT") == "1"  # smaller and fewer steps, as the tests run it
HIDDEN, STEPS = ((8,), 5) if SHORT else ((32, 32), 60)
data = load_digits()
x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
x, y = (x[:100], y[:100]) if SHORT else (x[:1000], y[:1000])
params = init_mlp(jax.random.key(0), (64, *HIDDEN, 10))


def loss(params):
    """Cross-entropy on the digits."""
    return optax.softmax_cross_entropy_with_integer_labels(mlp(params, x), y).mean()


# %% [markdown]
# ## An optimizer of our own
#
# Layers have gradients of different sizes, so let each array of weights take steps of one length:
# divide its gradient by a running mean of its norm. Whatever has an `init` and an `update` is an
# optax transformation, and can be tested.


# %%
def scale_by_layer(decay=0.9):
    """Gradient of each array over a running mean of its norm."""

    def init(params):
        return jax.tree.map(lambda w: jnp.zeros(()), params), jnp.zeros((), int)

    def update(gradient, state, params=None):
        means, count = state
        means = jax.tree.map(
            lambda m, g: decay * m + (1 - decay) * jnp.linalg.norm(g), means, gradient
        )
        seen = 1 - decay ** (count + 1.0)
        return jax.tree.map(lambda g, m: g * seen / m, gradient, means), (means, count + 1)

    return optax.GradientTransformation(init, update)


ours = optax.chain(scale_by_layer(), optax.scale(-0.03))

# %% [markdown]
# ## The test
#
# `rescaling_group` reads off the network which rescalings it has: one per hidden unit.
# `random_rescaling` draws one, here with factors that are powers of two, which floating-point
# numbers carry without rounding. `equivariance_error` runs the optimizer on both sides, and gives
# $|\Delta w - (\partial w/\partial\theta)\Delta\theta|$ relative to the larger of the two steps.

# %%
group = rescaling_group(mlp, params, x)
u = random_rescaling(group, jax.random.key(1), kind="power_of_two")
move = by_rescaling(group, u, base=2)
print(group.dim, "rescalings, factors from", 2.0 ** float(u.min()), "to", 2.0 ** float(u.max()))


def test(optimizer):
    """Compare both sides over some steps."""
    return equivariance_error(optimizer, loss, params, move, steps=STEPS)


others = {"SGD": optax.sgd(0.1), "AdaGrad": optax.adagrad(0.03), "Adam": optax.adam(0.003)}
others = {"SGD": others["SGD"]} if SHORT else others
compared = {"ours": ours, **others, "Path-SGD": path_sgd(0.1, mlp, x)}
tested = {name: test(optimizer) for name, optimizer in compared.items()}
for name, error in tested.items():
    print(f"{name:10s} first step {error.first_step:.1e}, after {STEPS} {error.weights[-1]:.1e}")

# %% [markdown]
# Ours takes steps of one length on both sides, but a rescaling changes the share of each unit in the
# norm of its layer, and the gradient itself is divided by what the weight was multiplied by. Path-SGD
# alone passes.

# %%
assert tested["Path-SGD"].first_step < 1e-6
assert all(tested[name].first_step > 0.1 for name in ("ours", *others))

# %% [markdown]
# The losses of the two runs show what that means. They start as the same function, and nothing but
# the optimizer tells them apart.

# %% alt="Loss against steps for ours, SGD, AdaGrad, Adam and Path-SGD, each from the two sides of a rescaling. The two curves of Path-SGD lie on each other, those of the others do not."
figure, panels = plt.subplots(1, len(tested), figsize=(12, 2.8), sharey=True, layout="constrained")
for panel, (name, error) in zip(panels, tested.items(), strict=True):
    panel.plot(error.loss, label="in w, rescaled")
    panel.plot(error.other_loss, "--", label="in θ, as drawn")
    panel.set(title=name, xlabel="step", ylim=(0, 4))
panels[0].set_ylabel("training loss")
_ = panels[0].legend()

# %% [markdown]
# ## First way: step in a gauge
#
# Every orbit of the group has one member whose hidden units have incoming weights of norm 1.
# `in_gauge` carries the gradient there, lets the optimizer step, and carries the step back. Both
# sides have the same member, hence the same step. Any optimizer becomes invariant in this way, and
# its state lives in the gauge.

# %%
in_gauges = {"ours": ours} if SHORT else {"ours": ours, "Adam": optax.adam(0.003)}
mended = {f"{name} in gauge": test(in_gauge(tx, group)) for name, tx in in_gauges.items()}

# %% [markdown]
# ## Second way: think about how things transform
#
# If weight $w_e$ becomes $c_e w_e$, its gradient $g_e$ becomes $g_e / c_e$, and $\kappa_e$, the sum
# over paths through $e$ of the squared other weights, becomes $\kappa_e / c_e^2$. So $g_e/\kappa_e$
# transforms like a weight and may be added to one. The length of a step must be divided by something
# that does not transform at all. The norm of $g$ does; $\sum_e g_e^2/\kappa_e$ does not. This is an
# invariant optimizer with the property that we wanted, steps of one length:
#
# $$\Delta w_e = -\eta\, \frac{g_e/\kappa_e}{\sqrt{\sum_{e'} g_{e'}^2/\kappa_{e'}}}$$


# %%
def scale_by_path_length(fn, x):
    """Gradient over κ, divided by its length √Σg²/κ."""

    def update(gradient, state, params):
        step = jax.tree.map(lambda g, k: g / k, gradient, path_kappa(fn, params, x))
        length = jnp.sqrt(optax.tree.vdot(gradient, step))
        return jax.tree.map(lambda s: s / length, step), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


normalised = optax.chain(scale_by_path_length(mlp, x), optax.scale(-0.1))
mended["ours by paths"] = test(normalised)
for name, error in mended.items():
    print(f"{name:14s} first step {error.first_step:.1e}, after {STEPS} {error.weights[-1]:.1e}")
    assert error.first_step < 1e-5

# %% alt="Error of the first step on a logarithmic scale: ours, SGD, AdaGrad and Adam are of order 1; Path-SGD, ours and Adam in the gauge, and ours by paths are at the rounding of float32."
everything = {**tested, **mended}
floor = jnp.finfo(jnp.float32).eps / 10  # an error of exactly 0 is drawn here
figure, panel = plt.subplots(figsize=(7, 3), layout="constrained")
panel.barh(list(everything), [max(float(e.first_step), floor) for e in everything.values()],
           left=floor / 2, color=["C0"] * len(tested) + ["C2"] * len(mended))  # fmt: skip
panel.axvline(jnp.finfo(jnp.float32).eps, color="gray", linestyle=":", label="rounding of float32")
panel.set(xscale="log", xlabel="|Δw − (∂w/∂θ)Δθ| / |Δw|", xlim=(floor / 2, 3))
panel.invert_yaxis()
_ = panel.legend()

# %% [markdown]
# ## Weight decay: in the step or in the loss?
#
# A decay $-\lambda w_e$ in the step transforms like a weight: Path-SGD with decoupled decay is still
# invariant. A penalty $\tfrac{\lambda}{2}\lVert w \rVert^2$ in the loss is another matter. There the
# loss itself depends on the member of the orbit, and no optimizer can mend that.
# `equivariance_error` does not look for it, as it takes the same loss $L(w(\theta))$ on both sides.
# `gradient_orthogonality` does: the gradient of a loss that rescaling leaves alone is orthogonal to
# every orbit.

# %%
decayed = optax.chain(path_sgd(1.0, mlp, x), optax.add_decayed_weights(-0.001), optax.scale(0.1))
in_step = test(decayed).first_step
print(f"decoupled decay: error {in_step:.1e}")
assert in_step < 1e-6


def penalised(params):
    """The loss with an L2 penalty."""
    return loss(params) + 0.005 * optax.tree.vdot(params, params)


there = move(params)
cosines = {
    "loss": abs(gradient_orthogonality(loss, there, group).cosines),
    "loss + penalty": abs(gradient_orthogonality(penalised, there, group).cosines),
}
for name, values in cosines.items():
    print(f"{name:15s} largest |cosine| {values.max():.1e}, median {jnp.median(values):.1e}")
assert cosines["loss"].max() < 1e-5 < 1e-2 < cosines["loss + penalty"].max()

# %% alt="Cosine between gradient and tangent of the orbit for each hidden unit, sorted, on a logarithmic scale. For the loss all are below one in a million, with the penalty nearly all are many decades larger."
figure, panel = plt.subplots(figsize=(7, 3), layout="constrained")
for name, values in cosines.items():
    panel.semilogy(jnp.sort(jnp.maximum(values, 1e-14))[::-1], ".-", label=name)
panel.set(xlabel="hidden unit, sorted", ylabel="|cosine| of gradient\nand orbit")
_ = panel.legend()

# %% [markdown]
# What this does not say: invariance is not speed. It says that the result does not depend on how
# the weights of the start are distributed between the layers; which optimizer ends lowest is
# [another question](../geometry.md). The same test for the optimizers of optax is
# [a table](../optimizers.md).
