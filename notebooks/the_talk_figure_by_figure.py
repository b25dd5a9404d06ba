# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Path-normalised optimization, figure by figure
#
# Seven steps from "two weight vectors, one function" to "is that all?", each with a figure that is
# computed here, on the digits of scikit-learn, with a network 64-32-32-10.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from jaxinv import (
    degrees_of_freedom,
    jacobian,
    jacobian_rank,
    path_kappa,
    path_sgd,
    random_rescaling,
    rescale,
    rescaling_group,
    weight_normalize,
)
from jaxinv.networks import init_mlp, mlp
from jaxinv.reparam import in_gauge

SHORT = os.environ.get("JAXINV_SHORT") == "1"  # smaller and fewer steps, as the tests run it
WIDTH, STEPS, DRAWS = (4, 5, 8) if SHORT else (32, 150, 60)
data = load_digits()
x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
x, y = (x[:200], y[:200]) if SHORT else (x[:1000], y[:1000])
balanced = init_mlp(jax.random.key(0), (64, WIDTH, WIDTH, 10))

# %% [markdown]
# ## 1. One function, many weights
#
# Multiply what comes into a ReLU unit by $c > 0$ and divide what goes out by $c$:
#
# $$c^{-1}\, w_\mathrm{out} \max(0,\, c\, w_\mathrm{in}^\top x) =
# w_\mathrm{out} \max(0,\, w_\mathrm{in}^\top x)$$
#
# A quarter of the units of each layer is scaled by about ten. The weights change by orders of
# magnitude, the function by rounding.

# %%
group = rescaling_group(mlp, balanced, x)
u = random_rescaling(group, jax.random.key(1), kind="unbalanced", units=WIDTH // 4)
unbalanced = rescale(group, balanced, u)
before, after = mlp(balanced, x), mlp(unbalanced, x)
print("largest change of an output:", jnp.abs(after - before).max())
assert jnp.allclose(after, before, rtol=1e-4, atol=1e-4)

# %% alt="Left: weights after against before, on bands parallel to the diagonal, up to orders of magnitude away from it. Right: outputs after against before, all on the diagonal."
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for name in balanced:
    old, new = (jnp.abs(w[name]["kernel"]).ravel() for w in (balanced, unbalanced))
    panels[0].loglog(old, new, ".", ms=2, label=name)
panels[0].set(xlabel="|weight|, balanced", ylabel="|weight|, unbalanced", xlim=(1e-3, 3))
panels[0].legend(markerscale=4)
panels[1].plot(before[:100].ravel(), after[:100].ravel(), ".", ms=2, color="C3")
_ = panels[1].set(xlabel="output, balanced", ylabel="output, unbalanced")

# %% [markdown]
# ## 2. SGD notices, Path-SGD does not
#
# From the two starts, with the same data and rate. SGD follows the Euclidean geometry of the weights,
# in which the two starts are far apart and have different gradients. Path-SGD divides the gradient
# of each weight by its $\kappa$ (next section), $\Delta w_e = -\eta\, \kappa_e^{-1}\, \partial L /
# \partial w_e$, and takes the same steps in function space.


# %%
def loss(params, fn=mlp):
    """Cross-entropy on the digits."""
    return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y).mean()


def curve(optimizer, params, fn=mlp):
    """Training losses of full-batch steps."""

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, fn)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(
        lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, STEPS)[1]
    )(params)


starts = {"balanced": balanced, "unbalanced": unbalanced}


def draw(panel, title, curves):
    """One curve for each start."""
    for (name, values), line in zip(curves.items(), ("-", "--"), strict=True):
        panel.plot(values, line, label=name)
    panel.set(title=title, xlabel="step", ylim=(0, 4))


def gap(curves):
    """Largest difference of the two curves."""
    return float(abs(curves["balanced"] - curves["unbalanced"]).max())


sgd = {name: curve(optax.sgd(0.1), start) for name, start in starts.items()}
path = {name: curve(path_sgd(0.1, mlp, x), start) for name, start in starts.items()}
print(f"largest gap of the two curves: SGD {gap(sgd):.1e}, Path-SGD {gap(path):.1e}")
assert gap(path) < 1e-3 and not gap(sgd) < 0.01  # NaN where SGD diverges

# %% alt="Training loss against steps. SGD: the curve of the unbalanced start differs from that of the balanced one. Path-SGD: the two curves lie on each other."
figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
draw(panels[0], "SGD", sgd)
draw(panels[1], "Path-SGD", path)
panels[0].set_ylabel("training loss")
_ = panels[0].legend()

