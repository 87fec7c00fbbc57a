"""What the tests of ONNX files have in common: ops alone in ONNX Runtime, and small compiled programs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import Tensor, nn

import ntc
import ntc.ops as ops
from ntc.program import Program
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.testing import example_ids, tiny_gpt2
from ntc_backends.onnx_writer import OPSET, functions_in


def run_function(op: Any, tensors: Sequence[Tensor], ranks: Sequence[int], overload: str = "", **attributes: Any) -> list[Tensor]:
    """One call of an op's ONNX function in ONNX Runtime, nothing else in the model; ``ranks`` of its results."""
    (function,) = [f for f in functions_in(ops.SPECS[op].onnx) if f.overload == overload]
    known = {"comparison": ">=", "reset": "soft", **attributes}
    given = {k: known[k] for k in function.attribute}
    node = helper.make_node(function.name, list(function.input), list(function.output), domain="ntc", **given)
    node.overload = function.overload
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(str(t.dtype).removeprefix("torch."))), [None] * t.dim())
        for name, t in zip(function.input, tensors, strict=True)
    ]
    outputs = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [None] * r) for n, r in zip(function.output, ranks, strict=True)]
    model = helper.make_model(
        helper.make_graph([node], "op", inputs, outputs), functions=[function], ir_version=10,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("ntc", 1)],
    )  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    return [torch.from_numpy(x) for x in session(model).run(None, {i: t.numpy() for i, t in zip(function.input, tensors, strict=True)})]


def run_op(op: Any, tensors: Sequence[Tensor], rank: int, overload: str = "", **attributes: Any) -> Tensor:
    """The same of an op with one result."""
    return run_function(op, tensors, [rank], overload, **attributes)[0]


def session(model: onnx.ModelProto | Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def numbers(kind: str, *shape: int) -> Tensor:
    x = torch.randn(*shape) * 1.5
    return torch.round(x * 16) / 16 if kind == "dyadic" else x


def thresholds(kind: str, channels: int) -> Tensor:
    return torch.randint(1, 32, (channels,)) / 16 if kind == "dyadic" else torch.rand(channels) + 0.3


SHAPES = [(2, 5, 12), (1, 1, 8), (3, 9, 20)]
KINDS = ["random", "dyadic"]  # dyadic numbers meet the threshold exactly, all the time


def words(**flags: bool) -> str:
    return ".".join(word for word, on in flags.items() if on)


@cache
def gpt2() -> Program:
    return ntc.capture(tiny_gpt2())


def compiled(name: str = "neurtransformer", model: nn.Module | None = None, last: str = "", **options: Any) -> Program:
    """A tiny program; ``last`` leaves out the passes from that one on."""
    ids = example_ids(batch=4, length=16)
    program = ntc.capture(model, example=ids) if model is not None else gpt2()
    passes = recipe(name).build(Settings(options), find_pass)
    names = [type(p).name for p in passes]
    return ntc.run_pipeline(program, passes[: names.index(last)] if last else passes, ntc.Context(ntc.Calibration((ids,), "random", "")))
