"""Tables of energy: the NeurTransformer paper's attention block by measurement and by shapes, and SDLLM's row from shapes.

    python benchmarks/energy_tables.py                          # prints them
    python benchmarks/energy_tables.py --write docs/energy.md   # puts them between the marks of that page
    python benchmarks/energy_tables.py --shapes-only            # without what takes minutes

Whatever is not measured is counted by the ops' own rules, on shapes and on expected numbers of coincidences: spikes are independent, with
one rate for all of Q, K and V.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph

from ntc.compiler import compile_model
from ntc.energy import EnergyReport, Pricing, load_constants, load_memory, measure_energy
from ntc.observe import NodeCounts, steps_of
from ntc.ops import SPECS, Operand
from ntc.ops.traffic import streamed
from ntc.spike_type import ANALOG, CurrentType, NodeType, SpikeType
from ntc.text import tokens_from

MODEL, TEXT = Path("examples/gpt2-books"), Path("examples/data/books-sample.txt")
BEGIN, END = "<!-- tables: benchmarks/energy_tables.py -->", "<!-- end of tables -->"
PAPER = (0.6471, 0.8528)  # savings of the SSA block that the paper states
SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20)}  # layers, width, heads
LLAMA = {"layers": 32, "width": 4096, "heads": 32, "ffn": 11008, "vocabulary": 32000}
LINEAR, ATTENTION = torch.ops.aten.linear.default, torch.ops.ntc.attention.default
SSA, NEURON = torch.ops.ntc.spiking_attention.default, torch.ops.ntc.integrate_fire.default


# ------------------------------------------------------------------------------------------------ nodes from shapes


@dataclass(frozen=True)
class Value:
    """An argument: its shape, type, spikes, and whether it is a constant of the program."""

    shape: tuple[int, ...]
    type: NodeType = ANALOG
    spikes: float = 0.0
    constant: bool = False

    @property
    def operand(self) -> Operand:
        return Operand(self.shape, self.type, self.spikes)


def node(target: Any, values: Sequence[Value], result: Value, *more: Any, measured: dict[str, float] | None = None) -> NodeCounts:
    """One op on values of these shapes, counted by its own rules."""
    graph, spec = Graph(), SPECS[target]
    inputs = [graph.create_node("get_attr", f"c{i}") if v.constant else graph.placeholder(f"x{i}") for i, v in enumerate(values)]
    call, operands = graph.call_function(target, (*inputs, *more)), [v.operand for v in values]
    assert spec.count is not None
    counts = spec.count(call, operands, result.operand, measured or {})
    traffic = (spec.moves or streamed)(call, operands, result.operand, measured or {})
    steps = steps_of(o.type for o in (*operands, result.operand))
    return NodeCounts("", str(target), "", "", spec.kind, counts, {}, True, traffic, steps)


def linear(tokens: int, inputs: int, outputs: int, steps: int = 0, rate: float = 0.0, levels: Any = "binary") -> NodeCounts:
    """A layer without bias, driven by analog values or by a train."""
    shape, weight = (1, tokens, inputs), Value((outputs, inputs), constant=True)
    if not steps:
        return node(LINEAR, [Value(shape), weight], Value((1, tokens, outputs)))
    train = Value((steps, *shape), SpikeType(steps, levels=levels), steps * tokens * inputs * rate)
    return node(LINEAR, [train, weight], Value((steps, 1, tokens, outputs), CurrentType(steps)))


def softmax_attention(tokens: int, width: int, heads: int) -> NodeCounts:
    return node(ATTENTION, [Value((1, tokens, width))] * 3, Value((1, tokens, width)), heads, heads, 1.0)


def neurons(tokens: int, width: int, steps: int, rate: float, levels: Any = "binary") -> NodeCounts:
    """A population with a threshold and a potential per channel."""
    constant = Value((width,), constant=True)
    train = Value((steps, 1, tokens, width), SpikeType(steps, levels=levels), steps * tokens * width * rate)
    return node(NEURON, [Value((1, tokens, width)), constant, constant], train, steps, levels == "ternary", False, "triangle", 1.0)


def spiking_attention(tokens: int, width: int, heads: int, steps: int, rate: float) -> list[NodeCounts]:
    """The product and the neurons of Q, K and V; expected numbers for independent binary spikes."""
    seen, size = tokens * (tokens + 1) / 2, width // heads
    coincide = 1 - (1 - rate**2) ** size  # a score is not zero
    train = Value((steps, 1, tokens, width), SpikeType(steps), steps * tokens * width * rate)
    measured = {"scores": steps * rate * width * seen, "values": steps * heads * seen * coincide * size * rate}
    product = node(SSA, [train] * 3, Value((steps, 1, tokens, width), CurrentType(steps)), heads, heads, measured=measured)
    return [product, *(neurons(tokens, width, steps, rate) for _ in range(3))]


# ------------------------------------------------------------------------------------------------ what is priced


def pricing(constants: str = "horowitz-45nm-fp32", memory: str = "horowitz-45nm-sram", reuse: int = 1) -> Pricing:
    return Pricing(load_constants(constants), load_memory(memory, reuse))


def per_token(nodes: Iterable[NodeCounts], tokens: int, layers: int = 1) -> list[NodeCounts]:
    return [n * (layers / tokens) for n in nodes]


def energies(price: Pricing, nodes: Sequence[NodeCounts]) -> tuple[float, float]:
    """Compute only, and with memory [pJ]."""
    return price.column("compute", nodes), price.column("compute and memory", nodes)


def place(before: float, after: float) -> str:
    """Where a saving lies by the paper's range."""
    share = 1 - after / before
    return "within" if PAPER[0] <= share <= PAPER[1] else "above" if share > PAPER[1] else "below"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def saved(before: float, after: float) -> str:
    return f"{100 * (1 - after / before):.2f} %"


