"""The ONNX file computes what the program computes, in stock ONNX Runtime, and the check finds a file that does not."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx.numpy_helper
import pytest
import torch
from onnx import helper
from onnx_cases import compiled, gpt2, session
from torch import Tensor, nn

import ntc
from ntc.errors import BackendError
from ntc.meta import building
from ntc.program import Program
from ntc.registry import backend, find_pass
from ntc.testing import NanoGPT, example_ids, tiny_gpt2
from ntc_backends.onnx_check import Tolerance, check
from ntc_backends.onnx_export import OnnxBackend

# -------------------------------------------------------------------------------------------------------- whole programs


OUTPUT_NEURON = {"output": "spikes"}  # binary and ternary neurons, driven by a constant current and by one of every step


@pytest.fixture(scope="module")
def program() -> Program:
    return compiled(**OUTPUT_NEURON)


VARIANTS = {
    "neurtransformer": {},
    "output neuron": OUTPUT_NEURON,
    "ternary": {"signed_query": True, "signed_key": True, "output": "spikes"},
    "binary values": {"signed_value": False, "output": "spikes"},
    "one step": {"steps": 1},
    "rates": {"last": "insert-neurons"},
    "canonical": {"last": "calibrate"},
    "captured": {"last": "canonicalize"},
    "ffn-only": {"name": "ffn-only"},
    "nanoGPT": {"model": NanoGPT(layout="permute")},
    "grouped": {"model": NanoGPT(layout="separate", heads=4, kv_heads=2)},
    "no bias": {"model": NanoGPT(bias=False, activation="relu")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_programs_agree_at_any_batch_and_length(program: Program, variant: str, tmp_path: Path) -> None:
    made = program if VARIANTS[variant] is OUTPUT_NEURON else compiled(**VARIANTS[variant])
    report = OnnxBackend().emit(made, tmp_path, tokens=example_ids(batch=3, length=24))
    assert report["checker"] == "ok"
    assert report["tokens"] == 72
    assert report["top1_agreement"] >= 71 / 72
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]
    run = session(tmp_path / "model.onnx")
    for batch, length in ((1, 1), (1, 24), (5, 2)):
        ids = example_ids(batch=batch, length=length)
        (got,) = run.run(None, {"input_ids": ids.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), made(ids), rtol=0, atol=1e-4)


def test_a_leaky_neuron_in_a_program(program: Program, tmp_path: Path) -> None:
    made = program.copy()
    for node in list(made.graph.nodes):
        if node.target is torch.ops.ntc.integrate_fire.default and not node.args[4]:
            current, theta, v0, steps, _, timed, *surrogate = node.args
            with building(made.graph, before=node, stands_for=[node], by="test") as call:
                tau = call(made.add_tensor(f"{node.name}.tau", torch.tensor([2.0])))
            node.target = torch.ops.ntc.leaky_integrate_fire.default
            node.args = (current, theta, tau, v0, steps, True, timed, *surrogate)
    made.refresh()
    ntc.verify.verify(made)
    OnnxBackend().emit(made, tmp_path)
    calls = [n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type == "LeakyIntegrateFire"]
    assert {a.name: helper.get_attribute_value(a) for a in calls[0].attribute}["reset"] == b"hard"


def test_a_llama_with_rotary_positions_and_grouped_heads(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=61, max_position_embeddings=32)  # fmt: skip
    program = ntc.run_pipeline(ntc.capture(LlamaForCausalLM(config).eval()), [find_pass("canonicalize")()])
    report = OnnxBackend().emit(program, tmp_path, tokens=example_ids(batch=3, length=11))
    assert report["max_abs_logit_difference"] < 1e-5
    assert report["functions"] == ["ntc::Attention"]


def test_the_same_bytes_twice(program: Program, tmp_path: Path) -> None:
    hashes = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        OnnxBackend().emit(compiled(**OUTPUT_NEURON) if name == "b" else program, tmp_path / name)
        hashes.add(hashlib.sha256((tmp_path / name / "model.onnx").read_bytes()).hexdigest())
    assert len(hashes) == 1


@pytest.fixture(scope="module")
def exported(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    OnnxBackend().emit(program, folder)
    return folder / "model.onnx"


def test_neurons_are_calls_of_functions_that_the_file_brings(program: Program, exported: Path) -> None:
    model = onnx.load(exported)
    brought = {(f.domain, f.name, f.overload) for f in model.functions}
    calls = [n for n in model.graph.node if n.domain]
    assert {(n.domain, n.op_type, n.overload) for n in calls} == brought
    neurons = {n.name: n for n in calls if n.op_type == "IntegrateFire"}
    assert set(neurons) == {n.name for n in program.graph.nodes if n.target is torch.ops.ntc.integrate_fire.default}
    for name, call in neurons.items():
        args = program.find(name).args
        found = {a.name: helper.get_attribute_value(a) for a in call.attribute}
        assert list(call.input)[1:] == [args[1].target, args[2].target]
        assert found == {"steps": args[3], "signed": int(args[4]), "timed": int(args[5]), "comparison": b">=", "reset": b"soft"}
    assert {o.domain for o in onnx.inliner.inline_local_functions(model).opset_import if o.domain} <= {"ntc"}
    assert not [n for n in onnx.inliner.inline_local_functions(model).graph.node if n.domain]  # nothing left but the standard opset


def test_names_shapes_and_metadata(program: Program, exported: Path) -> None:
    model = onnx.load(exported)

    def shape(info: onnx.ValueInfoProto) -> list[Any]:
        return [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]

    assert [(i.name, shape(i)) for i in model.graph.input] == [("input_ids", ["batch", "sequence"])]
    assert [(o.name, shape(o)) for o in model.graph.output] == [("logits", ["batch", "sequence", 61])]
    assert {t.name for t in model.graph.initializer} == set(program.tensors)
    nodes = {n.name: n for n in model.graph.node}
    for node in program.graph.nodes:
        if node.op == "call_function":
            facts = {p.key: p.value for p in nodes[node.name].metadata_props}
            assert facts.get("ntc.module", "") == ntc.meta.module_of(node)
            assert facts["ntc.made_by"] == ", ".join(node.meta["ntc.made_by"])
    known = {p.key: p.value for p in model.metadata_props}
    assert known["ntc.steps"] == "4"
    assert (known["ntc.comparison"], known["ntc.reset"], known["ntc.dt"]) == (">=", "soft", "1 step")
    assert model.producer_name == "ntc"


def test_no_path_of_this_computer_gets_in(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "my-model")
    OnnxBackend().emit(ntc.capture(tmp_path / "my-model"), tmp_path)
    data = (tmp_path / "model.onnx").read_bytes()
    assert b"my-model" in data
    for text in (str(tmp_path), str(Path(ntc.__file__).parent), os.getcwd(), "site-packages", ".py"):
        assert text.encode() not in data


def test_tied_weights_are_stored_once(exported: Path) -> None:
    model = onnx.load(exported)
    readers = [n.op_type for n in model.graph.node if "transformer.wte.weight" in n.input]
    assert sorted(readers) == ["Gather", "Transpose"]
    assert [t.name for t in model.graph.initializer].count("transformer.wte.weight") == 1


def test_two_names_of_one_tensor_are_one_initializer(tmp_path: Path) -> None:
    program = gpt2()
    first, second = list(program.tensors)[:2]
    extra = program.copy()
    twin = extra.add_tensor("another.name", program.tensors[first])
    node = next(n for n in extra.graph.nodes if n.op == "get_attr" and n.target == first)
    with extra.graph.inserting_after(node):
        copy = extra.graph.create_node("get_attr", twin)
    copy.meta = dict(node.meta)
    user = next(u for u in reversed(list(node.users)))
    user.replace_input_with(node, copy)
    extra.refresh()
    assert twin in extra.tensors
    OnnxBackend().emit(extra, tmp_path)
    names = [t.name for t in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert first in names
    assert twin not in names
    assert second in names


def test_large_weights_go_to_a_file_of_their_own(program: Program, exported: Path, tmp_path: Path) -> None:
    report = OnnxBackend(external_bytes=0).emit(program, tmp_path)
    assert set(report["files"]) == {"model.onnx", "model.onnx.data"} == {p.name for p in tmp_path.iterdir()}
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
    ids = {"input_ids": example_ids(batch=2, length=5).numpy()}
    inside, outside = session(exported).run(None, ids)[0], session(tmp_path / "model.onnx").run(None, ids)[0]
    assert (inside == outside).all()
    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    places = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}
    start = int(next(place["offset"] for name, place in places.items() if "mlp.c_fc.weight" in name))
    data[start : start + 4096] = bytes(4096)
    (tmp_path / "model.onnx.data").write_bytes(data)
    with pytest.raises(BackendError, match="differ"):
        check(tmp_path / "model.onnx", program, example_ids(batch=2, length=24))
    OnnxBackend().emit(program, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]  # the old weights are gone


# --------------------------------------------------------------------------------------------------- the check can fail


def perturbed(source: Path, target: Path, name: str, factor: float) -> Path:
    model = onnx.load(source)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * onnx.numpy_helper.to_array(tensor).dtype.type(factor), name))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("name", [
    "transformer.wte.weight", "transformer.h.0.attn.c_attn.k.weight", "transformer.h.1.mlp.c_fc.weight",
    "transformer.h.1.mlp.c_proj.weight", "transformer.h.1.attn.c_proj.weight", "transformer.ln_f.weight",
])  # fmt: skip
def test_a_weight_that_is_off_by_one_percent_is_found(program: Program, exported: Path, tmp_path: Path, name: str) -> None:
    ids = example_ids(batch=2, length=24)
    check(perturbed(exported, tmp_path / "model.onnx", name, 1.0), program, ids)
    with pytest.raises(BackendError, match="disagrees with the program"):
        check(perturbed(exported, tmp_path / "model.onnx", name, 1.01), program, ids)


def test_a_neuron_with_another_comparison_is_found(program: Program, exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    for function in model.functions:
        for node in function.node:
            for attribute in node.attribute:
                for inner in attribute.g.node:
                    if inner.op_type == "Sub" and inner.output[0] == "v_next":
                        inner.op_type = "Add"  # a neuron that is never reset
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BackendError, match=r"spikes differ .* at node %h_0"):
        check(tmp_path / "model.onnx", program, example_ids(batch=2, length=24))


def test_a_broken_model_is_refused(program: Program, exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    del model.graph.node[7]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BackendError, match="checker refuses"):
        check(tmp_path / "model.onnx", program, example_ids())


def test_nothing_is_left_of_an_artefact_that_disagrees(program: Program, tmp_path: Path) -> None:
    with pytest.raises(BackendError):
        OnnxBackend(tolerance=Tolerance(logits=-1.0)).emit(program, tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ other ops


class Odd(nn.Module):
    """Uses ops that the writer leaves to torch, some with several results, computed sizes or constants."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(61, 16)
        self.head = nn.Linear(16, 61)
        self.register_buffer("table", torch.arange(5.0))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids).cumsum(1) / (1 + torch.arange(ids.shape[1])).view(1, -1, 1)
        a, b = x.split(8, dim=-1)
        x = torch.cat([a, torch.roll(b, 1, -1)], -1).reshape(ids.shape[0] * ids.shape[1], -1).view(ids.shape[0], -1, 16)
        return self.head(x * self.table.mean() + torch.zeros(ids.shape[0], ids.shape[1], 1).cos())


