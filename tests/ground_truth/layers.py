"""Small architectures, each described once and built twice.

A layer has two methods. `wire` grows the explicit graph of `enumerate_paths`, one loop over
elements per definition, and creates the layer's weights. `apply` is the same layer as a user would
write it, with ordinary jax, lax and flax calls, on a batch. Neither uses the other.

`nodes` is an array of node numbers with the shape of one example's activations.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.ground_truth.enumerate_paths import ONE, Dag, enumerate_paths


def _bias(dag, out, draw):
    """A weight per channel, an edge from the constant-1 node to every position."""
    ids = dag.weight(draw(out.shape[-1:]))
    for index in np.ndindex(out.shape):
        dag.connect(ONE, out[index], ids[index[-1]])
    return ids


def _each(dag, nodes, weight=None):
    """New nodes, each with one edge of the given weight from the old one."""
    out = dag.nodes(nodes.shape)
    for index in np.ndindex(nodes.shape):
        dag.connect(nodes[index], out[index], weight)
    return out


@dataclass(frozen=True)
class Dense:
    """y = x W + b on the last axis."""

    features: int
    bias: bool = True

    def wire(self, dag, nodes, draw):
        ids = {"kernel": dag.weight(draw((nodes.shape[-1], self.features)))}
        out = _matmul(dag, nodes, ids["kernel"])
        if self.bias:
            ids["bias"] = _bias(dag, out, draw)
        return out, ids

    def apply(self, w, x):
        return nn.Dense(self.features, use_bias=self.bias).apply({"params": w}, x)


def _matmul(dag, nodes, kernel):
    out = dag.nodes((*nodes.shape[:-1], kernel.shape[1]))
    for position in np.ndindex(nodes.shape[:-1]):
        for i, o in np.ndindex(kernel.shape):
            dag.connect(nodes[*position, i], out[*position, o], kernel[i, o])
    return out


def _pads(padding, n, size, stride, dilation):
    if padding == "VALID":
        return 0, 0
    if padding == "SAME":
        total = max((-(-n // stride) - 1) * stride + (size - 1) * dilation + 1 - n, 0)
        return total // 2, total - total // 2
    return padding


def _windows(n, size, stride, padding, dilation=1, input_dilation=1):
    """For every output position, the list of (tap, input position) inside the input."""
    stretched = (n - 1) * input_dilation + 1
    low, high = _pads(padding, stretched, size, stride, dilation)
    last = stretched + low + high - (size - 1) * dilation - 1
    windows = []
    for start in range(0, last + 1, stride):
        taps = [(k, start + k * dilation - low) for k in range(size)]
        windows.append(
            [
                (k, i // input_dilation)
                for k, i in taps
                if 0 <= i < stretched and i % input_dilation == 0
            ]
        )
    return windows


def _window_grid(shape, *args):
    """(output index, [(taps, input index)]) in one or two spatial dimensions."""
    per_axis = [_windows(n, *args) for n in shape]
    for index in np.ndindex(*map(len, per_axis)):
        lists = [axis[i] for axis, i in zip(per_axis, index, strict=True)]
        if len(lists) == 1:
            yield index, [((k,), (i,)) for k, i in lists[0]]
        else:
            yield index, [((k, m), (i, j)) for k, i in lists[0] for m, j in lists[1]]


@dataclass(frozen=True)
class Conv:
    """A convolution over all axes but the last, in one or two dimensions."""

    features: int
    size: int = 2
    stride: int = 1
    padding: Any = "VALID"
    dilation: int = 1
    input_dilation: int = 1
    groups: int = 1
    bias: bool = False

    def _geometry(self):
        return self.size, self.stride, self.padding, self.dilation, self.input_dilation

    def wire(self, dag, nodes, draw):
        *spatial, channels = nodes.shape
        taps = (self.size,) * len(spatial)
        kernel = dag.weight(draw((*taps, channels // self.groups, self.features)))
        windows = dict(_window_grid(spatial, *self._geometry()))
        out = dag.nodes((*np.add(max(windows), 1), self.features))
        ins, outs = channels // self.groups, self.features // self.groups
        for position, window in windows.items():
            for tap, source in window:
                for o in range(self.features):
                    group = o // outs
                    for i in range(ins):
                        dag.connect(
                            nodes[*source, group * ins + i], out[*position, o], kernel[*tap, i, o]
                        )
        ids = {"kernel": kernel}
        if self.bias:
            ids["bias"] = _bias(dag, out, draw)
        return out, ids

    def apply(self, w, x):
        rank = x.ndim - 2
        letters = "HW"[-rank:]
        layout = ("N" + letters + "C", letters + "IO", "N" + letters + "C")
        padding = self.padding
        y = lax.conv_general_dilated(
            x,
            w["kernel"],
            (self.stride,) * rank,
            padding if isinstance(padding, str) else (padding,) * rank,
            lhs_dilation=(self.input_dilation,) * rank,
            rhs_dilation=(self.dilation,) * rank,
            dimension_numbers=layout,
            feature_group_count=self.groups,
        )
        return y + w["bias"] if self.bias else y


@dataclass(frozen=True)
class Pool:
    """Average (edges of weight 1/k) or maximum (edges of weight one) over windows."""

    kind: str
    size: int = 2
    stride: int = 1
    padding: Any = "VALID"
    count_padding: bool = True

    def wire(self, dag, nodes, draw):
        *spatial, channels = nodes.shape
        windows = dict(_window_grid(spatial, self.size, self.stride, self.padding))
        out = dag.nodes((*np.add(max(windows), 1), channels))
        for position, window in windows.items():
            count = self.size ** len(spatial) if self.count_padding else len(window)
            weight = dag.weight(1 / count) if self.kind == "avg" else None
            for _, source in window:
                for c in range(channels):
                    dag.connect(nodes[*source, c], out[*position, c], weight)
        return out, {}

    def apply(self, w, x):
        rank = x.ndim - 2
        shape, strides = (self.size,) * rank, (self.stride,) * rank
        padding = self.padding if isinstance(self.padding, str) else (self.padding,) * rank
        if self.kind == "max":
            return nn.max_pool(x, shape, strides, padding)
        with jax.numpy_dtype_promotion("standard"):  # flax divides by a NumPy integer.
            return nn.avg_pool(x, shape, strides, padding, count_include_pad=self.count_padding)


@dataclass(frozen=True)
class AdaptivePool:
    """Averages over n windows from ⌊in/n⌋ to ⌈(i+1)n/out⌉ on axis 0, of unequal sizes."""

    outputs: int

    def _ranges(self, n):
        m = self.outputs
        return [(i * n // m, -((-(i + 1) * n) // m)) for i in range(m)]

    def wire(self, dag, nodes, draw):
        out = dag.nodes((self.outputs, *nodes.shape[1:]))
        for o, (start, stop) in enumerate(self._ranges(len(nodes))):
            weight = dag.weight(1 / (stop - start))
            for i in range(start, stop):
                for rest in np.ndindex(nodes.shape[1:]):
                    dag.connect(nodes[i, *rest], out[o, *rest], weight)
        return out, {}

    def apply(self, w, x):
        parts = [x[:, a:b].mean(axis=1) for a, b in self._ranges(x.shape[1])]
        return jnp.stack(parts, axis=1)


@dataclass(frozen=True)
class Gate:
    """A scalar activation that is linear on both sides of zero: the larger slope is the edge."""

    kind: str
    slope: float = 0.0

    def wire(self, dag, nodes, draw):
        if self.kind == "prelu":
            ids = dag.weight(draw(()) + 0.01)  # Never exactly one: the gate has a kink there.
            steep = abs(dag.weights[int(ids)]) > 1
            return _each(dag, nodes, ids if steep else None), {"negative_slope": ids}
        steepest = max(1.0, abs(self.slope))
        return _each(dag, nodes, dag.weight(steepest)), {}

    def apply(self, w, x):
        if self.kind == "prelu":
            return nn.PReLU().apply({"params": w}, x)
        return {
            "relu": jax.nn.relu,
            "flax relu": nn.relu,
            "maximum": lambda x: jnp.maximum(0.0, x),
            "abs": jnp.abs,
            "leaky": lambda x: jax.nn.leaky_relu(x, self.slope),
            "where": lambda x: jnp.where(x > 0, x, self.slope * x),
            "flipped where": lambda x: jnp.where(x < 0, x * self.slope, x),
        }[self.kind](x)


@dataclass(frozen=True)
class Residual:
    """x + f(x) or x - f(x), with a dense projection of x where f changes its width."""

    branch: tuple
    subtract: bool = False

    def wire(self, dag, nodes, draw):
        inner, ids = wire_all(self.branch, dag, nodes, draw)
        tree = {"branch": ids}
        if inner.shape != nodes.shape:
            tree["project"] = dag.weight(draw((nodes.shape[-1], inner.shape[-1])))
            nodes = _matmul(dag, nodes, tree["project"])
        out = dag.nodes(inner.shape)
        for index in np.ndindex(out.shape):
            dag.connect(nodes[index], out[index])
            dag.connect(inner[index], out[index])
        return out, tree

    def apply(self, w, x):
        y = apply_all(self.branch, w["branch"], x)
        x = x @ w["project"] if "project" in w else x
        return x - y if self.subtract else x + y


@dataclass(frozen=True)
class Concat:
    """[x, f(x)] along the last axis."""

    branch: tuple

    def wire(self, dag, nodes, draw):
        inner, ids = wire_all(self.branch, dag, nodes, draw)
        return np.concatenate([nodes, inner], axis=-1), ids

    def apply(self, w, x):
        return jnp.concatenate([x, apply_all(self.branch, w, x)], axis=-1)


@dataclass(frozen=True)
class FrozenBatchNorm:
    """scale · (x - mean) / sqrt(var + ε) + bias with given mean and variance."""

    epsilon: float = 1e-2

    def _statistics(self, n):
        return 0.5 * np.cos(1.0 + np.arange(n)), 0.5 + 0.7 * np.arange(n)

    def wire(self, dag, nodes, draw):
        mean, var = self._statistics(nodes.shape[-1])
        shift, inverse = dag.weight(-mean), dag.weight(1 / np.sqrt(var + self.epsilon))
        scale = dag.weight(draw(nodes.shape[-1:]))
        centred, divided, scaled = (dag.nodes(nodes.shape) for _ in range(3))
        for index in np.ndindex(nodes.shape):
            c = index[-1]
            dag.connect(nodes[index], centred[index])
            dag.connect(ONE, centred[index], shift[c])
            dag.connect(centred[index], divided[index], inverse[c])
            dag.connect(divided[index], scaled[index], scale[c])
        return scaled, {"scale": scale, "bias": _bias(dag, scaled, draw)}

    def apply(self, w, x):
        mean, var = self._statistics(x.shape[-1])
        stats = {"mean": jnp.asarray(mean, x.dtype), "var": jnp.asarray(var, x.dtype)}
        norm = nn.BatchNorm(use_running_average=True, epsilon=self.epsilon)
        return norm.apply({"params": w, "batch_stats": stats}, x)


@dataclass(frozen=True)
class Scale:
    """Multiply or divide: by a parameter per channel, or by a constant."""

    kind: str
    constant: float = 3.0

    def wire(self, dag, nodes, draw):
        if self.kind != "parameter":
            factor = self.constant if self.kind == "times" else 1 / self.constant
            return _each(dag, nodes, dag.weight(factor)), {}
        ids = dag.weight(draw(nodes.shape[-1:]))
        out = dag.nodes(nodes.shape)
        for index in np.ndindex(nodes.shape):
            dag.connect(nodes[index], out[index], ids[index[-1]])
        return out, {"scale": ids}

    def apply(self, w, x):
        if self.kind == "parameter":
            return w["scale"] * x
        return x * self.constant if self.kind == "times" else x / self.constant


@dataclass(frozen=True)
class Mix:
    """A reduction over an axis, or an operation in which each element may be the active one."""

    kind: str
    axis: int = -1

    def wire(self, dag, nodes, draw):
        nodes = np.moveaxis(nodes, self.axis, -1)
        n = nodes.shape[-1]
        outputs = {"sort": n, "top_k": 2, "maxout": n // 2}.get(self.kind, 1)
        weight = dag.weight(1 / n) if self.kind == "mean" else None
        out = dag.nodes((*nodes.shape[:-1], outputs))
        for *rest, o in np.ndindex(out.shape):
            # maxout compares element o with element o + n // 2; the others, all with all.
            sources = (o, o + n // 2) if self.kind == "maxout" else range(n)
            for i in sources:
                dag.connect(nodes[*rest, i], out[*rest, o], weight)
        out = out if self.kind in ("sort", "top_k", "maxout") else out[..., 0]
        return (out if out.ndim < nodes.ndim else np.moveaxis(out, -1, self.axis)), {}

    def apply(self, w, x):
        axis = self.axis if self.axis < 0 else self.axis + 1  # The batch comes first.
        if self.kind in ("mean", "sum", "max", "min", "sort"):
            return getattr(jnp, self.kind)(x, axis=axis)
        x = jnp.moveaxis(x, axis, -1)
        half = x.shape[-1] // 2
        if self.kind == "top_k":
            y = lax.top_k(x, 2)[0]
        else:
            y = jnp.maximum(x[..., :half], x[..., half : 2 * half])
        return jnp.moveaxis(y, -1, axis)


@dataclass(frozen=True)
class Rewire:
    """Elements moved, copied, dropped or padded with zeros: no edge has a weight."""

    kind: str

    def _move(self, xp, x, first):
        """The operation on arrays whose first `first` axes are not the example's."""
        axes = tuple(range(first, x.ndim))
        return {
            "flatten": lambda: x.reshape(*x.shape[:first], -1),
            "transpose": lambda: xp.transpose(x, (*range(first), *axes[::-1])),
            "reverse": lambda: xp.flip(x, axes[-1]),
            "roll": lambda: xp.roll(x, 1, axes[0]),
            "slice": lambda: x[..., 1:],
            "stride": lambda: x[..., ::2],
            "gather": lambda: xp.take(x, np.array([1, 0, 1]), axis=-1),
            "tile": lambda: xp.concatenate([x, x], axis=-1),
        }[self.kind]()

    def wire(self, dag, nodes, draw):
        if self.kind == "pad":
            padded = dag.nodes((*nodes.shape[:-1], nodes.shape[-1] + 2))
            padded[..., 1:-1] = nodes
            return padded, {}
        return self._move(np, nodes, 0), {}

    def apply(self, w, x):
        if self.kind == "pad":
            return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((1, 1),))
        return self._move(jnp, x, 1)


