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

from ntc.errors import ConfigError
from ntc.observe import Activity, NodeCounts, count_by_shape, observe
from ntc.ops import Counts
from ntc.program import Program
from ntc.text import Tokens

__all__ = ["Constants", "EnergyReport", "Side", "load_constants", "measure_energy"]


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
        if any(v < 0 for v in numbers.values()):
            raise ConfigError(f"the energy constants {path} hold a negative number")
        return Constants(data["id"], data["title"], data["source"], data["scope"], **numbers)
    except OSError as error:
        raise ConfigError(f"cannot read the energy constants {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no table of energy constants: {error}") from error


@dataclass(frozen=True)
class Side:
    """Operations per token of one of the two networks."""

    nodes: tuple[NodeCounts, ...]
    tokens: int

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
        in_attention = {n.module for n in self.ann.nodes if n.op == "ntc.attention"}

        def product(n: NodeCounts) -> bool:
            return n.kind == "attention"

        def encoder(n: NodeCounts) -> bool:
            return self.roles.get(n.name, "") in ("q", "k", "v", "ssa")

        def projection(n: NodeCounts) -> bool:
            return n.kind == "projection" and any(n.module.startswith(m + ".") or n.module == m for m in in_attention if m)

        asa, ssa_products = self.ann.total(product), self.snn.total(product)
        ssa = ssa_products + self.snn.total(encoder)
        wide_asa, wide_ssa = asa + self.ann.total(projection), ssa + self.snn.total(projection)
        streamed = [n.measured for n in self.snn.nodes if {"write", "read"} <= n.measured.keys()]
        streaming = sum(m["write"] + m["read"] for m in streamed) / self.snn.tokens if streamed else None
        encoders = self.constants.cost(self.snn.total(encoder))
        return {
            "asa_pj": cost(asa),
            "ssa_pj": cost(ssa),
            "reduction": _reduction(cost(asa), cost(ssa)),
            "asa_macs": asa.macs,
            "ssa_acs": ssa_products.acs,
            "steps_times_rate": ssa_products.acs / asa.macs if asa.macs and ssa_products.acs else None,
            "ssa_streaming_pj": None if streaming is None else self.constants.ac * streaming + encoders,
            "with_projections": {
                "asa_pj": cost(wide_asa), "ssa_pj": cost(wide_ssa), "reduction": _reduction(cost(wide_asa), cost(wide_ssa)),
            },
        }  # fmt: skip

    def _both(self, attribute: str, value: str) -> dict[str, float]:
        """Energy [pJ per token] of the nodes with that block or kind, on both sides."""

        def keep(node: NodeCounts) -> bool:
            return bool(getattr(node, attribute) == value)

        return {"ann_pj": self.constants.cost(self.ann.total(keep)), "snn_pj": self.constants.cost(self.snn.total(keep))}

    def uncounted(self) -> list[dict[str, Any]]:
        """Ops without a counting rule, on either side; their share is of dense MACs, by torch's flop counter."""
        rows = []
        for side, nodes in (("ann", self.ann.nodes), ("snn", self.snn.nodes)):
            rows += [{"side": side, "node": n.name, "op": n.op, "module": n.module} for n in nodes if not n.countable]
        return rows

    def uncounted_share(self) -> float:
        """Share of the dense MACs of the spiking program that lies in ops without a counting rule."""
        counted = self.snn.total().dense_macs
        hidden = sum(n.measured.get("flop_counter_macs", 0.0) for n in self.snn.nodes if not n.countable) / self.snn.tokens
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
    """
    activity = Activity()
    done = 0
    for rows in tokens.batches(batch):
        observe(program, [rows], activity)
        done += len(rows)
        progress(done, len(tokens.windows))
    shapes = [(int(rows.shape[0]), int(rows.shape[1])) for rows in tokens.batches(batch)]
    original = _by_distinct_shape(analog, shapes)
    return EnergyReport(
        ann=Side(tuple(original.nodes.values()), original.tokens),
        snn=Side(tuple(activity.nodes.values()), activity.tokens),
        constants=constants or load_constants(),
        steps=program.steps,
        data=tokens.description,
        data_sha256=tokens.sha256,
        window=int(tokens.windows.shape[1]),
        roles={p.name: p.role for p in activity.populations.values()},
    )


def _by_distinct_shape(analog: Program, shapes: Iterable[tuple[int, int]]) -> Activity:
    """Counts that depend on shapes only are counted once per shape and multiplied."""
    result = Activity()
    times: dict[tuple[int, int], int] = {}
    for shape in shapes:
        times[shape] = times.get(shape, 0) + 1
    for shape, number in times.items():
        once = count_by_shape(analog, [shape])
        result.tokens += once.tokens * number
        for name, row in once.nodes.items():
            if name in result.nodes:
                result.nodes[name].counts = result.nodes[name].counts + row.counts * number
            else:
                row.counts = row.counts * number
                result.nodes[name] = row
    return result