@pytest.mark.filterwarnings("ignore")
def test_ops_that_only_torch_knows_become_functions(tmp_path: Path) -> None:
    program = ntc.capture(Odd().eval(), example=example_ids())
    hashes = set()
    for ids in (example_ids(batch=3, length=11), example_ids(batch=1, length=1)):
        report = OnnxBackend().emit(program, tmp_path, tokens=ids)
        assert report["max_abs_logit_difference"] < 1e-5
        hashes.add(hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest())
    assert len(hashes) == 1
    assert any(f.startswith("aten::cumsum") for f in report["functions"])
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


@torch.library.custom_op("ntc_test::strange", mutates_args=())
def strange(x: Tensor) -> Tensor:
    return x + 1


@strange.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.filterwarnings("ignore")
def test_an_op_that_nobody_knows_is_an_error_that_names_the_node(tmp_path: Path) -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(61, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.ops.ntc_test.strange(self.wte(ids))

    program = ntc.capture(Strange(), example=example_ids())
    with pytest.raises(BackendError, match=r"ntc_test.strange.* node %strange \(.*in forward\)"):
        OnnxBackend().emit(program, tmp_path)
    assert not list(tmp_path.iterdir())


def test_it_is_found_by_name() -> None:
    assert isinstance(backend("onnx"), OnnxBackend)
