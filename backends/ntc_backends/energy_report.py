"""``energy.json``: operation counts and energy of a program, with measured firing rates."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ntc.energy import measure_energy
from ntc.errors import BackendError
from ntc.program import Program
from ntc.text import Tokens

__all__ = ["EnergyBackend"]


class EnergyBackend:
    """Writes the energy report of ``ntc.energy`` beside a program."""

    name = "energy"
    files = ("energy.json",)
    summary = "operation counts and energy against the original network, on measured firing rates"

    def emit(self, program: Program, folder: Path, *, analog: Program | None, tokens: Tensor | Tokens | None) -> dict[str, Any]:
        """Measure on the tokens and write ``energy.json``.

        Raises:
            BackendError: If the original network or the tokens to measure on are missing.
        """
        if analog is None:
            raise BackendError("an energy report compares with the original network, and this program has no analog.json")
        if tokens is None:
            raise BackendError("an energy report measures firing rates on text: give --data FILE")
        if isinstance(tokens, Tensor):
            digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
            tokens = Tokens(tokens, f"{tokens.numel():,} tokens in windows of {tokens.shape[1]}", digest)
        report = measure_energy(program, analog, tokens).to_json()
        (folder / "energy.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        attention, total = report["attention"], report["total"]
        return {
            "attention_reduction": attention["reduction"], "ann_pj": total["ann_pj"], "snn_pj": total["snn_pj"],
            "uncounted_share": report["uncounted_share"], "tokens": report["tokens"],
        }  # fmt: skip
