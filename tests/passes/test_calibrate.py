"""Calibrate: the activations of the model itself, the same tokens everywhere, thresholds that are percentiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import CALIBRATION, CONTEXT, canonical, nano
from torch import nn

import ntc
from ntc.errors import ConfigError, DataError, PassError
from ntc.meta import STATS
from ntc.ops import aten
from ntc.pipeline import Calibration, Context, run_pipeline
from ntc.testing import check_pass, example_ids, tiny_gpt2
from ntc_passes.calibrate import Calibrate, percentile_of, positive_threshold, threshold_from
from ntc_passes.canonicalize import Canonicalize


def rows_of(program: ntc.Program) -> dict[str, torch.Tensor]:
    return {n.name: n.meta[STATS]["rows"] for n in program.graph.nodes if STATS in n.meta}


def hooked(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the model's own modules give for the calibration tokens, ``[tokens, C]``."""
    seen: dict[str, list[torch.Tensor]] = {"c_attn": [], "c_fc": []}
    block = model.transformer.h[0]
    handles = [
        block.attn.c_attn.register_forward_hook(lambda m, i, o: seen["c_attn"].append(o.flatten(0, 1))),
        block.mlp.c_fc.register_forward_hook(lambda m, i, o: seen["c_fc"].append(o.flatten(0, 1))),
    ]
    with torch.no_grad():
        for batch in CALIBRATION.batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_samples_are_the_activations_of_the_model() -> None:
    after = check_pass(Calibrate(), canonical(n_layer=1), context=CONTEXT, sites=4, missed=[], ops_after={"gelu": 1}, idempotent=False)
    rows, expected = rows_of(after), hooked(tiny_gpt2(n_layer=1))
    assert set(rows) == {"h_0_attn_c_attn_q", "h_0_attn_c_attn_k", "h_0_attn_c_attn_v", "h_0_mlp_c_fc"}
    qkv = torch.cat([rows[f"h_0_attn_c_attn_{r}"] for r in "qkv"], dim=1)
    torch.testing.assert_close(qkv, expected["c_attn"], rtol=0, atol=1e-5)
    torch.testing.assert_close(rows["h_0_mlp_c_fc"], expected["c_fc"], rtol=0, atol=1e-5)
    notes = after.history[-1].notes
    assert notes == {"tokens": 96, "data": CALIBRATION.description, "sha256": CALIBRATION.sha256, "rows": 96}


def test_fewer_rows_are_the_same_tokens_at_every_site() -> None:
    everything = rows_of(run_pipeline(canonical(n_layer=1), [Calibrate()], CONTEXT))

    def chosen(seed: int) -> list[int]:
        some = rows_of(run_pipeline(canonical(n_layer=1), [Calibrate.configure({"rows": 20, "seed": seed})], CONTEXT))
        found = {
            tuple(int((everything[name] == row).all(1).nonzero()[0]) for row in sample) for name, sample in some.items()
        }  # each site's rows, as places among all rows
        assert len(found) == 1, "sites sampled different tokens"
        return list(found.pop())

    first = chosen(0)
    assert len(set(first)) == 20
    assert first == sorted(first) == chosen(0)
    assert first != chosen(1)
    assert max(first) >= 36 > min(first), "tokens come from all batches, not from the first one only"


def test_grouped_heads_have_their_own_widths() -> None:
    rows = rows_of(nano(layout="separate", kv_heads=2))
    assert {name: r.shape[1] for name, r in rows.items()} == {
        "h_0_attn_q_proj": 32, "h_0_attn_k_proj": 16, "h_0_attn_v_proj": 16, "h_0_mlp_c_fc": 128,
    }  # fmt: skip


class NoSites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.wte(ids))


def test_a_network_without_sites_is_left_alone() -> None:
    program = run_pipeline(ntc.capture(NoSites(), example_ids()), [Canonicalize()])
    check_pass(Calibrate(), program, context=CONTEXT, sites=0)


