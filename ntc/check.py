"""What a recipe would make of a model, node by node, without writing anything.

The recipe is really run, on random tokens: what is reported is what the passes did, not what a table of operators
promises. Every node of the canonical network falls into one class:

===============  =====================================================================================
``spiking``      computed with spikes: neurons, or sums of weights over incoming spikes
``analog``       multiply-accumulates on real values: they stay as they are
``host``         cheap glue on the host: norms, embeddings, residual additions, layout
``unsupported``  a place that the recipe should convert and cannot, or an op that ntc has no rules for
===============  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.fx import Node

from ntc.compiler import quantizing
from ntc.errors import CaptureError, NtcError
from ntc.frontend import capture
from ntc.loading import load_model
from ntc.meta import ORIGIN, TYPE, block_of, module_of, source_of
from ntc.observe import count_by_shape
from ntc.ops import SOFTMAX_ATTENTION, spec_of, timed
from ntc.pipeline import LEFT_ANALOG, Context, Pass, run_pipeline
from ntc.program import Program, op_name
from ntc.recipe import Recipe, Settings
from ntc.registry import find_pass
from ntc.text import calibration_from, random_tokens
from ntc.widths import Width, widths

__all__ = ["CLASSES", "CheckReport", "Finding", "NodeCheck", "check_model"]

Class: TypeAlias = Literal["spiking", "analog", "host", "unsupported"]
CLASSES: tuple[Class, ...] = ("spiking", "analog", "host", "unsupported")

# Enough tokens to run every pass; what they measure is thrown away.
_WINDOW = 64
_WINDOWS = 4

_DENSE = ("projection", "attention")
_ATTENTION = frozenset(op_name(target) for target in SOFTMAX_ATTENTION)


@dataclass(frozen=True)
class NodeCheck:
    """One node of the canonical network.

    Attributes:
        node: Its name.
        op: Its operation.
        module: Module of the model.
        block: Transformer block; empty outside of blocks.
        source: Line of the model's source.
        becomes: Its class.
        by: Nodes of the compiled program that stand for it.
        reason: Why, where that is not obvious.
        dense_macs: Its multiply-accumulates per token if nothing is skipped.
    """

    node: str
    op: str
    module: str
    block: str
    source: str
    becomes: Class
    by: tuple[str, ...]
    reason: str
    dense_macs: float


@dataclass(frozen=True)
class Finding:
    """A place that a pass left alone, or a stage that failed.

    Attributes:
        stage: Name of the pass, or ``capture``.
        node: Name of the node; empty if the whole stage failed.
        module: Module of the model.
        source: Line of the model's source.
        reason: What was in the way.
        required: Whether the recipe cannot do without it.
    """

    stage: str
    node: str
    module: str
    source: str
    reason: str
    required: bool


@dataclass(frozen=True)
class CheckReport:
    """Result of ``check_model``.

    Attributes:
        model: What is known of the model: source, architecture, parameters, context.
        recipe: Name of the recipe.
        nodes: Every node of the canonical network.
        findings: What was left alone.
        sites: Places converted, by pass.
        window: Tokens per sequence for the counts of attention.
        widths: Of an integer program: the bits of every value and register (``ntc.widths``).
        warnings: What the user should know of the settings, one sentence each.
    """

    model: Mapping[str, Any]
    recipe: str
    nodes: tuple[NodeCheck, ...]
    findings: tuple[Finding, ...]
    sites: Mapping[str, int]
    window: int
    widths: tuple[Width, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every required site can be converted."""
        return bool(self.nodes) and not any(f.required for f in self.findings)

    def shares(self) -> dict[str, float | None]:
        """Share of the dense multiply-accumulates by class; None if there are none."""
        total = sum(n.dense_macs for n in self.nodes)
        return {c: sum(n.dense_macs for n in self.nodes if n.becomes == c) / total if total else None for c in CLASSES}

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys (documented in docs/json.md)."""
        return {
            "ok": self.ok,
            "model": dict(self.model),
            "recipe": self.recipe,
            "counts": {c: sum(n.becomes == c for n in self.nodes) for c in CLASSES},
            "dense_macs_share": self.shares(),
            "sites": dict(self.sites),
            "findings": [asdict(f) for f in self.findings],
            "nodes": [{**asdict(n), "by": list(n.by)} for n in self.nodes],
            "window": self.window,
            "widths": [asdict(w) for w in self.widths],
            "warnings": list(self.warnings),
        }


def _silent(label: str, done: int, total: int) -> None:
    return None


def check_model(
    model: nn.Module | str | Path,
    *,
    recipe: str | Recipe = "neurtransformer",
    settings: Settings | None = None,
    quantize: int | None = None,
    example: Tensor | None = None,
    progress: Callable[[str, int, int], None] = _silent,
) -> CheckReport:
    """Find out what a recipe makes of a model.

    Args:
        model: A folder, a hub id, or a module (see ``ntc.capture``).
        recipe: Name of a recipe, or one of your own.
        settings: Options and overrides, as for ``ntc.compile``.
        quantize: As for ``ntc.compile``; the report then has widths.
        example: Example token ids, if the model is no Hugging Face model.
        progress: Called with (label, done, total).

    Raises:
        ConfigError: For an unknown recipe or setting.
        CaptureError: If the model cannot be loaded. A model that cannot be captured is a finding instead.
    """
    chosen, settings = quantizing(recipe, quantize), settings or Settings()
    passes = chosen.build(settings, find_pass)
    progress("load", 0, 1)
    module = load_model(model) if isinstance(model, str | Path) else model
    source = str(model) if isinstance(model, str | Path) else type(model).__name__
    about: dict[str, Any] = {
        "source": source, "architecture": type(module).__name__, "parameters": sum(p.numel() for p in module.parameters()),
    }  # fmt: skip
    progress("capture", 0, 1)
    try:
        program = capture(module, example).named(source)
    except CaptureError as error:
        return CheckReport(about, chosen.name, (), (Finding("capture", "", "", "", str(error), True),), {}, 0)
    window = min(_WINDOW, program.info.context or _WINDOW)
    tokens = random_tokens(program.info.vocab_size, window, _WINDOWS * window)
    run = _Run(program, Context(calibration_from(tokens), settings.overrides, progress))
    for number, step in enumerate(passes):
        progress(step.name, number, len(passes))
        run.apply(step)
    nodes = _classify(run, window)
    findings = _settled(run, nodes)
    proven = tuple(widths(run.program)) if "integer" in run.program.facts else ()
    remarks = chosen.remarks(settings, find_pass, run.context.used)
    return CheckReport({**about, "context": program.info.context}, chosen.name, nodes, findings, run.sites, window, proven, remarks)


class _Run:
    """A recipe on its way: what failed is noted, and the rest goes on."""

    def __init__(self, program: Program, context: Context) -> None:
        self.program = program
        self.canonical = program
        self.floating = program  # integers change no node's class, only its arithmetic
        self.context = context
        self.sites: dict[str, int] = {}
        self.findings: list[Finding] = []

    def apply(self, step: Pass) -> None:
        """Run one pass, if what it needs is there."""
        if not step.requires <= self.program.facts:
            return  # the pass that should have provided it has its own finding
        before = self.program
        try:
            self.program = run_pipeline(before, [step], self.context)
        except NtcError as error:
            self._note(step, before, _misses_of(step, before, self.context), required=True)
            if not any(f.stage == step.name and f.required for f in self.findings):
                self.findings.append(Finding(step.name, "", "", "", str(error), True))
            return
        if "integer" not in self.program.facts:
            self.floating = self.program
        record = self.program.history[-1]
        self.sites[step.name] = record.sites
        self._note(step, before, record.missed, required=step.required)
        if step.name == "canonicalize":
            self.canonical = self.program

    def _note(self, step: Pass, before: Program, missed: tuple[tuple[str, str], ...], required: bool) -> None:
        known = {n.name: n for program in (self.program, before) for n in program.graph.nodes}
        for name, reason in missed:
            node = known.get(name)
            place = (module_of(node), source_of(node)) if node is not None else ("", "")
            earlier = [f for f in self.findings if (f.node, f.reason) == (name, reason)]
            for f in earlier:  # the same place, now found to be required
                self.findings.remove(f)
            needed = (required and reason != LEFT_ANALOG) or any(f.required for f in earlier)
            self.findings.append(Finding(step.name, name, *place, reason, needed))


def _misses_of(step: Pass, program: Program, context: Context) -> tuple[tuple[str, str], ...]:
    """What a pass that found nothing saw: the runner's error names only the nearest."""
    try:
        return step.run(program.copy(), context).missed
    except Exception:  # noqa: BLE001 - it failed before, and is reported
        return ()


