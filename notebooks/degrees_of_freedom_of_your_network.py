# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # How many degrees of freedom has your network?
#
# A function $f(w, x)$ can change, to first order, in as many independent ways as the rank of its
# Jacobian over enough inputs:
#
# $$d = \operatorname{rank} \frac{\partial f}{\partial w} + \text{rescalings} + \text{dead} +
# \text{unexplained}$$
#
# Everything else of the $d$ parameters is an ambiguity, and most of it has a name. The network here
# is a small residual one in flax; put yours in its place.

# %%
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from jaxinv import (
    degrees_of_freedom,
    jacobian,
    jacobian_rank,
    rescaling_group,
)
from jaxinv.networks import init_mlp, mlp
from jaxinv.ranks import dead_names

SHORT = os.environ.get("JAXINV_SHORT") == "1"  # a smaller network, as the tests run it
CHANNELS, IMAGES = (2, 80) if SHORT else (4, 250)
digits = jnp.asarray(load_digits().data / 16, jnp.float32)


class Net(nn.Module):
    """A convolution, a residual block, a mean over positions, a read-out."""

    @nn.compact
    def __call__(self, x):
        """Logits of ten classes."""
        h = nn.relu(nn.Conv(CHANNELS, (3, 3), name="stem")(x))
        branch = nn.relu(nn.Conv(CHANNELS, (3, 3), name="first")(h))
        h = nn.relu(h + nn.Conv(CHANNELS, (3, 3), name="second")(branch))
        return nn.Dense(10, name="readout")(h.mean((1, 2)))


def fn(params, x):
    """The function whose freedom is counted."""
    return Net().apply({"params": params}, x)


x = digits[:IMAGES].reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))  # 4 × 4 pixels
params = Net().init(jax.random.key(0), x[:1])["params"]

# %% [markdown]
# ## Symmetries, read off the program
#
# A residual connection adds two arrays, so both must be scaled alike: the stem and the second
# convolution share one factor per channel, and the channels inside the block have their own.

# %%
group = rescaling_group(fn, params, x)
print(group.dim, "rescalings, for example")
print(group.names[0])
print(group.names[-1])
assert group.dim == 2 * CHANNELS

# %% [markdown]
# ## The account

# %%
found = degrees_of_freedom(fn, params, x)
print(found)
assert (
    found.parameters == found.rank + found.rescaling + found.dead + found.unexplained + found.unseen
)
assert found.rescaling == group.dim and found.unexplained == 0 and found.certain

# %% [markdown]
# ## What is certain, and what is not
#
# A computed singular value is never exactly zero. The spectrum has a cliff, and in float64 it is
# deep: nothing lies between the last value that counts and rounding. In float32 the bottom of the
# cliff is much closer to the last value that counts.

# %%
with jax.enable_x64(True):
    J = np.asarray(jacobian(fn, jax.tree.map(np.float64, params), np.asarray(x, np.float64)))
spectra = {
    "float64": np.linalg.svd(J, compute_uv=False),
    "float32": np.linalg.svd(np.asarray(jacobian(fn, params, x)), compute_uv=False),
}
rank = int(found.rank)
gaps = {name: float(s[rank - 1] / s[rank]) for name, s in spectra.items()}
print("the last value that counts over the next:", {k: f"{v:.1e}" for k, v in gaps.items()})
assert gaps["float64"] > 1e6 > gaps["float32"]

# %% alt="Singular values of the Jacobian on a logarithmic scale. In float64 they fall by many decades at the rank, in float32 by far fewer."
figure, panel = plt.subplots(figsize=(7, 3), layout="constrained")
for size, (name, s) in zip((6, 2), spectra.items(), strict=True):
    panel.semilogy(np.arange(1, len(s) + 1), np.maximum(s, 1e-18), ".", ms=size, label=name)
panel.axvline(rank + 0.5, color="gray", linestyle=":", label=f"rank {rank}")
panel.set(xlabel="number of the singular value", ylabel="singular value of J")
_ = panel.legend()

# %% [markdown]
# `certain` is a statement about two bounds. From below: a singular value above the error of
# the Jacobian proves a direction. From above: each rescaling and each dead parameter proves that one
# is missing. Where both meet, the rank is certain. In float64 a certificate was enough, a Cholesky
# factorisation of $J^\top J + TT^\top$ with the tangent vectors $T$ of the rescalings, and no
# singular value was computed. In float32 the error is larger: singular values below it prove nothing,
# and neither does one that is less than a decade above it. The rank may come out too small, and the
# result says that it is not certain.

# %%
single = jacobian_rank(fn, params, x, method="svd", dtype=np.float32)
for name, rests_on in {"float64": found.evidence, "float32": single}.items():
    print(f"{name}: rank {rests_on.rank}, proven {rests_on.lower} to {rests_on.upper}, "
          f"error {rests_on.error:.0e}, certain: {rests_on.certain}")  # fmt: skip
    assert rests_on.lower <= rank <= rests_on.upper
assert found.evidence.lower == found.evidence.upper == rank
assert single.certain or single.lower < rank