# ------------------------------------------------------------------------------------------------ the paper's block


def measured_rows(steps: Sequence[int], windows: Sequence[int], tokens: int) -> list[list[str]]:
    """The reference GPT-2, converted and not trained."""
    rows = []
    for t in steps:
        done = compile_model(MODEL, steps=t)
        for window in windows:
            text = tokens_from(TEXT, done.tokenizer, window, tokens, done.program.info.vocab_size)
            rows.append(measured_row(t, window, measure_energy(done.program, done.analog, text)))
    return rows


def measured_row(steps: int, window: int, report: EnergyReport) -> list[str]:
    block, (asa, ssa) = report.attention(), report.block()
    (cheap, dear), (cheaper, dearer) = (energies(report.pricing, nodes) for nodes in (asa, ssa))
    rate = block["steps_times_rate"]
    return [
        str(steps), str(window), f"{rate:.3f}", f"{cheap / 1e6:.3f}", f"{cheaper / 1e6:.3f}", saved(cheap, cheaper), place(cheap, cheaper),
        f"{dear / 1e6:.2f}", f"{dearer / 1e6:.2f}", saved(dear, dearer),
    ]  # fmt: skip


def shape_rows(steps: Sequence[int], windows: Sequence[int], rates: Sequence[float]) -> list[list[str]]:
    """GPT-2 small, one layer; the shares are those of medium and large, too, whose heads have the same size."""
    _, width, heads = SIZES["small"]
    price, rows = pricing(), []
    for t in steps:
        for window in windows:
            asa = per_token([softmax_attention(window, width, heads)], window)
            for rate in rates:
                ssa = per_token(spiking_attention(window, width, heads, t, rate), window)
                (cheap, dear), (cheaper, dearer) = energies(price, asa), energies(price, ssa)
                product = ssa[0].counts.acs / asa[0].counts.macs
                shares = (saved(cheap, cheaper), place(cheap, cheaper), saved(dear, dearer))
                rows.append([str(t), str(window), f"{rate:g}", f"{product:.3f}", *shares])
    return rows


def size_rows(steps: int, window: int, rate: float) -> list[list[str]]:
    """The attention blocks of all layers of each size, per token."""
    price, rows = pricing(), []
    for name, (layers, width, heads) in SIZES.items():
        asa = per_token([softmax_attention(window, width, heads)], window, layers)
        ssa = per_token(spiking_attention(window, width, heads, steps, rate), window, layers)
        (cheap, dear), (cheaper, dearer) = energies(price, asa), energies(price, ssa)
        rows.append([
            name, f"{cheap / 1e6:,.2f}", f"{cheaper / 1e6:,.2f}", saved(cheap, cheaper), f"{dear / 1e6:,.1f}", f"{dearer / 1e6:,.1f}",
            saved(dear, dearer),
        ])  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------ SDLLM's row


def llama_layers(tokens: int, steps: int = 0, rate: float = 0.0) -> list[NodeCounts]:
    """Linear layers of one decoder layer of LLaMA-2-7B, and the neurons in front of them if there are steps: four populations per layer,
    in front of Q, K and V, of the output projection, of gate and up, of down."""
    width, ffn = LLAMA["width"], LLAMA["ffn"]
    shapes = [(width, width)] * 4 + [(width, ffn)] * 2 + [(ffn, width)]
    layers = [linear(tokens, i, o, steps, rate, "ternary") for i, o in shapes]
    encoders = [neurons(tokens, n, steps, rate, "ternary") for n in (width, width, width, ffn)] if steps else []
    return [*layers, *encoders]


def llama_macs(tokens: int, *, causal: bool, head: bool) -> float:
    """Multiply-accumulates of a window."""
    layers, width, vocabulary = LLAMA["layers"], LLAMA["width"], LLAMA["vocabulary"]
    attention = softmax_attention(tokens, width, LLAMA["heads"]).counts
    each = sum(n.counts.macs for n in llama_layers(tokens)) + (attention.macs if causal else attention.dense_macs)
    return layers * each + head * linear(tokens, width, vocabulary).counts.macs


def convention_rows(tokens: int) -> list[list[str]]:
    """What 31.77 J could have been counted of."""
    rows = []
    for causal in (False, True):
        for head in (False, True):
            macs = llama_macs(tokens, causal=causal, head=head)
            attention = "j <= i" if causal else "all L x L scores"
            rows.append([attention, "yes" if head else "no", f"{macs / 1e12:.4f}", f"{4.6e-12 * macs:.2f}"])
    return rows


