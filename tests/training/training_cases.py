"""What the tests of training start from: tiny programs, text with something to learn in it, one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.text import Tokens
from ntc.training.checkpoint import WorkFolder
from ntc.training.config import TrainingConfig
from ntc.training.form import TrainingForm
from ntc.training.groups import roles_of, trained
from ntc.training.loop import Trainer
from ntc.training.windows import PackedCorpus
from ntc_passes.convert_ffn import ConvertFfn
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention
from tests.programs import CONTEXT, calibrated, canonical, spiking

WINDOW = 12


@cache
def without_ties() -> Program:
    """Spiking, but the attention's result stays a current: no threshold meets sums of spikes, where rounding would decide."""
    policy = [ReplaceAttention.configure({"steps": 4, "output": "current"}), ConvertFfn.configure({"steps": 4})]
    return run_pipeline(run_pipeline(calibrated(), policy, CONTEXT), [FoldThresholds(), InsertNeurons()], CONTEXT)


@cache
def chain(count: int = 4000, vocab_size: int = 61, seed: int = 3) -> NDArray[np.int64]:
    """Ids of a Markov chain with three likely successors per token: cross entropy can fall well below ln 61."""
    random = np.random.default_rng(seed)
    successors = random.integers(0, vocab_size, (vocab_size, 3))
    ids = [0]
    for choice, jump in zip(random.integers(0, 3, count - 1), random.random(count - 1), strict=True):
        ids.append(int(successors[ids[-1], choice]) if jump > 0.1 else int(random.integers(vocab_size)))
    return np.asarray(ids)


def corpus(window: int = WINDOW, seed: int = 0) -> PackedCorpus:
    return PackedCorpus(chain(), window, seed, "a chain", "sha of a chain")


def validation(windows: int = 6) -> Tokens:
    ids = torch.from_numpy(chain(count=windows * WINDOW, seed=3)).view(-1, WINDOW)
    return Tokens(ids, "the chain's beginning", "sha of the beginning")


def config(**options: Any) -> TrainingConfig:
    """Four windows per step, twelve steps, everything measured often."""
    given = {
        "rows": 4, "max_tokens": 4 * WINDOW * 12, "blockwise_tokens": 0, "window": WINDOW, "lr": 3e-3, "warmup": 2, "validate_every": 4, "save_every": 3,
        "log_every": 1, "compile": False, "bf16": False, **options,
    }  # fmt: skip
    return TrainingConfig(**given)


def trainer(folder: Any, settings: TrainingConfig | None = None, *, analog: bool = False, **more: Any) -> Trainer:
    settings = settings or config()
    program = canonical() if analog else spiking()
    form = TrainingForm(program, trained(roles_of(program), settings.group), bf16=bool(settings.bf16))
    teacher = TrainingForm(canonical()) if settings.needs_teacher else None
    given = {"work": WorkFolder(folder), "accelerator": accelerator(settings), "identity": {}, **more}
    return Trainer(form, teacher, corpus(), validation(), settings, **given)


def accelerator(settings: TrainingConfig) -> Any:
    from ntc.training.prepare import accelerator_for

    return accelerator_for(settings)