# %% [markdown]
# ## 3. κ by one forward and one backward pass
#
# The squared path norm $\gamma^2 = \sum_\text{paths} \prod_{e \in \text{path}} w_e^2$ has as many terms
# as the network has paths. It is also one forward pass: all inputs 1, all weights squared, no ReLU.
# Its derivative with respect to the squared weights, one backward pass, is
#
# $$\kappa_e = \frac{\partial \gamma^2}{\partial w_e^2} =
# \sum_{\text{paths} \ni e}\ \prod_{e' \in \text{path} \setminus e} w_{e'}^2 .$$


# %%
def gamma_squared(squares):
    """Sum over all paths of a network without ReLU."""
    return mlp(squares, jnp.ones((1, 64)), activation=lambda h: h).sum()


by_hand = jax.grad(gamma_squared)(jax.tree.map(jnp.square, balanced))
kappa = path_kappa(mlp, balanced, x)
kappa_there = path_kappa(mlp, unbalanced, x)
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), by_hand, kappa)))

# %% [markdown]
# If a weight is multiplied by $c_e$, its $\kappa$ is divided by $c_e^2$. So $\kappa_e w_e^2$, the share
# of the paths through $e$, stays.

# %% alt="Left: κ by hand against path_kappa, on the diagonal. Right: κ at the unbalanced start against the balanced one spreads over decades; κ times the squared weight lies on the diagonal."
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
flat = [np.concatenate([np.ravel(v["kernel"]) for v in k.values()])
        for k in (by_hand, kappa, kappa_there, balanced, unbalanced)]  # fmt: skip
panels[0].plot(flat[0], flat[1], ".", ms=3)
panels[0].set(xlabel="κ by hand", ylabel="path_kappa")
panels[1].loglog(flat[1], flat[2], ".", ms=2, label="κ")
panels[1].loglog(flat[1] * flat[3] ** 2, flat[2] * flat[4] ** 2, ".", ms=2, label="κ w²")
panels[1].set(xlabel="balanced", ylabel="unbalanced")
panels[1].legend(markerscale=4)
assert np.allclose(flat[1] * flat[3] ** 2, flat[2] * flat[4] ** 2, rtol=1e-3)

# %% [markdown]
# ## 4. When is an algorithm invariant?
#
# With $w = w(\theta)$, a step in $\theta$ must be the same step as one in $w$:
# $\Delta w = (\partial w / \partial\theta)\, \Delta\theta$. Here $\theta$ are the balanced weights,
# $w$ the unbalanced ones, and $\partial w/\partial\theta$ is the rescaling itself. Gradient descent
# misses by $(\partial w/\partial\theta)(\partial w/\partial\theta)^\top$, the square of each factor.


# %%
def one_step(optimizer, params):
    """Δ of the parameters."""
    return optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)[0]


def flattened(tree):
    """All kernels as one vector."""
    return np.concatenate([np.ravel(layer["kernel"]) for layer in tree.values()])


steps = {}
for name, optimizer in {"SGD": optax.sgd(0.1), "Path-SGD": path_sgd(0.1, mlp, x)}.items():
    in_w, in_theta = one_step(optimizer, unbalanced), one_step(optimizer, balanced)
    steps[name] = flattened(in_w), flattened(rescale(group, in_theta, u))
    error = np.linalg.norm(steps[name][0] - steps[name][1]) / np.linalg.norm(steps[name][0])
    print(f"{name}: |Δw − (∂w/∂θ)Δθ| / |Δw| = {error:.1e}")
    assert (error < 1e-4) == (name == "Path-SGD")

# %% alt="Step in w against the image of the step in θ, for each weight. SGD: bands away from the diagonal, by the square of the factors. Path-SGD: all on the diagonal."
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
for panel, (name, (in_w, image)) in zip(panels, steps.items(), strict=True):
    panel.loglog(np.abs(image), np.abs(in_w), ".", ms=2)
    panel.set(title=name, xlabel="|(∂w/∂θ) Δθ|", xlim=(1e-7, 1), ylim=(1e-7, 1))
_ = panels[0].set_ylabel("|Δw|")

# %% [markdown]
# ## 5. Degrees of freedom are a rank
#
# How many directions does the function have, whatever the weights are called? The rank of its
# Jacobian. For 64-32-32-10 on generic inputs each hidden unit costs one direction, and nothing else
# does: $3466 = 3402 + 64$.

# %%
generic = jax.random.normal(jax.random.key(2), (400 if SHORT else 1000, 64))
found = degrees_of_freedom(mlp, balanced, generic, method="certificate")
print(found)
assert found.certain and found.rank == found.parameters - 2 * WIDTH
assert SHORT or (found.parameters, found.rank, found.rescaling) == (3466, 3402, 64)

# %% [markdown]
# That was a proof by a Cholesky factorisation, without a spectrum. The spectrum of a network half as
# wide shows the same as a cliff.

