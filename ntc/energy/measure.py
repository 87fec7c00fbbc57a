"""Counts of a program on a text: it runs, and what it does is watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

from ntc.energy.booking import booked
from ntc.energy.constants import Constants, load_constants
from ntc.energy.hierarchy import Memory, load_memory
from ntc.energy.projections import attention_projections
from ntc.energy.report import EnergyReport, Side
from ntc.observe import Activity, count_by_shape
from ntc.ops import spec_of
from ntc.ops.events import zeros_in
from ntc.program import Program, check_ids, interpret
from ntc.text import Tokens

__all__ = ["count_by_distinct_shape", "measure_energy"]

_LARGEST_LOSS = 700.0  # nats: its exponential is the last one that a float holds


def measure_energy(
    program: Program,
    analog: Program,
    tokens: Tokens,
    constants: Constants | None = None,
    memory: Memory | None = None,
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
        memory: Energy of moving data; by default 45 nm, everything in SRAM on the chip.
        batch: Windows per run.
        progress: Called with (windows done, windows).

    Raises:
        DataError: If the windows do not fit one of the two.
    """
    for one in (program, analog):
        check_ids(tokens.windows, one.info)
    activity, losses = Activity(), []
    done = 0
    for rows in tokens.batches(batch):
        activity.start(rows)
        with torch.no_grad():
            losses.append(_next_token(interpret(program, rows, activity.visit), rows))
        done += len(rows)
        progress(done, len(tokens.windows))
    shapes = [(int(rows.shape[0]), int(rows.shape[1])) for rows in tokens.batches(batch)]
    original = count_by_distinct_shape(analog, shapes)
    return EnergyReport(
        ann=Side(tuple(original.nodes.values()), original.tokens, attention_projections(analog), booked(analog)),
        snn=Side(tuple(activity.nodes.values()), activity.tokens, attention_projections(program), booked(program)),
        constants=constants or load_constants(),
        memory=memory or load_memory(),
        steps=program.steps,
        data=tokens.description,
        data_sha256=tokens.sha256,
        window=int(tokens.windows.shape[1]),
        roles={p.name: p.role for p in activity.populations.values()},
        firing_rate=_firing_rate(activity),
        perplexity=_perplexity(torch.cat(losses)),
        stored=_stored(program),
        data_file_sha256=tokens.file_sha256,
    )


def _next_token(logits: Tensor, rows: Tensor) -> Tensor:
    """Cross entropy of the next token at each position that has one [nats]."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten().long(), reduction="none")


def _perplexity(losses: Tensor) -> float | None:
    mean = float(losses.double().mean()) if len(losses) else math.nan
    return None if math.isnan(mean) else math.exp(min(mean, _LARGEST_LOSS))


def _firing_rate(activity: Activity) -> float | None:
    """Spikes per neuron and step, over all populations."""
    populations = activity.populations.values()
    places = sum(p.neurons * p.tokens * p.steps for p in populations)
    return sum(float(p.spikes.sum()) for p in populations) / places if places else None


def _stored(program: Program) -> dict[str, float]:
    """Bytes of all tensors, and the share of zeros among the weights of layers."""
    weights = [
        program.tensor(node.args[1])
        for node in program.graph.nodes
        if (spec := spec_of(node)) is not None and spec.element == "projection" and getattr(node.args[1], "op", "") == "get_attr"
    ]
    size = sum(w.numel() for w in weights)
    zeros = sum(map(zeros_in, weights))
    bytes_held = sum(t.numel() * t.element_size() for t in program.tensors.values())
    return {"footprint": float(bytes_held), "connection_sparsity": zeros / size if size else 0.0}


def count_by_distinct_shape(analog: Program, shapes: Iterable[tuple[int, int]]) -> Activity:
    """Counts that depend on shapes only are counted once per shape and multiplied."""
    result = Activity()
    times: dict[tuple[int, int], int] = {}
    for shape in shapes:
        times[shape] = times.get(shape, 0) + 1
    for shape, number in times.items():
        once = count_by_shape(analog, [shape])
        result.tokens += once.tokens * number
        for name, row in once.nodes.items():
            result.nodes[name] = result.nodes[name] + row * number if name in result.nodes else row * number
    return result
