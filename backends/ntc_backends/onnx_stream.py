"""The streaming form of a program as ONNX: the state among the inputs and outputs, checked token by token.

``streaming.onnx`` takes ``input_ids [batch, sequence]``, the next tokens of each sequence, and one input for each part of the state;
it returns ``logits`` and, for each part ``NAME``, ``NAME_next``, which is ``NAME`` of the next call. Before the first token every part
is zero; keys and values of softmax attention (``past`` on their second axis) then have no entries. Names, types and shapes stand in
the model's inputs, and as JSON in its property ``ntc.state``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnx.checker
import onnx.shape_inference
import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import BackendError, DisagreementError
from ntc.meta import where
from ntc.program import Program
from ntc.recording import Grade, grade_of, populations
from ntc.streaming import Stream
from ntc_backends.onnx_check import Tolerance
from ntc_backends.onnx_export import publish
from ntc_backends.onnx_run import Exposed, Step
from ntc_backends.onnx_writer import EXTERNAL_BYTES

__all__ = ["STREAMING", "OnnxStreamingBackend", "check_stream"]

STREAMING = "streaming.onnx"

_CHECKED: dict[Grade, int] = {"float": 48, "integer": 256}
"""Tokens that are compared; half of them one by one. Integers need no held run, and their memory should be renewed a few times."""


class OnnxStreamingBackend:
    """Writes ``streaming.onnx``, run in ONNX Runtime piece by piece beside the program.

    Attributes:
        passes: Run over the program before it is given to this back end.
        external_bytes: Weights beyond this many bytes go to a file of their own.
        tolerance: How far the artefact may be from the program.
    """

    name = "onnx-streaming"
    files: tuple[str, ...] = (STREAMING,)
    summary = "ONNX model that takes the next tokens and a state, for generation at constant cost per token"
    passes: tuple[str, ...] = ("to-streaming",)

    def __init__(self, external_bytes: int = EXTERNAL_BYTES, tolerance: Tolerance | None = None) -> None:
        self.external_bytes = external_bytes
        self.tolerance = tolerance or Tolerance()

    def emit(self, program: Program, folder: Any, *, analog: Program | None = None, tokens: Any | None = None) -> dict[str, Any]:
        """Write the model, check it, run it beside the program; nothing is left in ``folder`` unless it agrees.

        Args:
            program: A streaming program; its tokens, if none are given, are ``program.example``.
            folder: An existing folder.
            analog: Not used.
            tokens: Token ids ``[B, L]`` to compare on.

        Raises:
            BackendError: For a node that ONNX cannot express, or a model that is broken or disagrees.
        """
        if not program.state:
            raise BackendError("onnx-streaming writes a program with a state: run the pass to-streaming on it")
        ids = program.example if tokens is None else torch.as_tensor(tokens)
        return publish(program, Path(folder), STREAMING, self.external_bytes, lambda path: check_stream(path, program, ids, self.tolerance))


def check_stream(path: Path, program: Program, tokens: Tensor, tolerance: Tolerance | None = None) -> dict[str, Any]:
    """Check a written model: its form, and what it computes piece by piece.

    Of a floating-point program each step is judged given the program's state and spikes, and how it runs on its own state is reported. A
    program of integers leaves nothing to judge: on its own state every spike, every logit and every part of the state is the program's.

    Args:
        path: The ``.onnx`` file; external weights lie beside it.
        program: The streaming program.
        tokens: Token ids ``[B, L]``; the first sequence is taken, half of it at once and half token by token.
        tolerance: Limits of a floating-point program, as those of the parallel form.

    Raises:
        BackendError: If the file is malformed or does not load.
        DisagreementError: If it does something else than the program.
    """
    try:
        onnx.checker.check_model(str(path), full_check=path.stat().st_size <= EXTERNAL_BYTES)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"the ONNX checker refuses the model: {error}") from error
    grade = grade_of(program)
    ids = tokens[:1, : _CHECKED[grade]]
    report = {"checker": "ok", "tokens": ids.numel(), "state": [part.to_json() for part in program.state]}
    if grade == "integer":
        return {**report, **_identical(path, program, ids)}
    tolerance = tolerance or Tolerance()
    free = _free(path, program, ids)
    held = _held(path, program, ids, tolerance)
    summary = (
        f"checker ok; in ONNX Runtime the same top token at {free['top1_agreement']:.2%} of {ids.numel()} tokens given piece by piece; "
        f"given equal state and spikes {held['spike_mismatches']:,} of {held['spikes']:,} spikes differ and max |delta logit| is "
        f"{held['max_abs_logit_difference']:.2g} (limit {held['limit']:.2g})"
    )
    return {**report, "tolerance": asdict(tolerance), **free, "held": held, "summary": summary}


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    """The first half at once, then one token each."""
    yield from pairwise(sorted({0, length, *range(max(1, length // 2), length)}))


def _beside(model: Exposed, program: Program, ids: Tensor, *, held: bool) -> Iterator[tuple[int, Step, Step]]:
    """Number of tokens so far, what the program does and what the model does, piece by piece.

    With ``held`` the model gets the program's state, and its readers of populations the program's spikes; else each goes on by itself.
    """
    stream, nodes = Stream(program, len(ids)), populations(program)
    own = stream.named()
    for start, stop in _pieces(ids.shape[1]):
        piece, fired, sources = ids[:, start:stop], dict[str, Tensor](), dict[str, Tensor]()

        def keep(
            node: Node, _: tuple[Any, ...], value: Any, fired: dict[str, Tensor] = fired, sources: dict[str, Tensor] = sources
        ) -> None:
            if node.name in nodes:
                fired[node.name] = value
            elif node.name in model.sources:
                sources[node.name] = value

        before = stream.named() if held else own
        expected = Step(stream(piece, keep), fired, stream.named())
        found = model.step(piece, before, {**fired, **sources} if held else None)
        own = found.state
        yield start, expected, found


def _state_names(program: Program) -> tuple[str, ...]:
    return tuple(part.name for part in program.state)


def _identical(path: Path, program: Program, ids: Tensor) -> dict[str, Any]:
    """Integers do not depend on the order of sums: nothing may differ; the first place that does is named."""
    nodes = populations(program)
    model, spikes = Exposed(path, nodes, cut=False, state=_state_names(program)), 0
    for start, expected, found in _beside(model, program, ids, held=False):
        places = f"tokens {start} ... {start + expected.logits.shape[1] - 1}"
        for name, train in expected.fired.items():
            wanted = train.sum(0, dtype=torch.int32) if name in model.counts else train
            if count := _differing(found.fired[name], wanted):
                raise DisagreementError(
                    "ONNX Runtime disagrees with the program, which computes with integers, so that nothing may differ: at "
                    f"{places} {count} of {wanted.numel()} {'counts' if name in model.counts else 'spikes'} differ at {where(nodes[name])}"
                )
            spikes += int(train.count_nonzero())
        for name, value in {"logits": expected.logits, **expected.state}.items():
            got = found.logits if name == "logits" else found.state[name]
            if count := _differing(got, value):
                raise DisagreementError(
                    "ONNX Runtime disagrees with the program, which computes with integers, so that nothing may differ: behind "
                    f"{places} {count} of {value.numel()} numbers of {name if name == 'logits' else f'the state {name}'} differ"
                )
    summary = f"checker ok; all logits, spikes and states at {ids.numel():,} tokens given piece by piece identical in ONNX Runtime"
    return {"max_abs_logit_difference": 0.0, "top1_agreement": 1.0, "spikes": spikes, "summary": summary}


def _differing(got: Tensor, wanted: Tensor) -> int:
    """How many numbers differ; all of them in another shape or dtype."""
    return int((got != wanted).sum()) if (got.shape, got.dtype) == (wanted.shape, wanted.dtype) else max(1, wanted.numel())


def _free(path: Path, program: Program, ids: Tensor) -> dict[str, Any]:
    """The model beside the program, each on its own state."""
    difference, same = 0.0, 0
    for _, expected, found in _beside(Exposed(path, {}, cut=False, state=_state_names(program)), program, ids, held=False):
        difference = max(difference, float((found.logits - expected.logits).abs().max()))
        same += int((found.logits.argmax(-1) == expected.logits.argmax(-1)).sum())
    return {"max_abs_logit_difference": difference, "top1_agreement": same / ids.numel()}


def _held(path: Path, program: Program, ids: Tensor, tolerance: Tolerance) -> dict[str, Any]:
    """Each step by itself: from the program's state, with every population's readers held to its spikes."""
    trains = populations(program)
    model = Exposed(path, trains, cut=True, state=_state_names(program))
    moved, sizes = (dict.fromkeys(["logits", *(f"{part.name}_next" for part in program.state)], 0.0) for _ in range(2))
    mismatches, total = dict.fromkeys(trains, 0), dict.fromkeys(trains, 0)
    for _, expected, found in _beside(model, program, ids, held=True):
        pairs = {"logits": (expected.logits, found.logits)}
        pairs |= {f"{name}_next": (value, found.state[name]) for name, value in expected.state.items()}
        for name, (value, got) in pairs.items():
            sizes[name] = max(sizes[name], float(value.abs().max()))
            moved[name] = max(moved[name], float((got - value).abs().max()) if got.shape == value.shape else math.inf)
        for name, train in expected.fired.items():
            mismatches[name] += int((found.fired[name] != train).sum())
            total[name] += train.numel()
    for name, count in mismatches.items():
        allowed = max(tolerance.ties, math.floor(tolerance.spikes * total[name]))
        if count > allowed:
            raise DisagreementError(
                f"ONNX Runtime disagrees with the program: on equal input {count} of {total[name]} spikes differ (limit {allowed}) at "
                f"{where(trains[name])}"
            )
    for name, difference in moved.items():
        limit = tolerance.logits * (1.0 + sizes[name])
        if not difference <= limit:  # also if it is NaN
            raise DisagreementError(
                f"ONNX Runtime disagrees with the program: from the same state and spikes {name} differs by {difference:.3g} "
                f"(limit {limit:.3g})"
            )
    return {
        "max_abs_logit_difference": moved["logits"], "max_abs_state_difference": max(v for k, v in moved.items() if k != "logits"),
        "limit": tolerance.logits * (1.0 + sizes["logits"]), "spikes": sum(total.values()), "spike_mismatches": sum(mismatches.values()),
    }  # fmt: skip
