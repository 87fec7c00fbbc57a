r"""The training loop: AdamW on the differentiable form of a program, in one process or several, resumable to the bit.

A step takes ``rows`` windows, ``rows / world`` in each process and those in ``accumulate`` pieces; the loss is the mean over all
of them, so the number of processes and pieces changes nothing but the order of sums. The gradient is clipped to norm
``clip`` (Pascanu et al. 2013). Everything that the next step depends on is in the checkpoint: a run that was killed and
resumed has the same losses, to the last bit in one process with the same number of threads.

Validation runs the program itself, with its exact kernels in float32, and not the form that is trained. The best program is the
one with the lowest perplexity there; a firing rate above its target counts against it. A run gives the best, or the last.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ntc.errors import ArtifactError, TrainingError
from ntc.folders import undisturbed
from ntc.program import Program
from ntc.text import Tokens
from ntc.training.checkpoint import WorkFolder, check_same_run
from ntc.training.config import TrainingConfig, learning_rate
from ntc.training.corpus import Corpus
from ntc.training.form import TrainingForm
from ntc.training.losses import Losses, Objective
from ntc.training.optimizer import optimizer_for
from ntc.training.state import News, Outcome, RunState
from ntc.training.validation import Validation, validate
from ntc.training.watch import Divergence, NeuronWatch, first_non_finite

__all__ = ["RATE_MARGIN", "Trainer"]

logger = logging.getLogger("ntc.training")

_TIMED_STEPS = 10  # after so many the speed is known
_TIME_MARGIN = 0.98  # of the minutes are planned: the cosine should end before they do
RATE_MARGIN = 1.02  # above a target rate: noise of a validation text

_ENDS = ("", "steps", "time", "patience")


def _nobody(news: News) -> None:
    return None


class Trainer:
    """One run.

    Args:
        form: What is trained.
        teacher: The original network, if a loss needs it.
        corpus: The training text.
        validation: Windows of the validation text.
        config: With its window, and ``compile`` decided.
        work: Checkpoints and log.
        accelerator: Of Hugging Face ``accelerate``.
        identity: What the run is besides its options (hashes of program, data, ...): a checkpoint with another is refused.
        steps: Steps that the learning rate is planned for [default: from tokens or minutes].
        stop_after: Steps to take of those [default: all].
        first_step: Steps whose windows were trained on before.
        first_seconds: Time that this took; counts towards ``max_minutes``.
        objective: What makes a loss of form, teacher and options.
        constants: More columns for the log's validation rows, such as the perplexity of the original.
        news: Called after every step and during validation.

    Raises:
        ConfigError: If the work folder holds a run with other options.
    """

    def __init__(
        self,
        form: TrainingForm,
        teacher: TrainingForm | None,
        corpus: Corpus,
        validation: Tokens,
        config: TrainingConfig,
        *,
        work: WorkFolder,
        accelerator: Any,
        identity: Mapping[str, Any],
        steps: int | None = None,
        stop_after: int | None = None,
        first_step: int = 0,
        first_seconds: float = 0.0,
        objective: type[Objective] = Objective,
        constants: Mapping[str, float] | None = None,
        news: Callable[[News], None] = _nobody,
    ) -> None:
        self.form, self.corpus, self.validation, self.config, self.work = form, corpus, validation, config, work
        self.accelerator, self.constants, self.news = accelerator, dict(constants or {}), news
        self.identity = {"config": config.to_json(), **identity}
        self._measured = {"loss", *objective.measured}
        self.stop_after, self.first_step = stop_after, first_step
        self.state = RunState(steps=config.steps() if steps is None else steps, seconds=first_seconds)
        self.divergence, self.neurons = Divergence(), NeuronWatch()
        self.resumed_step: int | None = None
        self._labels = _labels_of(form)
        self._timed: list[float] = []
        self._latest: dict[str, Any] = {}
        self._label = "" if work.name == "training" else f"{work.name}: "
        optimizer = optimizer_for(form, config)
        self._restore(optimizer)  # before prepare(), which gives all processes the parameters of the first
        self._last_save = self._clock = time.perf_counter()
        self.objective, self.optimizer = accelerator.prepare(objective(form, teacher, config, compile=bool(config.compile)), optimizer)

    # -------------------------------------------------------------------------------------------- the run

    def run(self) -> Outcome:
        """Train to the end.

        Raises:
            TrainingError: If a number is not finite or the loss diverges; the last checkpoint stays.
        """
        if not self.state.ended:
            self._warm_up()
            try:
                self._look()
                while not self.state.ended:
                    self._advance()
                    self._look()
            except KeyboardInterrupt:
                with undisturbed():
                    self._save()  # steps are taken as a whole, so this is one
                raise
        return self.outcome()

    def outcome(self, result: str | None = None) -> Outcome:
        """The program that the run gives so far, the ``best`` or the ``last`` [default: as configured], and its figures."""
        s = self.state
        validated = {row["step"]: row for row in s.rows if "valid_perplexity" in row}
        given = s.step if (result or self.config.result) == "last" else s.best_step
        tokens = s.step * self.config.step_tokens
        return Outcome(
            program=self._program(given), rows=tuple(s.rows), steps=s.step, planned=s.steps or s.step, tokens=tokens, seconds=s.seconds,
            tokens_per_second=tokens / s.step_seconds if s.step_seconds else 0.0, ended=s.ended, best_step=given,
            before=validated.get(0, {}), after=validated.get(given, {}), warnings=tuple(s.warnings),
        )  # fmt: skip

    def _program(self, step: int) -> Program:
        if step and step == self.state.step:
            return self.form.to_program()
        if step == 0 or not self.work.writes:
            return self.form.program
        best = self.work.load(self.work.best)
        if best is None or best["step"] != self.state.best_step:
            raise ArtifactError(f"{self.work.folder} lacks the checkpoint of step {self.state.best_step}; delete that folder to begin anew")
        self._set_raw(best["raw"])
        return self.form.to_program()

    def _warm_up(self) -> None:
        """Compile before the first step: its time is not that of a step."""
        if not self.config.compile:
            return
        self._say("compile")
        rows = self.config.rows // self.accelerator.num_processes // self.config.accumulate
        ids = torch.randint(self.form.program.info.vocab_size, (rows, self.corpus.window), generator=torch.Generator().manual_seed(0))
        self.objective(ids).total.backward()
        for parameter in self.form.raw.values():
            parameter.grad = None

    def _advance(self) -> None:
        s, world = self.state, self.accelerator.num_processes
        share = learning_rate(self.config, s.step, s.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        started = time.perf_counter()
        with undisturbed():
            windows = self.corpus.batch(self.first_step + s.step, self.config.rows // world, self.accelerator.process_index, world)
            values, rates = self._step(windows)
            took = time.perf_counter() - started
            s.step += 1
            s.summed += 1
            s.step_seconds += took
            s.summed_seconds += took
            s.sums = [a + b for a, b in zip(s.sums, values, strict=True)]
            s.rate_sums = [a + b for a, b in zip(s.rate_sums or [0.0] * len(rates), rates, strict=True)]
            self._latest |= {"loss": values[0], "rates": dict(zip(self._labels.values(), rates, strict=True))}
        self._timed.append(took)
        warning = self.divergence.see(s.step, values[0])
        if warning is not None:
            self._warn(warning)
        if s.steps is None and len(self._timed) == _TIMED_STEPS:
            self._plan()
        self._say("train")

    def _step(self, windows: Tensor) -> tuple[list[float], list[float]]:
        """One optimizer step; returns the loss and its parts, and the firing rate of every population."""
        pieces: list[Losses] = []
        for piece in windows.chunk(self.config.accumulate):
            with self.accelerator.accumulate(self.objective):
                losses: Losses = self.objective(piece)
                self.accelerator.backward(losses.total)
                pieces.append(losses)
                if self.accelerator.sync_gradients:
                    self._clip(pieces, windows)
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
        values = torch.stack([torch.cat([p.total.detach().view(1), p.parts]) for p in pieces]).mean(0).double()
        rates = torch.stack([p.rates for p in pieces]).mean(0)
        if self.accelerator.num_processes > 1:
            values, rates = self.accelerator.reduce((values, rates), "mean")
        return values.tolist(), rates.tolist()

    def _clip(self, pieces: list[Losses], windows: Tensor) -> None:
        """Clip the gradient, in two parts: a norm that is not finite must not spread to all gradients before it is explained."""
        parameters = [p for p in self.form.raw.values() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(torch.isfinite(norm)) or not all(bool(torch.isfinite(p.total)) for p in pieces):
            first = first_non_finite(self.form, windows)
            raise TrainingError(
                f"step {self.state.step + 1} of the training gives numbers that are not finite, first in {first}; try a lower learning "
                f"rate (lr is {self.config.lr:g}){' or no bf16' if self.config.bf16 else ''}; the last checkpoint is in {self.work.folder}"
            )
        nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)

    def _plan(self) -> None:
        """Make a number of steps of the minutes that are left."""
        s, config = self.state, self.config
        assert config.max_minutes is not None
        each = statistics.median(self._timed) + s.validation_seconds / config.validate_every
        left = 60 * config.max_minutes * _TIME_MARGIN - self._elapsed() - s.validation_seconds
        s.steps = int(self._agreed(s.step + max(1, int(left / each))))
        self._save()
        logger.info("%.2f s per step: %d steps in %g minutes", each, s.steps, config.max_minutes)

    # -------------------------------------------------------------------------------------------- between steps

    def _look(self) -> None:
        """Validate, log and save where it is time to; may be called again at the same step."""
        s, config = self.state, self.config
        end = self._end()
        if s.validated != s.step and (end or s.step % config.validate_every == 0):
            self._validate()
            end = end or self._end()
        elif s.step > s.logged and s.step % config.log_every == 0:
            with undisturbed():
                self._log({})
        if end:
            s.ended = end
        slow = time.perf_counter() - self._last_save > 60 * config.save_minutes
        if s.step and (end or s.step % config.save_every == 0 or s.validated == s.step or slow):
            with undisturbed():
                self._save()

    def _end(self) -> str:
        """Why the run ends here; empty if it does not. The first process decides."""
        s, config = self.state, self.config
        end = ""
        if s.step >= min(s.steps or math.inf, self.stop_after or math.inf):
            end = "steps"
        elif config.max_minutes is not None and self._elapsed() + s.validation_seconds >= 60 * config.max_minutes:
            end = "time"
        elif config.patience is not None and s.worse >= config.patience:
            end = "patience"
        return _ENDS[int(self._agreed(_ENDS.index(end)))]

    def _validate(self) -> None:
        s = self.state
        started = time.perf_counter()
        if not self.accelerator.is_main_process:
            s.validated = s.step
            return
        program = self.form.to_program() if s.step else self.form.program
        found = validate(program, self.validation, progress=lambda done, total: self._say("validate", done, total))
        with undisturbed():
            s.validated, s.validation_seconds = s.step, time.perf_counter() - started
            self._log({**found.row(self._labels), **self.constants})
            for warning in self.neurons.see(s.step, found.populations):
                self._warn(warning)
            key = self._key(found)
            if key < s.best_key:
                s.best_step, s.best_key, s.worse = s.step, key, 0
                if s.step:
                    self.work.save(self.work.best, {"step": s.step, "raw": self._raw()})
            else:
                s.worse += 1
        logger.info("step %d: %s", s.step, ", ".join(f"{k} {v:.4g}" for k, v in s.rows[-1].items() if isinstance(v, float)))

    def _key(self, found: Validation) -> float:
        """Smaller is better: the perplexity; a firing rate so many percent above its target counts like as many of perplexity."""
        target = self.config.target_rate
        if target is None or not self.config.rate_weight:
            return found.perplexity
        return found.perplexity * (1.0 + max(0.0, found.attention_rate / target - RATE_MARGIN))

    def _log(self, more: Mapping[str, Any]) -> None:
        """Close a row of the log: means over the steps since the one before."""
        s, config = self.state, self.config
        row: dict[str, Any] = {"step": s.step, "tokens": s.step * config.step_tokens}
        if s.summed:
            weights = {"loss": 1.0, "ce": 1.0, "kl": config.kl, "hidden": config.hidden, "rate": config.rate_weight}
            row |= {k: v / s.summed for (k, w), v in zip(weights.items(), s.sums, strict=True) if w and k in self._measured}
            row["lr"] = config.lr * learning_rate(config, s.step - 1, s.steps)
            row["tokens_per_second"] = s.summed * config.step_tokens / s.summed_seconds
            row["rates"] = {label: r / s.summed for label, r in zip(self._labels.values(), s.rate_sums, strict=True)}
        row |= more
        s.rows.append(row)
        s.sums, s.rate_sums, s.summed, s.summed_seconds, s.logged = [0.0] * len(s.sums), [], 0, 0.0, s.step
        self._latest |= row
        self.work.append(row)

    def _warn(self, message: str) -> None:
        self.state.warnings.append(self._label + message)
        self.news(News("warning", message=self._label + message))

    def _say(self, stage: str, done: int | None = None, total: int | None = None) -> None:
        s = self.state
        if stage == "train":
            done, total = s.step, min(s.steps or 0, self.stop_after or s.steps or 0)
        figures = dict(self._latest)
        if total and s.step and stage == "train":
            recent = self._timed[-_TIMED_STEPS:] or [s.step_seconds / s.step]
            each = sum(recent) / len(recent)
            figures["tokens_per_second"] = self.config.step_tokens / each
            figures["seconds_left"] = (total - s.step) * (each + s.validation_seconds / self.config.validate_every)
        self.news(News(self._label + stage, done or 0, total or 0, figures))

    # -------------------------------------------------------------------------------------------- state

    def _save(self) -> None:
        self.state.seconds, self._clock = self._elapsed(), time.perf_counter()
        self._last_save = self._clock
        if self.work.writes:
            state = {
                "identity": self.identity, "state": asdict(self.state), "raw": self._raw(), "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(), "corpus": self.corpus.state_dict(), "divergence": self.divergence.state_dict(),
                "neurons": self.neurons.said,
            }  # fmt: skip
            self.work.save(self.work.last, state)

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        saved = self.work.load(self.work.last) if self.work.writes else None
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            (saved,) = broadcast_object_list([saved])
        if saved is None:
            self.work.rewrite(())
            return
        check_same_run(saved["identity"], self.identity, self.work.folder)
        self.state = replace(RunState(), **saved["state"])
        self._set_raw(saved["raw"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        self.corpus.load_state_dict(saved["corpus"])
        self.divergence.load_state_dict(saved["divergence"])
        self.neurons = NeuronWatch(saved["neurons"])
        self.work.rewrite(self.state.rows)
        for row in self.state.rows:
            self._latest |= row
        self.resumed_step = self.state.step
        self.news(News("resume", message=f"{self._label}going on from step {self.state.step} of the run in {self.work.folder}"))

    def _raw(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.form.raw.items()}

    def _set_raw(self, raw: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.form.raw.items():
                parameter.copy_(raw[name])

    def _elapsed(self) -> float:
        """Seconds of the run so far, earlier sessions included."""
        return self.state.seconds + time.perf_counter() - self._clock

    def _agreed(self, value: float) -> float:
        """The first process's value."""
        if self.accelerator.num_processes == 1:
            return value
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor([value], dtype=torch.float64)))


def _labels_of(form: TrainingForm) -> dict[str, str]:
    """Names of populations in the log: short ones, unless two are the same."""
    short = [p.label for p in form.populations]
    return {p.name: label if short.count(label) == 1 else p.name for p, label in zip(form.populations, short, strict=True)}
