"""Measures settings, in one process or in several."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import psutil
import torch

from ntc import artifact
from ntc.compiler import compile_model, default_calibration
from ntc.energy import measure_energy
from ntc.errors import ArtifactError, ConfigError, NtcError
from ntc.frontend import capture
from ntc.loading import load_tokenizer
from ntc.program import Program
from ntc.quality import evaluate
from ntc.sweep.plan import WEIGHTS, Plan, Setting, files_of
from ntc.text import tokens_from

__all__ = ["Bench", "measure_all"]

_QUALITY = ("perplexity", "perplexity_ann", "perplexity_change", "top1_agreement", "cosine", "kl", "firing_rate", "events_per_value")
_WINDOW = 256
_LIBRARIES = 1 << 30  # bytes of a process with torch and transformers, and of the activations of a small network
_COPIES = 4  # weights of a network while it is compiled: captured, canonical, compiled, and what passes keep


class Bench:
    """The original network and the tokens, read once per process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.analog = capture(plan.model)
        self.tokenizer = load_tokenizer(plan.model)
        window = min(_WINDOW, self.analog.info.context or _WINDOW)
        self.tokens = tokens_from(plan.data, self.tokenizer, window, plan.max_tokens, self.analog.info.vocab_size)
        rows = max(1, min(plan.energy_tokens, self.tokens.count) // int(self.tokens.windows.shape[1]))
        self.few = replace(self.tokens, windows=self.tokens.windows[:rows])

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Figures of a setting, or the sentence that says why there are none."""
        try:
            program, canonical = self._program(setting)
            quality = evaluate(program, self.analog, self.tokens).to_json()
            energy = measure_energy(program, canonical, self.few).to_json()
        except NtcError as error:
            return {"error": str(error)}
        attention, total = energy["attention"], energy["total"]
        return {
            "steps": program.steps,
            **{name: quality[name] for name in _QUALITY},
            "perplexity_change_interval": (quality["confidence"] or {}).get("perplexity_change"),
            "energy": {
                "total": {"snn_pj": total["snn_pj"], "ann_pj": total["ann_pj"], "reduction": total["reduction"]},
                "attention": {"snn_pj": attention["ssa_pj"], "ann_pj": attention["asa_pj"], "reduction": attention["reduction"]},
            },
            "steps_times_rate": attention["steps_times_rate"],
            "uncounted_share": energy["uncounted_share"],
        }  # fmt: skip

    def _program(self, setting: Setting) -> tuple[Program, Program]:
        if setting.folder:
            folder = Path(setting.folder)
            canonical = artifact.load_analog(folder)
            if canonical is None:
                raise ArtifactError(f"{folder} has no analog.json, which energy is compared with; compile again")
            return artifact.load(folder), canonical
        done = compile_model(
            self.analog, recipe=setting.recipe, settings=self.plan.of(setting), tokenizer=self.tokenizer,
            calibration=self.plan.calibration or default_calibration(self.plan.model),
        )  # fmt: skip
        return done.program, done.analog


_bench: Bench | None = None


def _begin(plan: Plan, threads: int) -> None:
    """In a new process."""
    global _bench
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the first process says what there is to say
    torch.set_num_threads(threads)
    _bench = Bench(plan)


def _measured(setting: Setting) -> dict[str, Any]:
    assert _bench is not None
    return _bench.measure(setting)


def measure_all(plan: Plan, settings: Sequence[Setting], workers: int | None) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Each setting with its figures, as they come."""
    if not settings:
        return
    number = min(len(settings), workers or _workers(plan))
    if number == 1:
        bench = Bench(plan)
        for setting in settings:
            yield setting, bench.measure(setting)
        return
    threads = max(1, torch.get_num_threads() // number)
    pool = ProcessPoolExecutor(number, mp_context=get_context("spawn"), initializer=_begin, initargs=(plan, threads))
    try:
        running = {pool.submit(_measured, setting): setting for setting in settings}
        for future in as_completed(running):
            yield running[future], future.result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"a process of the sweep was killed, probably for want of memory: give --workers {number // 2}; what was measured is kept"
        ) from error
    except BaseException:  # nobody waits for what is being measured
        for child in active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _workers(plan: Plan) -> int:
    """As many as there are processors, and as fit into nine tenths of the memory that is free."""
    weights = sum(p.stat().st_size for p in files_of(plan.model) if p.suffix in WEIGHTS)
    room = 0.9 * psutil.virtual_memory().available / (_LIBRARIES + _COPIES * weights)
    return max(1, min(torch.get_num_threads(), int(room)))
