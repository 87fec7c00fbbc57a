"""The streaming ONNX file goes on from its state as the program does; the check finds a file that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from onnx_cases import run_function, session
from torch import Tensor

import ntc.ops as ops
from ntc.compiler import export
from ntc.errors import BackendError, DisagreementError
from ntc.pipeline import exact_limit, run_pipeline
from ntc.program import Program
from ntc.registry import backend
from ntc.streaming import Stream
from ntc.testing import example_ids
from ntc_backends.onnx_export import OnnxBackend
from ntc_backends.onnx_stream import STREAMING, OnnxStreamingBackend, check_stream
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention
from ntc_passes.to_streaming import ToStreaming
from tests.programs import CONTEXT, calibrated, canonical, nano, rates

OPS = torch.ops.ntc

# ------------------------------------------------------------------------------------------------------------- ops alone


def spikes(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape).float()


HEADS = [(4, 4), (4, 2), (4, 1)]
PIECES = [1, 2, 7]


@pytest.mark.parametrize("length", PIECES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("lead", [(3,), ()])
def test_spiking_attention_gives_the_integers_of_the_kernel(lead: tuple[int, ...], heads: int, kv_heads: int, length: int) -> None:
    q, k, v = (spikes(*lead, 2, length, n * d) for n, d in ((heads, 5), (kv_heads, 5), (kv_heads, 3)))
    state = torch.randint(-9, 10, (*lead, 2, kv_heads, 5, 3)).float()
    found = run_function(OPS.spiking_attention_stream.default, [q, k, v, state], [q.dim(), state.dim()], heads=heads, kv_heads=kv_heads)
    expected = ops.spiking_attention_stream(q, k, v, state, heads, kv_heads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(expected[1], state)


@pytest.mark.parametrize("length", PIECES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_spiking_attention_with_a_leak_agrees_to_rounding(heads: int, kv_heads: int, length: int) -> None:
    q, k, v = (spikes(3, 2, length, n * d) for n, d in ((heads, 5), (kv_heads, 5), (kv_heads, 3)))
    state = torch.randn(3, 2, kv_heads, 5, 3)
    for size in {1, kv_heads, kv_heads * 5}:
        leak = torch.rand(size) * 0.9 + 0.1
        found = run_function(OPS.spiking_attention_stream.default, [q, k, v, state, leak], [4, 5], "leak", heads=heads, kv_heads=kv_heads)
        for a, b in zip(found, ops.spiking_attention_stream(q, k, v, state, heads, kv_heads, leak), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("length", PIECES)
@pytest.mark.parametrize("past", [0, 1, 6])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_softmax_attention_agrees_to_rounding(heads: int, kv_heads: int, past: int, length: int) -> None:
    q, k, v = torch.randn(2, length, heads * 5), torch.randn(2, length, kv_heads * 5), torch.randn(2, length, kv_heads * 3)
    keys, values = torch.randn(2, past, kv_heads * 5), torch.randn(2, past, kv_heads * 3)
    given = [q, k, v, keys, values]
    found = run_function(OPS.attention_stream.default, given, [3, 3, 3], heads=heads, kv_heads=kv_heads, scale=0.7)
    expected = ops.attention_stream(*given, heads, kv_heads, 0.7)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("lead", [(3,), ()])
def test_scales_by_position_and_row_sum_give_the_bits_of_the_kernels(lead: tuple[int, ...]) -> None:
    for length in PIECES:
        x, start = torch.randn(*lead, 2, length, 12), torch.tensor([5])
        assert torch.equal(run_function(OPS.position_scale.default, [x, start], [x.dim()], "start")[0], ops.position_scale(x, None, start))
        table = torch.rand(4, 13) + 0.1
        found = run_function(OPS.position_scale.default, [x, table, start], [x.dim()], "table.start")
        assert torch.equal(found[0], ops.position_scale(x, table, start))
        for kv_heads in (4, 2):
            q, k = spikes(*lead, 2, length, 4 * 5), spikes(*lead, 2, length, kv_heads * 5)
            sums = torch.randint(-9, 10, (*lead, 2, kv_heads * 5)).float()
            both = run_function(OPS.row_sum_scale_stream.default, [x, q, k, sums], [x.dim(), sums.dim()], heads=4, kv_heads=kv_heads)
            expected = ops.row_sum_scale_stream(x, q, k, sums, 4, kv_heads)
            assert all(torch.equal(a, b) for a, b in zip(both, expected, strict=True))


# -------------------------------------------------------------------------------------------------------------- programs


@cache
def streaming(kind: str) -> Program:
    programs = {"softmax": lambda: canonical(n_layer=1), "grouped": lambda: nano(layout="separate", kv_heads=2), "rates": lambda: rates(n_layer=1)}
    if kind in programs:
        return run_pipeline(programs[kind](), [ToStreaming()])
    replaced = run_pipeline(calibrated(n_layer=1), [ReplaceAttention.configure({"normalizer": kind})], CONTEXT)
    return run_pipeline(replaced, [InsertNeurons(), ToStreaming()], CONTEXT)


Files = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The file of a kind of program and what the check reported, made once."""

    @cache
    def write(kind: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("onnx")
        return folder / STREAMING, OnnxStreamingBackend().emit(streaming(kind), folder, tokens=example_ids(length=24))

    return write


KINDS = ["softmax", "grouped", "rates", "position", "learned-position", "leak", "channel-leak", "leak-rms", "row-sum"]


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_in_onnx_runtime(kind: str, emitted: Files) -> None:
    """Against the program by code that is not the back end's: a prompt, then one token each, the state passed by name."""
    path, report = emitted(kind)
    program, runtime, ids = streaming(kind), session(path), example_ids(length=20, batch=3)
    stream = Stream(program, 3)
    shapes = {i.name: i.shape for i in runtime.get_inputs()}
    assert list(shapes) == ["input_ids", *(part.name for part in program.state)]
    assert [o.name for o in runtime.get_outputs()] == ["logits", *(f"{part.name}_next" for part in program.state)]
    state = {name: torch.zeros([{"batch": 3, "past": 0}.get(n, n) for n in shape]) for name, shape in shapes.items() if name != "input_ids"}
    state["position"] = state["position"].long()
    for start, stop in [(0, 9), *((i, i + 1) for i in range(9, 20))]:
        expected = stream(ids[:, start:stop])
        feeds = {"input_ids": ids[:, start:stop].numpy(), **{k: v.numpy() for k, v in state.items()}}
        logits, *after = (torch.from_numpy(x) for x in runtime.run(None, feeds))
        assert float((logits - expected).abs().max()) <= 10 * exact_limit(float(expected.abs().max()))
        state = dict(zip(state, after, strict=True))
    for name, value in stream.named().items():
        assert state[name].shape == value.shape
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4)
    assert report["top1_agreement"] == 1
    assert report["tokens"] == 24