@dataclass(frozen=True)
class Recurrent:
    """hₜ = relu(xₜ U + hₜ₋₁ W + b) over axis 0, by lax.scan: every step shares its weights."""

    features: int
    every_state: bool = False

    def wire(self, dag, nodes, draw):
        d, f = nodes.shape[-1], self.features
        u, w, b = dag.weight(draw((d, f))), dag.weight(draw((f, f))), dag.weight(draw((f,)))
        states = []
        for t in range(len(nodes)):
            states.append(dag.nodes((f,)))
            for o in range(f):
                dag.connect(ONE, states[t][o], b[o])
                for i in range(d):
                    dag.connect(nodes[t, i], states[t][o], u[i, o])
                for i in range(f if t else 0):
                    dag.connect(states[t - 1][i], states[t][o], w[i, o])
        out = np.stack(states) if self.every_state else states[-1]
        return out, {"u": u, "w": w, "b": b}

    def apply(self, w, x):
        def step(h, x_t):
            h = jax.nn.relu(x_t @ w["u"] + h @ w["w"] + w["b"])
            return h, h

        h0 = jnp.zeros((x.shape[0], self.features), x.dtype)
        last, every = lax.scan(step, h0, jnp.moveaxis(x, 1, 0))
        return jnp.moveaxis(every, 0, 1) if self.every_state else last


