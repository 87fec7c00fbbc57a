"""The normalisers of spiking attention in the artefacts: ONNX functions give the kernels' results, and a netlist says each in full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from netlist_cases import Case, agreement, cached
from onnx_cases import KINDS, SHAPES, compiled, numbers, run_op

import ntc
import ntc.ops as ops
from ntc.testing import example_ids
from ntc_backends.netlist import load_netlist
from ntc_backends.onnx_export import OnnxBackend

OPS = torch.ops.ntc
LEADS = [(4,), (3,), ()]  # T = 4 and 3, and an analog value


# ---------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", LEADS)
def test_a_position_table_gives_the_bits_of_the_kernel(lead: tuple[int, ...], kind: str) -> None:
    for b, length, c in SHAPES:
        x, table = numbers(kind, *lead, b, length, c), torch.rand(4, length + 3) + 0.1
        assert torch.equal(run_op(OPS.position_scale.default, [x, table], x.dim(), "table"), ops.position_scale(x, table))


@pytest.mark.parametrize("lead", LEADS)
def test_rms_scale_agrees_to_rounding(lead: tuple[int, ...]) -> None:
    for b, length, c in SHAPES:
        x = numbers("random", *lead, b, length, c)
        got = run_op(OPS.rms_scale.default, [x], x.dim(), heads=4, eps=1e-5)
        torch.testing.assert_close(got, ops.rms_scale(x, 4, 1e-5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lead", LEADS)
def test_row_sum_scale_gives_the_bits_of_the_kernel_on_spikes(lead: tuple[int, ...], kv_heads: int) -> None:
    for b, length, c in SHAPES:
        x, q, k = numbers("random", *lead, b, length, c), *(torch.randint(-1, 2, (*lead, b, length, 5 * n)).float() for n in (4, kv_heads))
        got = run_op(OPS.row_sum_scale.default, [x, q, k], x.dim(), heads=4, kv_heads=kv_heads)
        expected = ops.row_sum_scale(x, q, k, 4, kv_heads)
        assert torch.equal(got, expected)
        assert length == 1 or not torch.equal(expected, x), "some row is divided"


VARIANTS: dict[str, dict[str, Any]] = {
    "learned-position": {"normalizer": "learned-position", "gain": "head", "output": "spikes"},
    "channel-leak": {"normalizer": "channel-leak", "output": "current"},
    "leak-rms": {"normalizer": "leak-rms", "signed_query": True, "signed_key": True, "output": "spikes"},
    "row-sum": {"normalizer": "row-sum", "signed_query": True, "output": "spikes"},
    "lif": {"neuron": "lif", "signed_query": False, "signed_key": False, "signed_value": False, "normalizer": "leak", "output": "spikes"},
    "rates": {"normalizer": "row-sum", "last": "insert-neurons"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_programs_with_other_normalizers_agree(variant: str, tmp_path: Path) -> None:
    # On equal spikes: RMS and leaks are sums of real numbers, and a random network multiplies a single flipped spike.
    report = OnnxBackend().emit(compiled(**VARIANTS[variant]), tmp_path, tokens=example_ids(batch=3, length=24))
    assert report["checker"] == "ok"
    assert report["tokens"] == 72
    assert report["held"]["max_abs_logit_difference"] < 1e-4


# ------------------------------------------------------------------------------------------------------------- netlist


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {kind: cached(variant, 1) for kind, variant in (("table", "learned-position"), ("rms", "leak-rms"), ("row-sum", "row-sum"))}


def test_a_netlist_names_the_normalizer_and_its_numbers(cases: dict[str, Case]) -> None:
    def scale(kind: str) -> dict[str, Any]:
        found = cases[kind].json["scales"][0]
        assert found["kind"] == kind
        return {k: found[k] for k in ("factor", "heads", "kv_heads", "eps")}

    assert scale("table") == {"factor": {"tensor": "transformer.h.0.attn.ssa.position"}, "heads": 4, "kv_heads": None, "eps": None}
    assert scale("rms") == {"factor": None, "heads": 4, "kv_heads": None, "eps": 1e-5}
    assert scale("row-sum") == {"factor": None, "heads": 4, "kv_heads": 4, "eps": None}
    inputs = cases["row-sum"].json["scales"][0]["inputs"]
    product = cases["row-sum"].json["dynamic_products"][0]["inputs"]
    assert (inputs["query"], inputs["key"]) == (product["query"], product["key"])


@pytest.mark.parametrize(("kind", "change"), [("rms", {"eps": 1.0}), ("rms", {"heads": 2}), ("row-sum", {"heads": 2, "kv_heads": 2})])
def test_the_numbers_of_a_scale_count(cases: dict[str, Case], kind: str, change: dict[str, Any], tmp_path: Path) -> None:
    folder = cases[kind].edited(tmp_path, lambda data: data["scales"][0].update(change))
    _, differ, _ = agreement(cases[kind].program, folder, example_ids(batch=2, length=20, seed=7))
    assert differ > 0


def no_heads(scale: dict[str, Any]) -> None:
    scale["heads"] = None


def stray_eps(scale: dict[str, Any]) -> None:
    scale["eps"] = 1.0


def no_query(scale: dict[str, Any]) -> None:
    del scale["inputs"]["query"], scale["inputs"]["key"]



def three_heads(scale: dict[str, Any]) -> None:
    scale["heads"] = 3


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("rms", no_heads, "is a scale of kind 'rms', and its fields are those of another kind"),
        ("row-sum", stray_eps, "is a scale of kind 'row-sum', and its fields"),
        ("row-sum", no_query, "is a scale of kind 'row-sum', and its fields"),
        ("table", three_heads, r"the table of h_0_attn_attention_scaled has size \[4\], and \[3\] is needed"),
        ("rms", three_heads, "3 heads do not divide the 32 channels of h_0_attn_attention_scaled"),
    ],
)
def test_a_scale_that_makes_no_sense_is_refused(
    cases: dict[str, Case], kind: str, edit: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    folder = cases[kind].edited(tmp_path, lambda data: edit(data["scales"][0]))
    with pytest.raises(ntc.ArtifactError, match=message):
        load_netlist(folder)
