r"""Energy by counting operations: the network against the spiking program, on measured firing rates.

    E = 4.6 pJ (MACs + graded-spike MACs) + 0.9 pJ (ACs + membrane updates)          45 nm, compute only

ACs are counted, not estimated: for a linear layer the spikes that arrived times its fan-out, for spiking attention the
additions that the coinciding spikes caused. This is the convention of the field's papers; it leaves out memory, control
and routing, and says so. Elementwise arithmetic (norms, activations, softmax, residual adds) is counted and not costed, on
both sides. Multiply-accumulates of ops that ntc cannot count are listed with their share, never skipped.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from ntc.errors import ConfigError
from ntc.meta import block_of
from ntc.observe import Activity, NodeCounts, count_by_shape, observe
from ntc.ops import SOFTMAX_ATTENTION, Counts, aten, spec_of
from ntc.program import Program, check_ids, op_name
from ntc.text import Tokens

__all__ = ["Constants", "EnergyReport", "Side", "attention_projections", "load_constants", "measure_energy"]


@dataclass(frozen=True)
class Constants:
    """Energy per operation [pJ], with where the numbers come from."""

    id: str
    title: str
    source: str
    scope: str
    mac: float
    ac: float
    graded_mac: float
    update: float

    def cost(self, counts: Counts) -> float:
        """Energy of the counts [pJ]."""
        return (
            self.mac * counts.macs + self.ac * counts.acs + self.graded_mac * counts.graded_macs + self.update * counts.neuron_updates
        )


def load_constants(path: Path | None = None) -> Constants:
    """The constants of a TOML file, by default those of 45 nm that ship with ntc.

    Raises:
        ConfigError: If the file is missing or lacks a number.
    """
    try:
        text = path.read_text(encoding="utf-8") if path else (files("ntc") / "data" / "energy_45nm.toml").read_text("utf-8")
        data = tomllib.loads(text)
        numbers = {k: float(v) for k, v in data["picojoules"].items()}
        for name, value in numbers.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"the energy constants {path} give {value} pJ for {name}: it must be finite and not negative")
        return Constants(data["id"], data["title"], data["source"], data["scope"], **numbers)
    except OSError as error:
        raise ConfigError(f"cannot read the energy constants {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no table of energy constants: {error}") from error


@dataclass(frozen=True)
class Side:
    """Operations of one of the two networks, summed over ``tokens`` tokens."""

    nodes: tuple[NodeCounts, ...]
    tokens: int
    attention_projections: frozenset[str] = frozenset()  # names of the linear layers around attention

    def total(self, keep: Callable[[NodeCounts], bool] = lambda _: True) -> Counts:
        """Sum per token over the nodes that ``keep`` chooses."""
        result = Counts()
        for node in self.nodes:
            if keep(node):
                result = result + node.counts
        return result * (1.0 / self.tokens)

    def groups(self, attribute: str) -> list[str]:
        """Values of ``block`` or ``kind`` over the nodes, in order; the block with the empty name is what lies outside."""
        return list(dict.fromkeys(getattr(n, attribute) for n in self.nodes))


@dataclass(frozen=True)
class EnergyReport:
    """Both sides, counted on the same tokens."""

    ann: Side
    snn: Side
    constants: Constants
    steps: int
    data: str
    data_sha256: str
    window: int
    roles: Mapping[str, str] = field(default_factory=dict)  # node name -> role of its population

    def attention(self) -> dict[str, Any]:
        """The attention block alone: the paper's analog (ASA) against spiking (SSA) self-attention [pJ per token].

        The block is the products (query-key and probability-value) and, on the spiking side, the membrane updates of the
        Q, K, V and output neurons. ``with_projections`` adds the four projections.
        """
        cost = self.constants.cost

        def product(n: NodeCounts) -> bool:
            return n.kind == "attention"

        def encoder(n: NodeCounts) -> bool:
            return self.roles.get(n.name, "") in ("q", "k", "v", "ssa")

        def projections(side: Side) -> Counts:
            return side.total(lambda n: n.name in side.attention_projections)

        asa, ssa_products = self.ann.total(product), self.snn.total(product)
        ssa = ssa_products + self.snn.total(encoder)
        wide_asa, wide_ssa = asa + projections(self.ann), ssa + projections(self.snn)
        streamed = [n.measured for n in self.snn.nodes if {"write", "read"} <= n.measured.keys()]
        adds, leaks = (sum(m.get(key, 0.0) for m in streamed for key in keys) for keys in (("write", "read"), ("leak",)))
        streaming = (Counts(acs=adds, macs=leaks) * (1 / self.snn.tokens) + self.snn.total(encoder)) if streamed else None
        return {
            "asa_pj": cost(asa),
            "ssa_pj": cost(ssa),
            "reduction": _reduction(cost(asa), cost(ssa)),
            "asa_macs": asa.macs,
            "ssa_acs": ssa_products.acs,
            "steps_times_rate": ssa_products.acs / asa.macs if asa.macs and ssa_products.acs and not self._streams else None,
            "ssa_streaming_pj": None if streaming is None else cost(streaming),
            "with_projections": {
                "asa_pj": cost(wide_asa), "ssa_pj": cost(wide_ssa), "reduction": _reduction(cost(wide_asa), cost(wide_ssa)),
            },
        }  # fmt: skip

    @property
    def _streams(self) -> bool:
        """Whether the spiking program adds to a memory and reads it, which are other additions than those of the analog products."""
        return any(n.op in _STREAM_NAMES for n in self.snn.nodes)

    def _both(self, attribute: str, value: str) -> dict[str, float]:
        """Energy [pJ per token] of the nodes with that block or kind, on both sides."""

        def keep(node: NodeCounts) -> bool:
            return bool(getattr(node, attribute) == value)

        return {"ann_pj": self.constants.cost(self.ann.total(keep)), "snn_pj": self.constants.cost(self.snn.total(keep))}

    def uncounted(self) -> list[dict[str, Any]]:
        """Ops without a counting rule, on either side, with their multiply-accumulates per token by torch's flop counter."""
        return [
            {"side": name, "node": n.name, "op": n.op, "module": n.module, "macs": _hidden_macs(n) / side.tokens}
            for name, side in (("ann", self.ann), ("snn", self.snn))
            for n in side.nodes
            if not n.countable
        ]

    def uncounted_share(self) -> float:
        """Share of the dense MACs of the spiking program that lies in ops without a counting rule."""
        counted = self.snn.total().dense_macs
        hidden = sum(_hidden_macs(n) for n in self.snn.nodes) / self.snn.tokens
        return hidden / (counted + hidden) if counted + hidden else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys (documented in docs/json.md); all counts and energies are per token."""
        ann, snn = self.ann.total(), self.snn.total()
        ann_pj, snn_pj = self.constants.cost(ann), self.constants.cost(snn)
        return {
            "unit": "pJ per token",
            "attention": self.attention(),
            "total": {
                "ann_pj": ann_pj, "snn_pj": snn_pj, "reduction": _reduction(ann_pj, snn_pj), "ann": asdict(ann), "snn": asdict(snn),
            },
            "blocks": [{"block": block or "outside", **self._both("block", block)} for block in self.ann.groups("block")],
            "kinds": [
                {"kind": kind, **self._both("kind", kind)}
                for kind in dict.fromkeys([*self.ann.groups("kind"), *self.snn.groups("kind")])
            ],
            "nodes": {"ann": _rows(self.ann, self.constants), "snn": _rows(self.snn, self.constants)},
            "uncounted": self.uncounted(),
            "uncounted_share": self.uncounted_share(),
            "steps": self.steps,
            "tokens": self.snn.tokens,
            "window": self.window,
            "data": self.data,
            "data_sha256": self.data_sha256,
            "constants": asdict(self.constants),
        }  # fmt: skip


def _hidden_macs(node: NodeCounts) -> float:
    return node.measured.get("flop_counter_macs", 0.0)


def _reduction(before: float, after: float) -> float | None:
    """Share of the energy that is saved; negative if the second costs more."""
    return 1 - after / before if before else None


def _rows(side: Side, constants: Constants) -> list[dict[str, Any]]:
    """Nodes that compute something, with their counts per token."""
    rows = []
    for n in side.nodes:
        counts = n.counts * (1.0 / side.tokens)
        numbers = {k: v for k, v in asdict(counts).items() if v}
        if numbers:
            where = {"node": n.name, "op": n.op, "module": n.module, "block": n.block, "kind": n.kind}
            rows.append({**where, **numbers, "pj": constants.cost(counts)})
    return rows


def measure_energy(
    program: Program,
    analog: Program,
    tokens: Tokens,
    constants: Constants | None = None,
    *,
    batch: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EnergyReport:
    """Count the operations of both networks on the same tokens; spikes are those that the program really fires.

    Args:
        program: The spiking program.
        analog: The network it came from, canonical; only its shapes are read.
        tokens: Windows of token ids.
        constants: Energy per operation; by default 45 nm fp32.
        batch: Windows per run.
        progress: Called with (windows done, windows).

    Raises:
        DataError: If the windows do not fit one of the two.
    """
    for one in (program, analog):
        check_ids(tokens.windows, one.info)
    activity = Activity()
    done = 0
    for rows in tokens.batches(batch):
        observe(program, [rows], activity)
        done += len(rows)
        progress(done, len(tokens.windows))
    shapes = [(int(rows.shape[0]), int(rows.shape[1])) for rows in tokens.batches(batch)]
    original = _by_distinct_shape(analog, shapes)
    return EnergyReport(
        ann=Side(tuple(original.nodes.values()), original.tokens, attention_projections(analog)),
        snn=Side(tuple(activity.nodes.values()), activity.tokens, attention_projections(program)),
        constants=constants or load_constants(),
        steps=program.steps,
        data=tokens.description,
        data_sha256=tokens.sha256,
        window=int(tokens.windows.shape[1]),
        roles={p.name: p.role for p in activity.populations.values()},
    )


_WHOLE = (*SOFTMAX_ATTENTION, torch.ops.ntc.spiking_attention.default, torch.ops.ntc.integer_attention.default)
_STREAMS = (
    torch.ops.ntc.attention_stream.default, torch.ops.ntc.spiking_attention_stream.default,
    torch.ops.ntc.integer_attention_stream.default,
)  # fmt: skip
_PRODUCTS = (*_WHOLE, *_STREAMS)
_STREAM_NAMES = frozenset(op_name(target) for target in _STREAMS)
_LINEAR = (aten.linear.default, torch.ops.ntc.integer_linear.default)


def attention_projections(program: Program) -> frozenset[str]:
    """Names of the linear layers that make queries, keys and values, and of those that take the result.

    Read off the graph and not off module names: a hand-written block may hold its attention and its FFN in one module.
    """
    found: set[str] = set()
    for product in (n for n in program.graph.nodes if n.target in _PRODUCTS):
        # Behind Q, K and V anything of the same block (rotary embeddings, norms); after the result only what leaves it
        # itself, since a residual add leads on to the FFN.
        found |= _nearest_linears(product, lambda n: [a for a in n.args[:3] if isinstance(a, Node)], lambda n: n.all_input_nodes)
        found |= _nearest_linears(product, lambda n: list(n.users), lambda n: list(n.users) if _passes_on(n) else [])
    return frozenset(found)


def _nearest_linears(start: Node, first: Callable[[Node], list[Node]], onward: Callable[[Node], list[Node]]) -> set[str]:
    found: set[str] = set()
    seen: set[Node] = set()
    frontier = first(start)
    while frontier:
        node = frontier.pop()
        if node in seen or node.op != "call_function" or block_of(node) != block_of(start):
            continue
        seen.add(node)
        if node.target in _LINEAR:
            found.add(node.name)
        else:
            frontier.extend(onward(node))
    return found


def _passes_on(node: Node) -> bool:
    """Whether an op hands its one input on: a change of layout, a scale, a neuron, a decode."""
    spec = spec_of(node)
    return spec is not None and (spec.element in ("population", "decode", "scale") or spec.kind in ("layout", "neurons"))


def _by_distinct_shape(analog: Program, shapes: Iterable[tuple[int, int]]) -> Activity:
    """Counts that depend on shapes only are counted once per shape and multiplied."""
    result = Activity()
    times: dict[tuple[int, int], int] = {}
    for shape in shapes:
        times[shape] = times.get(shape, 0) + 1
    for shape, number in times.items():
        once = count_by_shape(analog, [shape])
        for row in once.nodes.values():
            row.counts = row.counts * number
            row.measured = {key: value * number for key, value in row.measured.items()}
        result.tokens += once.tokens * number
        for name, row in once.nodes.items():
            if name in result.nodes:
                sums = result.nodes[name]
                sums.counts = sums.counts + row.counts
                sums.measured = {key: sums.measured.get(key, 0.0) + value for key, value in row.measured.items()}
            else:
                result.nodes[name] = row
    return result