@dataclass(frozen=True)
class Repeated:
    """relu(h W + b) several times: with one shared layer, or by scanning over stacked layers."""

    times: int = 2
    shared: bool = True

    def wire(self, dag, nodes, draw):
        d = nodes.shape[-1]
        copies = 1 if self.shared else self.times
        kernel, bias = dag.weight(draw((copies, d, d))), dag.weight(draw((copies, d)))
        for k in range(self.times):
            layer = 0 if self.shared else k
            nodes = _matmul(dag, nodes, kernel[layer])
            for index in np.ndindex(nodes.shape):
                dag.connect(ONE, nodes[index], bias[layer, index[-1]])
        if self.shared:
            kernel, bias = kernel[0], bias[0]
        return nodes, {"kernel": kernel, "bias": bias}

    def apply(self, w, x):
        layer = jax.jit(lambda layer, h: jax.nn.relu(h @ layer["kernel"] + layer["bias"]))
        if not self.shared:
            return lax.scan(lambda h, a: (layer(a, h), None), x, w)[0]
        for _ in range(self.times):
            x = layer(w, x)
        return x


def wire_all(layers, dag, nodes, draw):
    """Wire layers one after another; weights are named ``layer_0``, ``layer_1``, ..."""
    ids = {}
    for i, layer in enumerate(layers):
        nodes, ids[f"layer_{i}"] = layer.wire(dag, nodes, draw)
    return nodes, ids