def test_the_file_says_what_its_state_is(emitted: Files) -> None:
    path, report = emitted("softmax")
    model = onnx.load(path)
    given = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in (*model.graph.input, *model.graph.output)}
    assert given == {
        "input_ids": ["batch", "sequence"], "position": [1], "h_0_attn_attention_keys": ["batch", "past", 32],
        "h_0_attn_attention_values": ["batch", "past", 32], "logits": ["batch", "sequence", 61], "position_next": [1],
        "h_0_attn_attention_keys_next": ["batch", "past + sequence", 32], "h_0_attn_attention_values_next": ["batch", "past + sequence", 32],
    }  # fmt: skip
    properties = {p.key: p.value for p in model.metadata_props}
    assert json.loads(properties["ntc.state"]) == report["state"] == [part.to_json() for part in streaming("softmax").state]
    assert "streaming" in properties["ntc.facts"]


def test_the_same_program_gives_the_same_bytes(tmp_path: Path, emitted: Files) -> None:
    path, _ = emitted("row-sum")
    OnnxStreamingBackend().emit(streaming("row-sum"), tmp_path)
    assert (tmp_path / STREAMING).read_bytes() == path.read_bytes()


def test_large_weights_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    report = OnnxStreamingBackend(external_bytes=1000).emit(streaming("leak"), tmp_path)
    assert set(report["files"]) == {STREAMING, f"{STREAMING}.data"} == {p.name for p in tmp_path.iterdir()}


def altered(path: Path, folder: Path, change: Any) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, folder / STREAMING)
    return folder / STREAMING


def weight(name: str) -> Any:
    def change(model: onnx.ModelProto) -> None:
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), name))

    return change


def forgetful(model: onnx.ModelProto) -> None:
    """The memory goes out as it came in."""
    (node,) = [n for n in model.graph.node if list(n.output) == ["h_0_attn_attention_ssa_memory_next"]]
    node.input[0] = "h_0_attn_attention_ssa_memory"


def late(model: onnx.ModelProto) -> None:
    """Positions begin at 0 in every piece."""
    for node in model.graph.node:
        if node.name == "transformer_arange":
            node.op_type, node.input[:] = "Identity", [node.input[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weight("transformer.wte.weight"), "spikes differ|logits differs"),
        (weight("transformer.h.0.attn.ssa.leak"), "h_0_attn_attention_ssa_memory_next differs|spikes differ|logits differs"),
        (forgetful, "from the same state and spikes h_0_attn_attention_ssa_memory_next differs"),
        (late, "spikes differ|logits differs"),
    ],
)
def test_the_check_finds_a_file_that_is_wrong(change: Any, message: str, tmp_path: Path, emitted: Files) -> None:
    path, _ = emitted("leak")
    with pytest.raises(DisagreementError, match=message):
        check_stream(altered(path, tmp_path, change), streaming("leak"), example_ids(length=24))


def test_a_file_without_the_state_of_the_program_is_another_one(emitted: Files) -> None:
    path, _ = emitted("softmax")
    with pytest.raises(DisagreementError, match="the model has no state h_0_attn_attention_ssa_memory"):
        check_stream(path, streaming("leak"), example_ids(length=24))


def test_nothing_is_written_unless_it_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntc_backends.onnx_stream._held", lambda *_: (_ for _ in ()).throw(BackendError("no")))
    with pytest.raises(BackendError, match="no"):
        OnnxStreamingBackend().emit(streaming("leak"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_each_back_end_writes_its_own_form(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="run the pass to-streaming"):
        OnnxStreamingBackend().emit(canonical(n_layer=1), tmp_path)
    with pytest.raises(BackendError, match="onnx-streaming writes it"):
        OnnxBackend().emit(streaming("softmax"), tmp_path)


def test_export_makes_the_streaming_form(tmp_path: Path) -> None:
    from ntc.artifact import load, save, seal

    program = rates(n_layer=1)
    save(program, tmp_path)
    seal(tmp_path)
    results = export(tmp_path, ["onnx-streaming"], tokens=example_ids(length=12))
    assert results["onnx-streaming"]["top1_agreement"] == 1
    assert (tmp_path / STREAMING).is_file()
    assert not load(tmp_path).state, "the folder's own program stays what it was"
    assert isinstance(backend("onnx-streaming"), OnnxStreamingBackend)
