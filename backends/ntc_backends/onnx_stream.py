"""The streaming form of a program as ONNX: the state among the inputs and outputs, checked token by token.

``streaming.onnx`` takes ``input_ids [batch, sequence]``, the next tokens of each sequence, and one input for each part of the state;
it returns ``logits`` and, for each part ``NAME``, ``NAME_next``, which is ``NAME`` of the next call. Before the first token every part
is zero; keys and values of softmax attention (``past`` on their second axis) then have no entries. Names, types and shapes stand in
the model's inputs, and as JSON in its property ``ntc.state``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnx.checker
import onnx.shape_inference
import torch
from onnx import helper
from torch import Tensor
from torch.fx import Node

from ntc.errors import BackendError
from ntc.meta import where
from ntc.ops import spec_of
from ntc.program import Program
from ntc.streaming import Stream
from ntc_backends.onnx_check import Tolerance
from ntc_backends.onnx_export import publish
from ntc_backends.onnx_writer import EXTERNAL_BYTES, onnx_type

__all__ = ["STREAMING", "OnnxStreamingBackend", "check_stream"]

STREAMING = "streaming.onnx"

_CHECKED = 48
"""Tokens that are compared; half of them one by one."""


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
        if program.results[0].target is torch.ops.ntc.from_integer.default:
            raise BackendError("onnx-streaming does not write programs of integers yet: --emit onnx writes their parallel form")
        ids = program.example if tokens is None else torch.as_tensor(tokens)
        return publish(program, Path(folder), STREAMING, self.external_bytes, lambda path: check_stream(path, program, ids, self.tolerance))


def check_stream(path: Path, program: Program, tokens: Tensor, tolerance: Tolerance | None = None) -> dict[str, Any]:
    """Check a written model: its form, each of its steps given the program's state and spikes, and how it runs on its own state.

    Args:
        path: The ``.onnx`` file; external weights lie beside it.
        program: The streaming program.
        tokens: Token ids ``[B, L]``; the first sequence is taken, half of it at once and half token by token.
        tolerance: Limits, as those of the parallel form.

    Raises:
        BackendError: If the file is malformed, does not load, or disagrees.
    """
    tolerance = tolerance or Tolerance()
    try:
        onnx.checker.check_model(str(path), full_check=path.stat().st_size <= EXTERNAL_BYTES)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"the ONNX checker refuses the model: {error}") from error
    ids = tokens[:1, :_CHECKED]
    report = {"checker": "ok", "tokens": ids.numel(), "state": [part.to_json() for part in program.state], "tolerance": asdict(tolerance)}
    free = _free(path, program, ids)
    held = _held(path, program, ids, tolerance)
    summary = (
        f"checker ok; in ONNX Runtime the same top token at {free['top1_agreement']:.2%} of {ids.numel()} tokens given piece by piece; "
        f"given equal state and spikes {held['spike_mismatches']:,} of {held['spikes']:,} spikes differ and max |delta logit| is "
        f"{held['max_abs_logit_difference']:.2g} (limit {held['limit']:.2g})"
    )
    return {**report, **free, "held": held, "summary": summary}


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    """The first half at once, then one token each."""
    yield from pairwise(sorted({0, length, *range(max(1, length // 2), length)}))


def _free(path: Path, program: Program, ids: Tensor) -> dict[str, Any]:
    """The model beside the program, each on its own state."""
    runtime, stream = _session(path), Stream(program, len(ids))
    state = {part.name: part.initial(len(ids)).numpy() for part in program.state}
    difference, same = 0.0, 0
    for start, stop in _pieces(ids.shape[1]):
        piece = ids[:, start:stop]
        expected = stream(piece)
        names = ["logits", *(f"{name}_next" for name in state)]
        logits, *after = runtime.run(names, {"input_ids": piece.to(torch.int64).numpy(), **state})
        state = dict(zip(state, after, strict=True))
        found = torch.from_numpy(logits)
        difference = max(difference, float((found - expected).abs().max()))
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
    return {"max_abs_logit_difference": difference, "top1_agreement": same / ids.numel()}


class _Step:
    """One call of the model, cut behind its populations: what they fire is an output, what their readers see is an input.

    Args:
        path: The model's file, which is left as it is.
        trains: Populations of the program by name; nodes of the model have the same names.
    """

    def __init__(self, path: Path, trains: Mapping[str, Node]) -> None:
        model = onnx.load(path, load_external_data=False)
        nodes, self.values = {n.name: n for n in model.graph.node}, dict[str, str]()
        for name, node in trains.items():
            if name not in nodes:
                raise BackendError(f"the model has no node {name}")
            value, given = nodes[name].output[0], node.meta["val"]
            shape = [int(given.shape[0]), "batch", "sequence", int(given.shape[-1])]
            model.graph.input.append(helper.make_tensor_value_info(value, onnx_type(given.dtype), shape))
            nodes[name].output[0] = own = f"{value}.own"
            model.graph.output.append(helper.make_tensor_value_info(own, onnx_type(given.dtype), shape))
            self.values[name] = value
        kept = [i for i in model.graph.value_info if i.name not in self.values.values()]
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)
        self.names = [o.name for o in model.graph.output]
        self.session = _session(model.SerializeToString(), path.parent)

    def __call__(
        self, ids: Tensor, state: Mapping[str, Tensor], trains: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits and new state by name, and what each population fires."""
        given = {"input_ids": ids.to(torch.int64), **state, **{self.values[name]: train for name, train in trains.items()}}
        results = self.session.run(self.names, {name: value.numpy() for name, value in given.items()})
        found = dict(zip(self.names, map(torch.from_numpy, results), strict=True))
        return found, {name: found[f"{value}.own"] for name, value in self.values.items()}