# %% [markdown]
# ## Are these inputs enough?
#
# The rank is one *on these inputs*. Ten outputs of $n$ images cannot show more than $10 n$
# directions. More rows of $J$ show more of them, until the rank stays. (`saturating_inputs` doubles
# their number until that happens; `jacobian_spectrum` gives singular values.)

# %%
numbers = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 192) if n < len(x)] + [len(x)]
ranks = [np.linalg.matrix_rank(J[: 10 * n], tol=1e-9 * spectra["float64"][0]) for n in numbers]
print(dict(zip(numbers, map(int, ranks), strict=True)))
assert ranks[0] == 10 and ranks[-2:] == [rank, rank]

# %% alt="Rank of the Jacobian against the number of images: at first ten for each image, then it bends and stays at the number of parameters less the rescalings."
figure, panel = plt.subplots(figsize=(7, 3), layout="constrained")
panel.plot(numbers, ranks, "o-", label="rank on the first n images")
panel.plot(numbers, np.minimum(10 * np.array(numbers), found.parameters), "--", color="gray",
           label="min(10 n, parameters)")  # fmt: skip
panel.axhline(rank, color="C2", linestyle=":", label="parameters − rescalings")
panel.set(xlabel="number of images n", ylabel="rank of J", xscale="log", yscale="log")
_ = panel.legend()

# %% [markdown]
# ## Dead units
#
# A channel whose bias is far below zero never fires. Its parameters change nothing: their columns of
# $J$ are zero, and they are named. The rescaling of a dead channel is no ambiguity of its own any
# more, so it is counted with them.

# %%
silent = jax.tree.map(lambda w: w, params)
silent["first"]["bias"] = params["first"]["bias"].at[1].set(-100.0)
dead = degrees_of_freedom(fn, silent, x)
print(dead)
# In channel 1 of the first convolution and out of it: 9 weights for each channel, and the bias.
assert dead.dead == 2 * 9 * CHANNELS + 1 and dead.rescaling == group.dim - 1

# %% [markdown]
# Inputs kill parameters too. Some pixels of the digits are always 0, and the weights behind them
# cannot be seen on these data, whatever the network. Directions that the images do not show either,
# but are not of a single weight, count as unexplained.

# %%
dense = init_mlp(jax.random.key(1), (64, 4 if SHORT else 8, 10))
on_digits = degrees_of_freedom(mlp, dense, digits[:IMAGES])
print(str(on_digits).splitlines()[0])
print(len(dead_names(on_digits.dead_mask)), "names, the first:", dead_names(on_digits.dead_mask)[0])
by_pixel = np.asarray(on_digits.dead_mask["Dense_0"]["kernel"]).all(1).reshape(8, 8)
never = np.asarray(digits[:IMAGES].max(0) == 0).reshape(8, 8)
assert (by_pixel == never).all() and never.any()

# %% alt="Left: mean image of the digits. Right: the pixels whose weights are all dead, at the left and right margin, where the mean image is black."
figure, panels = plt.subplots(1, 2, figsize=(5, 2.6), layout="constrained")
panels[0].imshow(digits.mean(0).reshape(8, 8), cmap="gray")
panels[0].set(title="mean image", xlabel="column", ylabel="row")
panels[1].imshow(by_pixel, cmap="Reds")
_ = panels[1].set(title="all weights dead", xlabel="column", ylabel="row")

# %% [markdown]
# ## Hidden ones
#
# What is left of the null space after rescalings and dead parameters is counted as unexplained, and
# `basis=True` returns its directions. Two units that are never cut off by their ReLU are linear on
# these inputs, and two linear units can be mixed by any invertible $2 \times 2$ matrix: beside their
# two rescalings there are two further directions. A bias after them takes up any constant that they
# add, which gives one more for each.

# %%
small = init_mlp(jax.random.key(2), (6, 5, 3), bias_std=0.1)
normal = jax.random.normal(jax.random.key(3), (200, 6))
small["Dense_0"]["bias"] = small["Dense_0"]["bias"].at[:2].set(50.0)  # units 0 and 1 always fire
linear = degrees_of_freedom(mlp, small, normal, basis=True)
print(linear)
assert linear.unexplained + linear.unseen == 2 + 2 == len(linear.basis) and linear.evidence.clear

# %% alt="Share of the unexplained directions in the incoming weights of each of five units: all of it is in units 0 and 1, nothing in the others."
direction = np.asarray(
    linear.basis
)  # (unexplained, parameters): Dense_0's bias, then its kernel, ...
incoming = (direction[:, :35] ** 2).sum(0).reshape(7, 5).sum(0)
figure, panel = plt.subplots(figsize=(5, 2.6), layout="constrained")
panel.bar(range(5), incoming)
panel.set(xlabel="hidden unit", ylabel="share of the\nhidden directions", xticks=range(5))
assert incoming[:2].min() > 0.1 and incoming[2:].max() < 1e-10

# %% [markdown]
# What the number does not say: it is local, at these parameters, and to first order. At a singular
# minimum the effective dimension can be smaller than any rank near it
# ([learning coefficients](../guides/learning-coefficients.md)). And what ranks cost for larger
# networks is under [Ranks at scale](../scale.md).