# %%
units = max(WIDTH // 2, 4)
half = jax.tree.map(np.float64, init_mlp(jax.random.key(0), (64, units, units, 10)))
with jax.enable_x64(True):
    J = np.asarray(jacobian(mlp, half, np.asarray(generic[:400], np.float64)))
spectrum = np.linalg.svd(J, compute_uv=False)
rank = len(spectrum) - 2 * units
print(f"σ_{rank} = {spectrum[rank - 1]:.1e}, σ_{rank + 1} = {spectrum[rank]:.1e}")
assert spectrum[rank - 1] > 1e8 * spectrum[rank]

# %% alt="Singular values of the Jacobian, on a logarithmic scale: a slow descent, then at the number of parameters less the number of hidden units a cliff of many decades."
figure, panel = plt.subplots(figsize=(7, 3), layout="constrained")
panel.semilogy(np.arange(1, len(spectrum) + 1), spectrum, ".", ms=3)
panel.axvline(
    rank + 0.5, color="gray", linestyle=":", label=f"{len(spectrum)} − {2 * units} = {rank}"
)
panel.set(xlabel="number of the singular value", ylabel="singular value of J")
_ = panel.legend()

# %% [markdown]
# ## 6. Good parametrisations
#
# Instead of an optimizer that does not see the symmetry, a parametrisation that does not have it. Of
# every orbit take the member whose hidden units have incoming weights of norm 1: step there and
# carry the step back (`in_gauge`), or let the network use $v/\lVert v \rVert$ (`weight_normalize`).
# Plain SGD does not tell the starts apart any more.

# %%
gauged = {name: curve(in_gauge(optax.sgd(0.1), group), start) for name, start in starts.items()}
net = weight_normalize(mlp, group)
normalised = {
    name: curve(optax.sgd(0.1), net.from_params(start), net.fn) for name, start in starts.items()
}
print(f"largest gap: in the gauge {gap(gauged):.1e}, weight-normalised {gap(normalised):.1e}")
assert max(gap(gauged), gap(normalised)) < 1e-2

# %% alt="Training loss against steps of SGD in the weights, in the gauge of unit norm, and in weight-normalised parameters. Only in the first do the two starts differ."
figure, panels = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
draw(panels[0], "SGD in w", sgd)
draw(panels[1], "SGD in the gauge", gauged)
draw(panels[2], "SGD in v, w = v/‖v‖", normalised)
panels[0].set_ylabel("training loss")
_ = panels[0].legend()

# %% [markdown]
# ## 7. Is node-wise rescaling all we should worry about?
#
# For the wide layers of section 5 nothing was left over. For narrow ones often something is. Here are
# random networks 4-3-3-2, with biases 0 and random, on 300 normal inputs. A unit may be silent on all of
# them, and two units that fire on all of them mix linearly. So some draws have fewer degrees of
# freedom than parameters less rescalings.

# %%
inputs = jax.random.normal(jax.random.key(3), (300, 4))


def hidden(bias_std):
    """Degrees of freedom missing beyond the rescalings, for many draws at once."""
    keys = jax.random.split(jax.random.key(4), DRAWS)
    draws = jax.vmap(lambda key: init_mlp(key, (4, 3, 3, 2), bias_std=bias_std))(keys)
    found = jax.vmap(lambda w: jacobian_rank(mlp, w, inputs, method="svd"))(draws)
    print(f"biases of std {bias_std}: {int(found.certain.sum())} of {DRAWS} ranks are certain")
    return (4 + 1) * 3 + (3 + 1) * 3 + (3 + 1) * 2 - 6 - np.asarray(found.rank)


missing = {std: hidden(std) for std in (0.0, 1.0)}
for std, counts in missing.items():
    print(f"biases of std {std}: something is missing in {np.mean(counts > 0):.0%}")
    assert counts.min() >= 0  # rescalings are always there
    assert counts.max() > 0

# %% alt="Histogram of the number of missing degrees of freedom beyond rescalings, for zero and for random biases. Many draws miss none, many miss several."
figure, panel = plt.subplots(figsize=(7, 3), layout="constrained")
bins = np.arange(max(c.max() for c in missing.values()) + 2) - 0.5
panel.hist(list(missing.values()), bins=bins, label=[f"biases of std {s:.0f}" for s in missing])
panel.set(xlabel="parameters − rescalings − rank", ylabel="number of networks")
_ = panel.legend()

# %% [markdown]
# More of this, on trained and on deep networks, is what
# [`jaxinv reproduce discussion`](../experiments.md#is-rescaling-all) measures, and
# [How many degrees of freedom has your network?](degrees_of_freedom_of_your_network.md) names the
# dead units and the hidden directions.