def needed_events(joules: float, tokens: int, accumulate: float) -> float:
    """Spikes per value at which all products, attention included, take so many joules at ``accumulate`` [pJ] each."""
    return joules / (accumulate * 1e-12 * llama_macs(tokens, causal=False, head=False))


def llama_rows(tokens: int, steps: int, events: float) -> list[list[str]]:
    """Linear layers of LLaMA-2-7B per window: dense in fp32, in int8, and driven by ternary spikes in 8-bit arithmetic."""
    dense, train = llama_layers(tokens), llama_layers(tokens, steps, events / steps)
    rows = []
    for memory, reuse in (("horowitz-45nm-sram", 1), ("horowitz-45nm-dram", 1), ("horowitz-45nm-dram", tokens)):
        for name, constants, nodes, together in (
            ("fp32", "fp32", dense, False), ("int8", "int8", dense, False),
            ("spikes", "int8", train, False), ("spikes, steps together", "int8", train, True),
        ):  # fmt: skip
            price = pricing(f"horowitz-45nm-{constants}", memory, reuse)
            price = replace(price, memory=replace(price.memory, steps=together))
            compute, both = energies(price, [n * LLAMA["layers"] for n in nodes])
            rows.append([memory, str(reuse), name, f"{compute / 1e12:.3f}", f"{both / 1e12:,.2f}"])
    return rows


# ------------------------------------------------------------------------------------------------ the page


def shapes_text() -> str:
    tokens, most = 1024, 7
    joules = 4.6e-12 * llama_macs(tokens, causal=False, head=False)
    fp32, eighth = needed_events(0.67, tokens, 0.9), needed_events(0.67, tokens, 0.9 / 8)
    return "\n\n".join([
        "### By shapes and stated rates",
        "GPT-2 small, medium and large have heads of 64 channels, so the shares are the same for all three; Q, K and V are binary with "
        "independent spikes of one rate, without a leak and without an output neuron. 45 nm, fp32, decoding; memory is "
        "`horowitz-45nm-sram`.",
        table(["T", "L", "rate", "T·r", "saved, compute", "paper's range", "saved with memory"],
              shape_rows((2, 4, 8), (128, 1024), (0.1, 0.2, 0.4))),
        "All layers, T = 4, L = 1,024, rate 0.2, µJ per token:",
        table(["GPT-2", "ASA", "SSA", "saved", "ASA with memory", "SSA with memory", "saved"], size_rows(4, 1024, 0.2)),
        "### SDLLM's row",
        "SDLLM (arXiv 2604.16475) reports 31.77 J for LLaMA-2-7B, 3.97 J for a low-bit network and 0.67 J for its spikes. Constants of "
        "45 nm without memory are named, and no more of how it was counted could be found. Four ways to count a window of "
        f"{tokens:,} tokens at 4.6 pJ per MAC:",
        table(["attention", "lm_head", "10^12 MACs", "J"], convention_rows(tokens)),
        f"The first is {joules:.2f} J: fp32 MACs (not FP16, as the row is called) of the linear layers of 32 blocks and of all L x L "
        "scores, masked ones included, without `lm_head` and without memory. An eighth of it is "
        f"{joules / 8:.2f} J, the low-bit network's. By that convention 0.67 J takes {fp32:.3f} spikes per value if an AC costs 0.9 pJ, "
        f"or {eighth:.3f} if the same eighth is taken of it; which of them was meant is not public.",
        f"The same linear layers by this page's conventions, J per window, with {eighth:.3f} ternary spikes per value in {most} steps "
        "(8-bit weights; attention, norms and `lm_head` left out on all sides). Where tokens share a read, steps one after another read "
        "the matrix once per step:",
        table(["memory", "tokens per read of a weight", "network", "compute", "compute and memory"], llama_rows(tokens, most, eighth)),
    ])  # fmt: skip


def measured_text(tokens: int) -> str:
    return "\n\n".join([
        "### Measured: the reference GPT-2",
        f"`examples/gpt2-books`, converted and not fine-tuned, rates on the first {tokens:,} tokens of `{TEXT.name}`, all layers, µJ per "
        "token; 45 nm, fp32, decoding; memory is `horowitz-45nm-sram`. The paper states savings of 64.71 to 85.28 %, which T·r = 1.80 to "
        "0.75 give if nothing but ACs costs; here membrane updates and the multiplications by the leak are in it.",
        table(["T", "L", "T·r", "ASA", "SSA", "saved", "paper's range", "ASA with memory", "SSA with memory", "saved"],
              measured_rows((1, 2, 4, 8), (64, 256), tokens)),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the marks of this page")
    parser.add_argument("--shapes-only", action="store_true", help="without what is measured")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens to measure rates on")
    args = parser.parse_args()
    parts = [] if args.shapes_only else [measured_text(args.tokens)]
    text = "\n\n".join([*parts, shapes_text()])
    if args.write is None:
        print(text)
        return
    page = args.write.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{args.write} has no marks {BEGIN} and {END}")
    args.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
