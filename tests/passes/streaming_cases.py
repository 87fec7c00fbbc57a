"""What the tests of to-streaming have in common: variants of spiking attention, and a sequence in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from programs import CONTEXT, calibrated
from torch import Tensor

from ntc.meta import TYPE
from ntc.ops import spec_of
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.spike_type import SpikeType
from ntc.streaming import Stream
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention
from ntc_passes.to_streaming import ToStreaming

LENGTH = 22  # of a context of 24, and more than the streaming kernel takes one by one

VARIANTS: dict[str, dict[str, Any]] = {
    **{n: {"normalizer": n} for n in ("position", "learned-position", "leak", "channel-leak", "rms", "leak-rms", "row-sum")},
    "ternary": {"normalizer": "position", "signed_query": True, "signed_key": True},
    "current": {"normalizer": "row-sum", "output": "current"},
    "lif": {"neuron": "lif", "signed_value": False, "normalizer": "leak", "percentile": 70.0},
}


def streaming(program: Program) -> Program:
    return run_pipeline(program, [ToStreaming()])


@cache
def variant(name: str) -> Program:
    replaced = run_pipeline(calibrated(n_layer=1), [ReplaceAttention.configure(VARIANTS[name])], CONTEXT)
    return run_pipeline(replaced, [InsertNeurons()], CONTEXT)


def trains(program: Program) -> list[str]:
    return [n.name for n in program.graph.nodes if isinstance(n.meta.get(TYPE), SpikeType) and spec_of(n).element == "population"]


def pieces(length: int, cuts: set[int]) -> Iterator[tuple[int, int]]:
    yield from pairwise(sorted({0, length, *cuts}))


def in_pieces(program: Program, ids: Tensor, cuts: set[int]) -> tuple[dict[str, Tensor], Tensor]:
    stream, found, rows = Stream(program, len(ids)), {}, []
    names = set(trains(program))

    def visit(node: torch.fx.Node, args: tuple[Any, ...], value: Any) -> None:
        if node.name in names:
            found.setdefault(node.name, []).append(value)

    for start, stop in pieces(ids.shape[1], cuts):
        rows.append(stream(ids[:, start:stop], visit))
    return {name: torch.cat(parts, -2) for name, parts in found.items()}, torch.cat(rows, 1)
