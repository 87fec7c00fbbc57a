r"""Energy by counting operations: the network against the spiking program, on measured firing rates.

    compute               E = mac (MACs) + graded_mac (graded MACs) + ac (ACs) + update (membrane updates)
    compute and memory    the same + sum over classes of data of bytes moved x energy per byte

ACs are counted, not estimated: for a linear layer the spikes that arrived times its fan-out, for spiking attention the
additions that the coinciding spikes caused. The first column is the convention of the field's papers; it leaves out memory, control
and routing, and says so. Multiply-accumulates of ops that ntc cannot count are listed with their share, never skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from ntc.energy.baselines import compare
from ntc.energy.booking import by_kind
from ntc.energy.constants import Constants
from ntc.energy.hierarchy import Memory
from ntc.energy.pricing import COLUMNS, NOT_MAPPED, ONE_CHIP, REAL_ADDITIONS, WITH_MEMORY, Pricing, reduction
from ntc.energy.projections import STREAM_NAMES
from ntc.energy.sensitivity import sensitivity
from ntc.errors import DataError
from ntc.observe import NodeCounts
from ntc.ops import Counts

__all__ = ["EnergyReport", "Side"]

_NAMED = 5
"""Ops that an error names."""

_ENCODERS = ("q", "k", "v", "ssa")
"""Roles of the neurons that belong to spiking attention."""


@dataclass(frozen=True)
class Side:
    """Operations of one of the two networks, summed over ``tokens`` tokens."""

    nodes: tuple[NodeCounts, ...]
    tokens: int
    attention_projections: frozenset[str] = frozenset()  # names of the linear layers around attention
    kinds: Mapping[str, str] = field(default_factory=dict)  # under which kind each node is booked

    @cached_property
    def per_token(self) -> tuple[NodeCounts, ...]:
        """The nodes, per token."""
        return tuple(node * (1.0 / self.tokens) for node in self.nodes)

    def total(self, keep: Callable[[NodeCounts], bool] = lambda _: True) -> Counts:
        """Sum per token over the nodes that ``keep`` chooses."""
        result = Counts()
        for node in self.nodes:
            if keep(node):
                result = result + node.counts
        return result * (1.0 / self.tokens)

    @cached_property
    def by_block(self) -> dict[str, list[NodeCounts]]:
        """Nodes of one token by block, in order; what lies outside of all blocks under the empty name."""
        found: dict[str, list[NodeCounts]] = {}
        for node in self.per_token:
            found.setdefault(node.block, []).append(node)
        return found

    @cached_property
    def by_kind(self) -> dict[str, list[NodeCounts]]:
        """Nodes of one token by kind, in order."""
        return by_kind(self.per_token, self.kinds)


@dataclass(frozen=True)
class EnergyReport:
    """Both sides, counted on the same tokens.

    Attributes:
        ann: The original network.
        snn: The spiking program.
        constants: Energies per operation.
        memory: Energies of moving data.
        steps: T.
        data: Description of the text.
        data_sha256: Hash of its token ids.
        window: Tokens per sequence.
        roles: Role of each population, by node name.
        firing_rate: Spikes per neuron and step over all populations; None if nothing spikes.
        perplexity: Of the program, on the same tokens; None if no window has a next token.
        perplexity_ann: Of the original, on the same tokens; None if it was not run.
        stored: What NeuroBench asks of the weights: ``footprint`` [bytes] and ``connection_sparsity``.
        data_file_sha256: Hash of the file of the text; empty if there is none.
    """

    ann: Side
    snn: Side
    constants: Constants
    memory: Memory
    steps: int
    data: str
    data_sha256: str
    window: int
    roles: Mapping[str, str] = field(default_factory=dict)
    firing_rate: float | None = None
    perplexity: float | None = None
    perplexity_ann: float | None = None
    stored: Mapping[str, float] = field(default_factory=dict)
    data_file_sha256: str = ""

    @property
    def pricing(self) -> Pricing:
        """Both tables."""
        return Pricing(self.constants, self.memory)

    # -------------------------------------------------------------------------------------------- the attention block

    def block(self) -> tuple[list[NodeCounts], list[NodeCounts]]:
        """Nodes of the attention block, of one token: the products, and on the spiking side the neurons of Q, K, V and the output."""
        ann = [n for n in self.ann.per_token if n.kind == "attention"]
        return ann, [n for n in self.snn.per_token if n.kind == "attention" or self.roles.get(n.name, "") in _ENCODERS]

    def attention(self) -> dict[str, Any]:
        """The attention block alone: the paper's analog (ASA) against spiking (SSA) self-attention [pJ per token].

        The block is the products (query-key and probability-value) and, on the spiking side, the membrane updates of the
        Q, K, V and output neurons. ``with_projections`` adds the four projections.
        """
        cost = self.constants.stated

        def product(n: NodeCounts) -> bool:
            return n.kind == "attention"

        def encoder(n: NodeCounts) -> bool:
            return self.roles.get(n.name, "") in _ENCODERS

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
            "reduction": reduction(cost(asa), cost(ssa)),
            "asa_macs": asa.macs,
            "ssa_acs": ssa_products.acs,
            "steps_times_rate": ssa_products.acs / asa.macs if asa.macs and ssa_products.acs and not self._streams else None,
            "ssa_streaming_pj": None if streaming is None else cost(streaming),
            "with_projections": {
                "asa_pj": cost(wide_asa), "ssa_pj": cost(wide_ssa), "reduction": reduction(cost(wide_asa), cost(wide_ssa)),
            },
        }  # fmt: skip

    @property
    def _streams(self) -> bool:
        """Whether the spiking program adds to a memory and reads it, which are other additions than those of the analog products."""
        return any(n.op in STREAM_NAMES for n in self.snn.nodes)

    # -------------------------------------------------------------------------------------------- what is not counted

    def uncounted(self) -> list[dict[str, Any]]:
        """Ops without a counting rule, on either side, with their multiply-accumulates per token by torch's flop counter."""
        return [
            {"side": name, "node": n.name, "op": n.op, "module": n.module, "macs": _hidden_macs(n)}
            for name, side in (("ann", self.ann), ("snn", self.snn))
            for n in side.per_token
            if not n.countable
        ]

    def require_counted(self, share: float) -> None:
        """Refuse a report of which too much is not counted.

        Raises:
            DataError: If a larger share of the dense MACs of either network lies in ops without a counting rule; names them.
        """
        if self.uncounted_share() <= share:
            return
        rows = sorted((r for r in self.uncounted() if r["macs"]), key=lambda r: -r["macs"])
        named = ", ".join(dict.fromkeys(f"{r['op']} (%{r['node']})" for r in rows[:_NAMED]))
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        raise DataError(
            f"{100 * self.uncounted_share():.3g} % of the dense multiply-accumulates are not counted, and {100 * share:.3g} % are allowed: "
            f"no counting rule is known of {named}{more}; register an OpSpec with count, or allow more"
        )

    def uncounted_share(self) -> float:
        """Share of the dense MACs that lies in ops without a counting rule, on the side where it is larger."""
        return max(_uncounted_share(side) for side in (self.ann, self.snn))

    def unpriced(self) -> list[dict[str, Any]]:
        """Operations per token that the table of a chip has no figure for; of multiply-accumulates also their share of the dense ones."""
        rows = []
        for name, side in (("ann", self.ann), ("snn", self.snn)):
            total = side.total()
            for operation, number in self.constants.unpriced(total).items():
                share = number / total.dense_macs if operation in ("macs", "graded_macs") and total.dense_macs else None
                rows.append({"side": name, "operation": operation, "number": number, "share_of_dense_macs": share})
            additions = sum(n.counts.acs for n in side.per_token if not n.steps)
            if self.constants.device and additions:  # of a rotation, for instance: no spike causes them
                rows.append({"side": name, "operation": REAL_ADDITIONS, "number": additions, "share_of_dense_macs": None})
        return rows

    # -------------------------------------------------------------------------------------------- the report as data

    def columns(self, ann: list[NodeCounts], snn: list[NodeCounts]) -> list[dict[str, Any]]:
        """The three columns of some nodes of both sides [pJ per token]."""
        rows: list[dict[str, Any]] = []
        for column in COLUMNS:
            before, after = self.pricing.stated(column, ann), self.pricing.stated(column, snn)
            remark = "" if not self.constants.device else ONE_CHIP if column == COLUMNS[0] else WITH_MEMORY
            rows.append({"column": column, "ann_pj": before, "snn_pj": after, "reduction": reduction(before, after), "remark": remark})
        return [*rows, {"column": "placed", "ann_pj": None, "snn_pj": None, "reduction": None, "remark": NOT_MAPPED}]

    def moved(self) -> list[dict[str, Any]]:
        """Bytes per token and their energy, by class of data."""
        ann, snn = (self.pricing.moved(side.per_token) for side in (self.ann, self.snn))
        price = self.pricing.per_byte
        return [
            {
                "data": name, "level": self.constants.device or self.memory.holds[name], "pj_per_byte": price(name),
                "ann_bytes": ann[name], "snn_bytes": snn[name], "ann_pj": ann[name] * price(name), "snn_pj": snn[name] * price(name),
            }
            for name in ann
        ]  # fmt: skip

    def neurobench(self) -> dict[str, Any]:
        """Metrics by NeuroBench's names, of the spiking program per token; attention products, which its hooks do not see, are in them."""
        total = self.snn.total()
        effective = sum(n.effective_macs for n in self.snn.per_token) + total.graded_macs
        return {
            "footprint": self.stored.get("footprint"),
            "connection_sparsity": self.stored.get("connection_sparsity"),
            "activation_sparsity": None if self.firing_rate is None else 1 - self.firing_rate,
            "synaptic_operations": {
                "Effective_MACs": effective, "Effective_ACs": sum(n.effective_acs for n in self.snn.per_token),
                "Dense": sum(n.counts.dense_macs * max(1, n.steps) for n in self.snn.per_token),
            },
            "membrane_updates": total.neuron_updates,
        }  # fmt: skip

    def sensitivity(self) -> dict[str, Any]:
        """Both columns with low, nominal and high numbers, of the attention block and of everything."""
        ann, snn = list(self.ann.per_token), list(self.snn.per_token)
        return {"attention": sensitivity(*self.block(), self.pricing), "total": sensitivity(ann, snn, self.pricing)}

    def to_json(self, sensitivity: bool = False) -> dict[str, Any]:
        """Plain data with stable keys (documented in docs/json.md); all counts and energies are per token.

        Args:
            sensitivity: Whether to also cost everything with low and high numbers.
        """
        ann, snn = list(self.ann.per_token), list(self.snn.per_token)
        before, after = (self.pricing.stated("compute", nodes) for nodes in (ann, snn))
        rate = self.firing_rate
        return {
            "unit": "pJ per token",
            "phase": "decode" if self.memory.tokens == 1 else "prefill",
            "attention": {**self.attention(), "columns": self.columns(*self.block())},
            "total": {
                "ann_pj": before, "snn_pj": after, "reduction": reduction(before, after),
                "ann": {**asdict(self.ann.total()), "effective_macs": None},
                "snn": {**asdict(self.snn.total()), "effective_macs": sum(n.effective_macs for n in snn)},
                "columns": self.columns(ann, snn),
            },
            "baselines": {
                "attention": compare(*self.block(), self.pricing, self.steps, rate),
                "total": compare(ann, snn, self.pricing, self.steps, rate),
            },
            "moved": self.moved(),
            "sensitivity": self.sensitivity() if sensitivity else None,
            "blocks": [{"block": name or "outside", **both} for name, both in self._groups(self.ann.by_block, self.snn.by_block)],
            "kinds": [{"kind": name, **both} for name, both in self._groups(self.ann.by_kind, self.snn.by_kind)],
            "nodes": {"ann": _rows(self.ann, self.pricing), "snn": _rows(self.snn, self.pricing)},
            "uncounted": self.uncounted(),
            "uncounted_share": self.uncounted_share(),
            "unpriced": self.unpriced(),
            "mapped": None,
            "neurobench": self.neurobench(),
            "quality": {"perplexity": self.perplexity, "perplexity_ann": self.perplexity_ann},
            "steps": self.steps,
            "firing_rate": rate,
            "tokens": self.snn.tokens,
            "window": self.window,
            "data": self.data,
            "data_sha256": self.data_sha256,
            "data_file_sha256": self.data_file_sha256 or None,
            "constants": self.constants.to_json(),
            "memory": self.memory.to_json(),
        }  # fmt: skip

    def _groups(self, ann: Mapping[str, list[NodeCounts]], snn: Mapping[str, list[NodeCounts]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Of each block or kind: energies [pJ per token] and counts of both sides."""
        for name in dict.fromkeys([*ann, *snn]):
            before, after = ann.get(name, []), snn.get(name, [])
            yield name, {
                "ann_pj": self.pricing.compute(before), "snn_pj": self.pricing.compute(after),
                "ann_memory_pj": sum(self.pricing.memory_pj(before).values()),
                "snn_memory_pj": sum(self.pricing.memory_pj(after).values()),
                "ann": {**_numbers(before, self.pricing), "effective_macs": None},
                "snn": {**_numbers(after, self.pricing), "effective_macs": sum(n.effective_macs for n in after)},
            }  # fmt: skip


def _hidden_macs(node: NodeCounts) -> float:
    return node.measured.get("flop_counter_macs", 0.0)


def _uncounted_share(side: Side) -> float:
    hidden = sum(_hidden_macs(n) for n in side.per_token)
    return hidden / (side.total().dense_macs + hidden) if hidden else 0.0


def _numbers(nodes: list[NodeCounts], pricing: Pricing) -> dict[str, float]:
    """Operations and bytes of some nodes."""
    return {**asdict(sum((n.counts for n in nodes), Counts())), **{f"{k}_bytes": v for k, v in pricing.moved(nodes).items()}}


def _rows(side: Side, pricing: Pricing) -> list[dict[str, Any]]:
    """Nodes that compute or move something, with their counts and bytes per token."""
    rows = []
    for n in side.per_token:
        numbers = {k: v for k, v in asdict(n.counts).items() if v}
        if "effective_macs" in n.measured:
            numbers["effective_macs"] = n.effective_macs
        moved = {f"{k}_bytes": v for k, v in pricing.moved([n]).items() if v}
        if numbers or moved:
            where = {"node": n.name, "op": n.op, "module": n.module, "block": n.block, "kind": side.kinds.get(n.name, n.kind)}
            rows.append({**where, **numbers, **moved, "pj": pricing.compute([n]), "memory_pj": sum(pricing.memory_pj([n]).values())})
    return rows
