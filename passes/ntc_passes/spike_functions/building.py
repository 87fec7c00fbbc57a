"""Subgraphs of small ops that compute nonlinear functions with spikes: what ``spike-functions`` puts in place of their nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ntc.meta import building
from ntc.ops import aten
from ntc.ops.encode import levels_of
from ntc.program import Program
from ntc_passes.spike_functions.fit import Fit

__all__ = ["Builder", "Train", "norm_arguments", "power_limits"]

_OPS = torch.ops.ntc


@dataclass(frozen=True)
class Train:
    """Spikes that stand for a value.

    Attributes:
        spikes: The train, with the code ``count`` or ``phase``.
        code: That code.
        steps: T.
        unit: What the decoded train is multiplied by, ``[..., 1]``; None = nothing.
    """

    spikes: Node
    code: str
    steps: int
    unit: Node | None = None


@dataclass
class Builder:
    """Makes the subgraphs, and remembers the trains and tables that it has made.

    Attributes:
        program: Where they go.
        by: Name of the pass.
        trains: Of values that few-spikes neurons made: a product takes them as they are, and nothing is rounded twice.
    """

    program: Program
    by: str
    trains: dict[Node, Train] = field(default_factory=dict)
    _tables: dict[int, tuple[Fit, tuple[str, ...]]] = field(default_factory=dict)

    def replace(self, node: Node, make: Callable[[Any], Node]) -> None:
        """Put what ``make(call)`` makes in the place of a node."""
        with building(self.program.graph, before=node, stands_for=[node], by=self.by) as call:
            made = make(call)
        node.replace_all_uses_with(made)
        self.program.graph.erase_node(node)

    def function(self, call: Any, x: Node, fitted: Fit, name: str, *, value: str = "") -> tuple[Node, Train]:
        """A function of each value of x: the value and the train that sums to it.

        Args:
            call: From ``building``.
            x: Analog.
            fitted: Its neurons.
            name: Stem of the names of spikes, train and tables.
            value: Name of the value; the stem if empty.
        """
        intervals, theta, reset, weight = (call(t) for t in self._stored(fitted, name))
        spikes = call(_OPS.fs_neuron.default, x, intervals, theta, reset, fitted.steps, name=f"{name}_spikes")
        train = call(_OPS.fs_synapse.default, spikes, x, intervals, weight, fitted.steps, name=f"{name}_train")
        made = call(_OPS.decode.default, train, "count", name=value or name)
        self.trains[made] = Train(train, "count", fitted.steps)
        return made, self.trains[made]

    def _stored(self, fitted: Fit, name: str) -> tuple[str, ...]:
        if id(fitted) not in self._tables:
            parts = {"intervals": fitted.intervals, "theta": fitted.theta, "reset": fitted.reset, "weight": fitted.weight}
            names = tuple(self.program.add_tensor(f"{name}.{k}", v, trainable=k == "weight") for k, v in parts.items())
            self._tables[id(fitted)] = fitted, names
        return self._tables[id(fitted)][1]

    def encoded(self, call: Any, x: Node, steps: int) -> Train:
        """Phase-coded spikes of x, the largest channel of a token on all planes; those that few-spikes neurons have made, if they did."""
        known = self.trains.get(x)
        if known is not None and known.steps == steps:
            return known
        step = call(_OPS.token_step.default, x, 1.0 / levels_of("phase", steps), name=f"{x.name}_step")
        return Train(call(_OPS.encode.default, x, step, steps, "phase", name=f"{x.name}_spikes"), "phase", steps, step)

    def product(self, call: Any, a: Train, b: Train, name: str) -> Node:
        """Decoded product of two trains, without their units."""
        first, second = (a, b) if a.code == "phase" else (b, a)
        train = call(_OPS.train_product.default, first.spikes, second.spikes, first.code, second.code, name=f"{name}_product")
        return call(_OPS.decode.default, train, "count", name=name)  # type: ignore[no-any-return]

    def gate(self, node: Node, steps: int) -> None:
        """``%y = mul(%a, %b)`` by the product of two trains, times the steps of both per token."""

        def make(call: Any) -> Node:
            a, b = (self.encoded(call, x, steps) for x in node.args[:2] if isinstance(x, Node))
            made: Node = self.product(call, a, b, node.name)
            units = [t.unit for t in (a, b) if t.unit is not None]
            if not units:
                return made
            unit = units[0] if len(units) == 1 else call(aten.mul.Tensor, *units, name=f"{node.name}_step")
            planes = 2.0 ** (steps * len(units))  # the phase code decodes to n / 2^T
            unit = call(aten.mul.Tensor, unit, planes, name=f"{node.name}_unit")
            scaled: Node = call(aten.mul.Tensor, made, unit, name=f"{node.name}_scaled")
            return scaled

        self.replace(node, make)

    def norm(self, node: Node, root: Fit) -> None:
        """RMSNorm or LayerNorm: the square of a train, its mean, a reciprocal root, the product of both trains; no scale is left over."""

        def make(call: Any) -> Node:
            source, weight, bias, eps = norm_arguments(node)
            assert isinstance(source, Node)
            x, name, steps = source, node.name, root.steps
            if node.target is aten.layer_norm.default:
                centre = call(aten.mean.dim, x, [-1], True, name=f"{name}_mean")
                x = call(aten.sub.Tensor, x, centre, name=f"{name}_centred")
            step = call(_OPS.token_step.default, x, 1.0 / levels_of("phase", steps), name=f"{name}_step")
            train = Train(call(_OPS.encode.default, x, step, steps, "phase", name=f"{name}_spikes"), "phase", steps)
            square = self.product(call, train, train, f"{name}_square")
            power = call(aten.mean.dim, square, [-1], True, name=f"{name}_power")
            # In the train's unit, step 2^T: eps / unit^2 is what is added, and the norm does not depend on the unit.
            least = call(aten.pow.Tensor_Scalar, step, -2, name=f"{name}_least")
            power = call(aten.add.Tensor, power, least, alpha=eps * 4.0**-steps, name=f"{name}_shifted")
            _, factor = self.function(call, power, root, f"{name}_root")
            made = self.product(call, train, factor, f"{name}_normal" if weight or bias else name)
            if weight is not None:
                made = call(aten.mul.Tensor, made, weight, name=f"{name}_scaled" if bias else name)
            if bias is not None:
                made = call(aten.add.Tensor, made, bias, name=name)
            return made

        self.replace(node, make)

    def softmax(self, call: Any, scores: Node, name: str, exponential: Fit, reciprocal: Fit) -> Node:
        """Softmax along the last axis: exp below the largest score, its row sum, the product with the reciprocal of that."""
        top = call(aten.amax.default, scores, [-1], True, name=f"{name}_top")
        below = call(aten.sub.Tensor, scores, top, name=f"{name}_below")
        value, mass = self.function(call, below, exponential, f"{name}_exp")
        total = call(aten.sum.dim_IntList, value, [-1], True, name=f"{name}_sum")
        _, factor = self.function(call, total, reciprocal, f"{name}_share")
        return self.product(call, mass, factor, name)

    def attention(self, node: Node, exponential: Fit, reciprocal: Fit) -> None:
        """``ntc.attention`` as scores, this softmax, and weighted values."""
        query, key, value, heads, kv_heads, scale, *rest = node.args
        window = rest[0] if rest else 0

        def make(call: Any) -> Node:
            scores = call(_OPS.causal_scores.default, query, key, heads, kv_heads, scale, window, name=f"{node.name}_scores")
            weights = self.softmax(call, scores, f"{node.name}_softmax", exponential, reciprocal)
            made: Node = call(_OPS.weighted_values.default, weights, value, heads, kv_heads, window, name=node.name)
            return made

        self.replace(node, make)


def norm_arguments(node: Node) -> tuple[Any, Any, Any, float]:
    """Input, weight, bias and eps of a norm."""
    names = (a.name for a in node.target._schema.arguments)  # type: ignore[union-attr]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    eps = given.get("eps")
    standard = torch.finfo(node.meta["val"].dtype).eps if node.target is aten.rms_norm.default else 1e-5
    return given["input"], given.get("weight"), given.get("bias"), float(standard if eps is None else eps)


def power_limits(channels: int, steps: int) -> tuple[float, float]:
    """Between what the mean of squares of a token lies, with eps, in the train's unit.

    One channel is the largest and tells N of 2^T: the mean is at least its square over the channels, at most its square. eps adds to that;
    up to three times as much, which takes a token whose channels are all below ``sqrt(eps / 3)``.
    """
    top = (levels_of("phase", steps) / 2.0**steps) ** 2
    return 0.999 * top / channels, 4.0 * top
