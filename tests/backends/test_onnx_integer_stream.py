"""The streaming ONNX file of an integer program: one token and a state of int32 in, the parallel program's own integers out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_programs import CHANNELS, VOCABULARY, Builder, block, integers, ntc, streaming
from onnx_cases import session
from programs import quantized
from torch import Tensor

from ntc.errors import BackendError, DisagreementError
from ntc.program import Program
from ntc.registry import backend
from ntc.testing import example_ids
from ntc_backends.onnx_aten import by_torch
from ntc_backends.onnx_stream import STREAMING, OnnxStreamingBackend, check_stream
from ntc_backends.onnx_writer import Writer, save

ONE = torch.ones(1, dtype=torch.int32)


def in_pieces(path: Path, ids: Tensor, cuts: set[int]) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Logits and last state, by code that is not the back end's: the state goes from output to input by name."""
    runtime, rows = session(path), []
    kinds = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
    state = {
        i.name: np.zeros([len(ids) if size == "batch" else size for size in i.shape], kinds[i.type])
        for i in runtime.get_inputs() if i.name != "input_ids"
    }  # fmt: skip
    for start, stop in pairwise(sorted({0, ids.shape[1], *cuts})):
        logits, *after = runtime.run(["logits", *(f"{name}_next" for name in state)], {"input_ids": ids[:, start:stop].numpy(), **state})
        rows.append(torch.from_numpy(logits))
        state = dict(zip(state, after, strict=True))
    return torch.cat(rows, 1), state


@pytest.mark.parametrize("options", [{}, {"leak": False}, {"neuron": False, "signed": False, "kv_heads": 1}])
def test_hundreds_of_tokens_one_by_one_are_those_of_the_whole_text(options: dict[str, Any], tmp_path: Path) -> None:
    program = block(context=320, **options)
    OnnxStreamingBackend().emit(streaming(program), tmp_path)
    ids = torch.randint(0, VOCABULARY, (2, 320), generator=torch.Generator().manual_seed(1))
    expected = program(ids)
    for cuts in (set(range(320)), {150}, {1, 2, 5, 6, 130}):
        logits, state = in_pieces(tmp_path / STREAMING, ids, cuts)
        assert torch.equal(logits, expected)
        assert int(state["position"][0]) == 320
        assert {name: value.dtype.name for name, value in state.items()} == {"position": "int64", "attention_memory": "int32"}
        assert state["attention_memory"].any()


@pytest.mark.parametrize("name", ["learned position, current, not folded", "leak, ternary, spikes"])
def test_a_quantized_model(name: str, tmp_path: Path) -> None:
    """With rows of multipliers by position, and with a leak; the check of the back end sees every spike."""
    program = quantized(name)
    report = OnnxStreamingBackend().emit(streaming(program), tmp_path, tokens=example_ids(length=24))
    assert report["summary"] == "checker ok; all logits, spikes and states at 24 tokens given piece by piece identical in ONNX Runtime"
    assert report["spikes"] > 0
    ids = example_ids(length=24, batch=3, seed=8)
    assert torch.equal(in_pieces(tmp_path / STREAMING, ids, {7, *range(16, 24)})[0], program(ids))


# ------------------------------------------------------------------------------------------------ op by op, at extremes


def written(program: Program, folder: Path) -> tuple[Path, set[str]]:
    """The file of the streaming form, and the functions that were chosen."""
    writer = Writer(streaming(program), by_torch)
    writer.run()
    model = writer.model()
    save(model, writer.weights, folder, 1 << 40, STREAMING)
    onnx.checker.check_model(str(folder / STREAMING), full_check=True)
    return folder / STREAMING, {f"{f.name}.{f.overload}" for f in model.functions}