@pytest.mark.parametrize(
    ("given_context", "error", "message"),
    [
        (Context(), PassError, "give --calibration FILE"),
        (Context(Calibration((), "nothing", "")), PassError, "give --calibration FILE"),
        (Context(Calibration((torch.zeros(1, 25, dtype=torch.long),), "long", "")), DataError, "25 tokens are more than .* context of 24"),
        (Context(Calibration((torch.full((1, 5), 61),), "foreign", "")), DataError, "token id 61 is outside the vocabulary of 61"),
    ],
)
def test_unusable_calibration_is_refused(given_context: Context, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_pipeline(canonical(n_layer=1), [Calibrate()], given_context)


def test_needs_a_canonical_program() -> None:
    program = canonical(n_layer=1).copy()
    program.facts = frozenset({"captured"})
    with pytest.raises(PassError, match="pass calibrate needs a program that is canonical"):
        run_pipeline(program, [Calibrate()], CONTEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be a whole number of at least 1, got 0"),
        ({"rows": 1.5}, "rows must be a whole number"),
        ({"rows": "many"}, "rows must be a whole number of at least 1, got 'many'"),
        ({"rows": True}, "rows must be a whole number"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"row": 5}, "has no option 'row'; did you mean rows"),
        ({"colour": 5}, "has no option 'colour'; it has rows, seed"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Calibrate.configure(options)


# Without subnormal numbers: torch flushes them to zero, numpy does not.
samples = st.integers(1, 40).flatmap(
    lambda n: st.lists(st.lists(st.floats(-50, 50, width=32, allow_subnormal=False), min_size=n, max_size=n), min_size=1, max_size=4)
)


@given(columns=samples, percentile=st.floats(0.5, 100))
def test_thresholds_are_numpy_percentiles(columns: list[list[float]], percentile: float) -> None:
    x = np.array(columns, dtype=np.float32).T
    for signed, values in ((True, np.abs(x)), (False, np.maximum(x, 0))):
        expected = np.percentile(values.astype(np.float64), percentile, axis=0)
        floor = expected.max() * 1e-3 or 1e-3
        theta = threshold_from(torch.tensor(x), percentile, signed)
        np.testing.assert_allclose(theta.numpy(), np.maximum(expected, floor), rtol=1e-5, atol=1e-6)


@given(columns=samples, percentile=st.floats(0.5, 100), shift=st.floats(-10, 10))
def test_one_sort_serves_every_monotone_map(columns: list[list[float]], percentile: float, shift: float) -> None:
    x = torch.tensor(columns, dtype=torch.float64).T
    moved, plain = percentile_of(x, percentile, [lambda v: (v - shift).clamp(min=0), lambda v: v])
    np.testing.assert_allclose(moved, np.percentile(np.maximum(x.numpy() - shift, 0), percentile, axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(plain, np.percentile(x.numpy(), percentile, axis=0), rtol=1e-9, atol=1e-9)


def test_many_channels_are_no_limit() -> None:
    wide = torch.ones(2, 2**23 + 1)  # torch.quantile refuses more than 2**24 values
    assert float(threshold_from(wide, 90.0, False)[-1]) == 1.0


def test_silent_channels_get_a_small_threshold() -> None:
    assert positive_threshold(torch.tensor([0.0, 4.0, 1e-6])).tolist() == pytest.approx([4e-3, 4.0, 4e-3])
    assert positive_threshold(torch.zeros(3)).tolist() == pytest.approx([1e-3] * 3)


def test_the_head_is_not_run() -> None:
    calls = []

    class Counting(Calibrate):
        def run(self, program: ntc.Program, context: Context) -> object:
            for node in program.graph.nodes:
                if node.target is aten.linear.default and node.name == "lm_head":
                    node.target = lambda *args: calls.append(args)  # never reached
            return super().run(program, context)

    work = canonical(n_layer=1).copy()
    Counting().run(work, CONTEXT)
    assert not calls
