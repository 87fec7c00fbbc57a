"""A program as one ONNX model that stock ONNX Runtime runs, neurons still visible as neurons.

Layout of the file:

- ATen nodes become nodes of the standard opset; every op of ours becomes one call of a *local function* (``ntc::IntegrateFire``,
  ``ntc::SpikingAttention`` ...) whose body, in standard ops, is in the file. ONNX Runtime inlines it, so no custom library is
  needed (1.28 or newer: older ones do not infer shapes through a ``Scan`` in a function); a mapping tool reads the call: its name,
  overload (the variant: ``signed.timed``), inputs (current, threshold, v0) and attributes (T, ``>=``, reset).
  The bodies stand with the ops (``OpSpec.onnx``).
- An ATen op that this writer does not know is exported alone by ``torch.onnx`` and becomes a local function in domain ``aten``.
- ``input_ids [batch, sequence]`` int64 in, ``logits [batch, sequence, V]`` out. Initializers are named as the program's tensors,
  tied ones stored once; nodes as the program's nodes (parts of a node as ``node.part``), with module, passes and type in
  ``metadata_props``.
- The same program gives the same bytes. No path of this computer and no stack trace gets in.

Agreement: each op of ours gives the same bits as its kernel (``decode`` and ``attention`` of real values: to rounding). The linear
layers and norms between them are added up in another order than torch does it, and a neuron makes a whole spike of one rounding
error when its membrane lies at the threshold. What is promised of a float program, and what is measured: see ``Tolerance``.
"""
from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from ntc.errors import BackendError
from ntc.program import Program
from ntc_backends import onnx_integer as onnx_integer  # enters its handlers
from ntc_backends import onnx_integer_stream as onnx_integer_stream  # likewise
from ntc_backends.onnx_aten import by_torch
from ntc_backends.onnx_check import Tolerance, check, verdict
from ntc_backends.onnx_writer import EXTERNAL_BYTES, MODEL, OPSET, Writer, save

__all__ = ["OnnxBackend", "build", "publish"]

logger = logging.getLogger(__name__)

class OnnxBackend:
    """Writes ``model.onnx`` (and ``model.onnx.data`` for large weights), checked and run in ONNX Runtime.

    Attributes:
        external_bytes: Weights beyond this many bytes go to a file of their own.
        tolerance: How far the artefact may be from the program.
    """

    name = "onnx"
    files: tuple[str, ...] = (MODEL,)
    summary = "ONNX model for stock ONNX Runtime, neurons as named functions of domain ntc"

    def __init__(self, external_bytes: int = EXTERNAL_BYTES, tolerance: Tolerance | None = None) -> None:
        self.external_bytes = external_bytes
        self.tolerance = tolerance or Tolerance()

    def emit(self, program: Program, folder: Any, *, analog: Program | None = None, tokens: Any | None = None) -> dict[str, Any]:
        """Write the model, check it, run it beside the program; nothing is left in ``folder`` unless it agrees.

        Args:
            program: The program; its tokens, if none are given, are ``program.example``.
            folder: An existing folder.
            analog: Not used.
            tokens: Token ids ``[B, L]`` to compare on.

        Raises:
            BackendError: For a node that ONNX cannot express, or a model that is broken or disagrees.
        """
        if program.state:
            raise BackendError("a streaming program has a state: onnx-streaming writes it, with inputs and outputs for the state")
        ids = program.example if tokens is None else torch.as_tensor(tokens)

        def judge(path: Path) -> dict[str, Any]:
            report = check(path, program, ids, self.tolerance)
            return {**report, "summary": verdict(report)}

        return publish(program, Path(folder), MODEL, self.external_bytes, judge)


def publish(
    program: Program, target: Path, name: str, external_bytes: int, judge: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Write a model beside its place, let it be judged, and put it there; returns the judgement with the facts of the file.

    Args:
        program: The program.
        target: An existing folder.
        name: Of the file.
        external_bytes: Weights beyond this many bytes go to ``NAME.data``.
        judge: Compares the file with the program; raises ``BackendError`` if it disagrees.

    Raises:
        BackendError: If the program cannot be expressed, or what ``judge`` says.
    """
    model, weights = build(program)
    data = f"{name}.data"
    with _workspace(target) as work:
        external = save(model, weights, work, external_bytes, name)
        functions = sorted({f"{f.domain}::{f.name}" for f in model.functions})
        del model, weights  # ONNX Runtime brings its own copy
        report = judge(work / name)
        report |= {
            "opset": OPSET, "functions": functions,
            "files": {p.name: p.stat().st_size for p in sorted(work.iterdir()) if p.name in (name, data)},
        }  # fmt: skip
        if external:
            os.replace(work / data, target / data)  # first: a model without its weights would be half an artefact
        os.replace(work / name, target / name)
        if not external:
            (target / data).unlink(missing_ok=True)
    logger.info("onnx %s", report)
    return report


class _workspace:  # noqa: N801
    """A folder beside the target, gone afterwards, so that a rename publishes what is inside."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        try:
            self.path = Path(tempfile.mkdtemp(prefix=".onnx-", dir=self.target))
        except OSError as error:
            raise BackendError(f"cannot write into {self.target}: {error.strerror}") from error
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def build(program: Program) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    """The model without its weights, and the weights by initializer name in file order.

    Raises:
        BackendError: Names the node that ONNX cannot express.
    """
    writer = Writer(program, by_torch)
    writer.run()
    return writer.model(), writer.weights