def _session(model: Path | bytes, folder: Path | None = None) -> Any:
    """An ONNX Runtime session; ``folder`` is where external weights of a model in memory lie."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return onnxruntime.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds
        raise BackendError(f"ONNX Runtime cannot load the model: {error}") from error


def _held(path: Path, program: Program, ids: Tensor, tolerance: Tolerance) -> dict[str, Any]:
    """Each step by itself: from the program's state, with every population's readers held to its spikes."""
    trains = {n.name: n for n in program.graph.nodes if (spec := spec_of(n)) is not None and spec.element == "population"}
    model, stream, largest, spikes = _Step(path, trains), Stream(program, len(ids)), 0.0, 0
    moved, mismatches = dict.fromkeys(["logits", *(f"{part.name}_next" for part in program.state)], 0.0), dict.fromkeys(trains, 0)
    total = dict.fromkeys(trains, 0)
    sizes = dict.fromkeys(moved, 0.0)
    for start, stop in _pieces(ids.shape[1]):
        fired: dict[str, Tensor] = {}

        def keep(node: Node, _: tuple[Any, ...], value: Any, fired: dict[str, Tensor] = fired) -> None:
            if node.name in trains:
                fired[node.name] = value

        before = stream.named()
        logits = stream(ids[:, start:stop], keep)
        expected = {"logits": logits, **{f"{name}_next": value for name, value in stream.named().items()}}
        found, own = model(ids[:, start:stop], before, fired)
        for name, value in expected.items():
            sizes[name] = max(sizes[name], float(value.abs().max()))
            moved[name] = max(moved[name], float((found[name] - value).abs().max()) if found[name].shape == value.shape else math.inf)
        for name, train in fired.items():
            mismatches[name] += int((own[name] != train).sum())
            total[name] += train.numel()
        largest, spikes = max(largest, float(logits.abs().max())), sum(total.values())
    for name, count in mismatches.items():
        allowed = max(tolerance.ties, math.floor(tolerance.spikes * total[name]))
        if count > allowed:
            raise BackendError(
                f"ONNX Runtime disagrees with the program: on equal input {count} of {total[name]} spikes differ (limit {allowed}) at "
                f"{where(trains[name])}"
            )
    for name, difference in moved.items():
        limit = tolerance.logits * (1.0 + sizes[name])
        if not difference <= limit:  # also if it is NaN
            raise BackendError(
                f"ONNX Runtime disagrees with the program: from the same state and spikes {name} differs by {difference:.3g} "
                f"(limit {limit:.3g})"
            )
    return {
        "max_abs_logit_difference": moved["logits"], "max_abs_state_difference": max(v for k, v in moved.items() if k != "logits"),
        "limit": tolerance.logits * (1.0 + largest), "spikes": spikes, "spike_mismatches": sum(mismatches.values()),
    }  # fmt: skip