def apply_all(layers, params, x):
    """Apply layers one after another."""
    for i, layer in enumerate(layers):
        x = layer.apply(params[f"layer_{i}"], x)
    return x


class Network:
    """Layers on inputs of one shape, as a graph and as a jax function ``fn(params, x)``."""

    def __init__(self, shape, layers, seed=0):
        rng = np.random.default_rng(seed)

        def draw(shape):
            # Weights of either sign around one, a tenth of them exactly zero: κ of a zero
            # weight is not zero.
            values = rng.uniform(0.3, 1.6, shape) * rng.choice([-1.0, 1.0], shape)
            return values * (rng.uniform(size=shape) > 0.1)

        self.layers, self.dag = layers, Dag()
        self.inputs = self.dag.nodes(shape)
        self.outputs, self.ids = wire_all(layers, self.dag, self.inputs, draw)
        self.num_paths = self.dag.num_paths(self.inputs, self.outputs)

    def params(self, dtype):
        """The weights as a pytree of arrays."""
        return jax.tree.map(lambda ids: np.asarray(self.dag.weights, dtype)[ids], self.ids)

    def __repr__(self):
        return f"Network({self.inputs.shape}, {self.layers})"

    def fn(self, params, x):
        """The network as a user would write it."""
        return apply_all(self.layers, params, x)

    def x(self, batch, dtype):
        """Some inputs."""
        return np.ones((batch, *self.inputs.shape), dtype)

    def truth(self, p):
        """(γ_p^p of every output element, κ as a pytree like `params`), by definition."""
        norms, kappa = enumerate_paths(self.dag, self.inputs, self.outputs, p)
        return norms, jax.tree.map(lambda ids: kappa[ids], self.ids)
