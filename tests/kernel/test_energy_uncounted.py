"""Nothing is skipped in silence: ops without a counting rule are listed with their share."""

from __future__ import annotations

import pytest
import torch
from programs import CONTEXT, TOKENS, canonical, spiking
from torch import Tensor, nn
from torch.nn import functional

import ntc
from ntc.energy import measure_energy
from ntc.errors import DataError
from ntc.pipeline import run_pipeline
from ntc.testing import count_ops, example_ids
from ntc_passes.calibrate import Calibrate
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.convert_ffn import ConvertFfn
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons

V = 61  # vocabulary of the tiny models


class Unregistered(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.wte, self.fc, self.proj, self.head = nn.Embedding(V, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, V)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.taps = nn.Parameter(torch.randn(8, 8, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        x = x + self.proj(torch.relu(self.fc(x)))
        if self.kind == "einsum":
            x = torch.einsum("blc,dc->bld", x, self.mix)
        elif self.kind == "baddbmm":
            x = torch.baddbmm(x, x, self.mix.expand(x.shape[0], 8, 8))
        else:
            x = functional.conv1d(functional.pad(x.transpose(1, 2), (2, 0)), self.taps).transpose(1, 2)
        return self.head(x)


@pytest.mark.parametrize(("kind", "macs"), [("einsum", 64), ("baddbmm", 64), ("conv", 3 * 64)])
def test_an_op_without_a_rule_is_listed_with_its_share(kind: str, macs: int) -> None:
    analog = run_pipeline(ntc.capture(Unregistered(kind), example_ids()), [Canonicalize()])
    program = run_pipeline(analog, [Calibrate(), ConvertFfn(), FoldThresholds(), InsertNeurons()], CONTEXT)
    found = measure_energy(program, analog, TOKENS, batch=3)
    rows = [r for r in found.uncounted() if r["macs"]]
    assert [(r["side"], r["op"].split(".")[0]) for r in rows] == [("ann", rows[0]["op"]), ("snn", rows[0]["op"])]
    assert kind in rows[0]["op"]
    assert [r["macs"] for r in rows] == [macs, macs]
    counted = 2 * 8 * 16 + 8 * V
    assert found.snn.total().dense_macs == counted
    assert found.uncounted_share() == pytest.approx(macs / (macs + counted))
    assert found.to_json()["uncounted"] == found.uncounted()
    found.require_counted(macs / (macs + counted))
    with pytest.raises(DataError, match=rf"% of the dense multiply-accumulates are not counted, and 1 % are allowed: .* of {kind}\w* \(%"):
        found.require_counted(0.01)


def test_a_gpt2_has_nothing_uncounted() -> None:
    report = measure_energy(spiking(), canonical(), TOKENS, batch=3)
    assert report.uncounted() == []
    assert report.uncounted_share() == 0
    assert set(count_ops(spiking())) == {n.op for n in report.snn.nodes}, "every op of the graph has its row"