def _settled(run: _Run, nodes: tuple[NodeCheck, ...]) -> tuple[Finding, ...]:
    """The findings, where attention that canonicalize did not recognize counts as required if other attention was converted."""
    converts = any(n.op in _ATTENTION and n.becomes == "spiking" for n in nodes)
    return tuple(
        Finding(**{**asdict(f), "required": True}) if f.stage == "canonicalize" and converts else f for f in run.findings
    )


def _classify(run: _Run, window: int) -> tuple[NodeCheck, ...]:
    final = {n.name: n for n in run.floating.graph.nodes}
    names = {n.name for n in run.canonical.graph.nodes}
    new = [n for n in run.floating.graph.nodes if n.name not in names and n.op == "call_function"]
    reasons = {f.node: f for f in run.findings if f.required or f.stage == "canonicalize"}
    left = {f.node for f in run.findings if f.reason == LEFT_ANALOG}
    macs = _dense_macs(run.canonical, window)
    rows = []
    for node in run.canonical.graph.nodes:
        if node.op != "call_function":
            continue
        kept = final.get(node.name)
        origins = set(node.meta.get(ORIGIN, ()))
        stands_for = [kept] if kept is not None else [n for n in new if origins & set(n.meta.get(ORIGIN, ()))]
        becomes, reason = _class_of(node, kept, stands_for)
        if node.name in reasons:
            becomes, reason = "unsupported", reasons[node.name].reason
        elif node.name in left:
            reason = LEFT_ANALOG
        rows.append(
            NodeCheck(
                node.name, op_name(node.target), module_of(node), block_of(node), source_of(node), becomes,
                tuple(n.name for n in stands_for), reason, macs.get(node.name, 0.0),
            )
        )  # fmt: skip
    return tuple(rows)


def _class_of(node: Node, kept: Node | None, stands_for: list[Node]) -> tuple[Class, str]:
    if kept is None:
        if any(_is_timed(n) for n in stands_for):
            return "spiking", ""
        return "host", "" if stands_for else "folded into its neighbours"
    if _is_timed(kept) or any(_is_timed(a) for a in kept.all_input_nodes):
        return "spiking", "driven by spikes"
    spec = spec_of(node)
    if spec is None or spec.count is None:
        return "unsupported", "ntc has no rules for this op: it runs on the host as it is and is not counted"
    if spec.kind in _DENSE:
        neurons = any((s := spec_of(u)) is not None and s.element == "population" for u in kept.users)
        return "analog", "its input is analog; drives neurons" if neurons else ""
    return "host", ""


def _is_timed(node: Node) -> bool:
    kind = node.meta.get(TYPE)
    return kind is not None and timed(kind)


def _dense_macs(program: Program, window: int) -> dict[str, float]:
    """Dense multiply-accumulates per token of each node, by torch's formulas where ntc has none."""
    rows = count_by_shape(program, [(1, window)]).nodes
    return {name: (r.counts.dense_macs or r.measured.get("flop_counter_macs", 0.0)) / window for name, r in rows.items()}