def attended(seed: int, period: int, bits: int, heads: tuple[int, int], shift: int, leak: bool, least: float = 0.0) -> Program:
    """``least``: least share of the memory that a renewal keeps."""
    growth = integers(2 ** (bits - 1), 2**bits, heads[1], period if leak else 1, seed=seed)
    renewal = integers(int(least * 2**shift), int(0.9 * 2**shift), heads[1], seed=seed + 1) if leak else None
    b = Builder(integers(-100, 100, VOCABULARY, CHANNELS, seed=seed), 30)

    def train(n: int) -> Any:
        x = b.call(ntc.integer_linear.default, b.embedded, integers(-9, 9, CHANNELS // 2 * n, CHANNELS, seed=seed + n, dtype=torch.int8), None)
        return b.call(ntc.integer_fire.default, x, ONE * 300, ONE * 100, 2, bool(seed % 2), False)

    y = b.call(ntc.integer_attention.default, train(heads[0]), train(heads[1]), train(heads[1]), *heads, growth, renewal, shift, name="attention")
    rows = integers(1, 9, 4, CHANNELS // 2 * heads[0], seed=seed)
    y = b.call(ntc.requantize.default, b.call(ntc.decode.default, b.call(ntc.requantize.default, y, rows, 3, -(2**27), 2**27), "count"), ONE, 6, -(2**23), 2**23)
    return b.program(b.call(ntc.from_integer.default, y, 0))


@settings(max_examples=10)
@given(
    st.integers(0, 2**20), st.sampled_from([1, 2, 8]), st.sampled_from([4, 14, 20]), st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    st.sampled_from([8, 30]), st.booleans(), st.sets(st.integers(1, 29), max_size=6),
)  # fmt: skip
def test_attention_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, seed: int, period: int, bits: int, heads: tuple[int, int], shift: int, leak: bool, cuts: set[int]
) -> None:
    program = attended(seed, period, bits, heads, shift, leak)
    path, _ = written(program, tmp_path_factory.mktemp("attention"))
    ids = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(in_pieces(path, ids, cuts)[0], program(ids))


@pytest.mark.parametrize(("bits", "shift", "leak", "word"), [
    (6, 8, True, "renewal.float32.float32.float32.float32.float64"),
    (19, 8, True, "renewal.float32.float32.float32.float64.float64"),  # the counts of one period are below 2**24, those of all are not
    (23, 30, True, "renewal.float32.float64.float64.float64.int64"),  # M times 2**30 is beyond 2**53
    (6, 8, False, "float32.float32.float32.float32"),
    (22, 8, False, "float32.float64.float64.float64"),
])  # fmt: skip
def test_the_widths_choose_the_arithmetic(bits: int, shift: int, leak: bool, word: str, tmp_path: Path) -> None:
    program = attended(3, 4, bits, (2, 1), shift, leak, 0.85)
    path, chosen = written(program, tmp_path)
    assert f"IntegerAttentionStream.{word}" in chosen
    ids = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(4))
    assert torch.equal(in_pieces(path, ids, {3, 4, 5, 20})[0], program(ids))


@pytest.mark.parametrize(("bits", "word"), [(20, "float64"), (31, "int64")])
def test_rescaling_by_position_goes_on(bits: int, word: str, tmp_path: Path) -> None:
    b = Builder(integers(-(2**bits) + 1, 2**bits - 1, VOCABULARY, CHANNELS))
    y = b.call(ntc.requantize.default, b.embedded, integers(-(2**30), 2**30, 4, CHANNELS), 38, -(2**23), 2**23)
    program = b.program(b.call(ntc.from_integer.default, y, 0))
    path, chosen = written(program, tmp_path)
    assert f"Requantize.position.start.{word}.int32" in chosen
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
    for cuts in (set(range(24)), {3, 11}):
        assert torch.equal(in_pieces(path, ids, cuts)[0], program(ids))


# ------------------------------------------------------------------------------------------------ the check can fail


@cache
def leaking() -> Program:
    return streaming(block(context=64))


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("right")
    OnnxStreamingBackend().emit(leaking(), folder)
    return folder / STREAMING


def constant(position: int, at: tuple[int, ...], more: int = 1) -> Callable[[onnx.ModelProto], None]:
    """Another element in a constant of the attention or of what rescales its counts."""

    def change(model: onnx.ModelProto) -> None:
        (call,) = [n for n in model.graph.node if n.op_type == "IntegerAttentionStream"]
        (rescaled,) = [n for n in model.graph.node if "position" in n.overload]
        name = [*call.input, *rescaled.input][position]
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        value = onnx.numpy_helper.to_array(tensor).copy()
        value[at] += more
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))

    return change


def forgetful(model: onnx.ModelProto) -> None:
    (node,) = [n for n in model.graph.node if list(n.output) == ["attention_memory_next"]]
    node.input[0] = "attention_memory"


def never_renewed(model: onnx.ModelProto) -> None:
    (function,) = [f for f in model.functions if f.name == "IntegerAttentionStream"]
    (loop,) = [n for n in function.node if n.op_type == "Loop"]
    (test,) = [n for n in loop.attribute[0].g.node if n.output[0] == "begins_period"]
    test.op_type = "Less"


def from_the_beginning(model: onnx.ModelProto) -> None:
    (function,) = [f for f in model.functions if "position" in f.overload]
    (node,) = [n for n in function.node if n.output[0] == "positions"]
    node.op_type, node.input[:] = "Identity", [node.input[0]]


@pytest.mark.parametrize(("change", "message"), [
    (constant(4, (0, 2)), r"\d+ of \d+ spikes differ at node %ssa|numbers of the state attention_memory differ"),
    (constant(5, (1,)), r"numbers of the state attention_memory differ|spikes differ at node %ssa"),
    (constant(8, (1, 3), 30), "spikes differ at node %ssa|numbers of logits differ"),
    (forgetful, "behind tokens 0 ... 31 .* numbers of the state attention_memory differ"),
    (never_renewed, "spikes differ at node %ssa|numbers of the state attention_memory differ"),
    (from_the_beginning, "spikes differ at node %ssa"),
])  # fmt: skip
def test_a_file_that_is_wrong_is_refused(change: Any, message: str, right: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(6))
    report = check_stream(right, leaking(), ids)
    assert (report["tokens"], report["max_abs_logit_difference"]) == (64, 0.0)
    model = onnx.load(right)
    change(model)
    onnx.save(model, tmp_path / STREAMING)
    with pytest.raises(DisagreementError, match="computes with integers, so that nothing may differ: .*" + f"({message})"):
        check_stream(tmp_path / STREAMING, leaking(), ids)


def test_the_parallel_back_end_names_the_other() -> None:
    with pytest.raises(BackendError, match="onnx-streaming writes it"):
        backend("onnx").emit(leaking(), Path("."))
