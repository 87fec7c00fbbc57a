"""Fine-tuning from end to end: texts, teacher, the run, and the same run for the original network."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ntc import artifact
from ntc.errors import ConfigError, TrainingError
from ntc.loading import load_tokenizer
from ntc.program import Program
from ntc.text import Tokens
from ntc.training.blockwise import BlockwiseObjective, fitted_tensors, with_first_stage
from ntc.training.checkpoint import WorkFolder, locked, plain_row
from ntc.training.config import TrainingConfig
from ntc.training.corpus import Corpus
from ntc.training.form import TrainingForm
from ntc.training.groups import roles_of, trained
from ntc.training.loop import RATE_MARGIN, Trainer
from ntc.training.prepare import accelerator_for, decided, identity_of, network_from, source_of, texts
from ntc.training.record import figures_of, load_baseline, recorded
from ntc.training.state import News, Outcome
from ntc.training.validation import validate

__all__ = ["Finetuned", "finetune"]


def _nobody(news: News) -> None:
    return None


@dataclass(frozen=True)
class Finetuned:
    """Result of ``finetune``.

    Attributes:
        program: The program with the lowest validation perplexity: its own graph with other tensors, and a record ``finetune`` in its
            history.
        outcome: The run: log, steps, speed, figures before and after.
        config: Its options, those that were left open decided.
        data: Description, hash and tokens of the training text.
        validation: Likewise of the validation text.
        teacher: Where the teacher came from; empty if there was none.
        perplexity_ann: Of the original network on the validation text; None if it was not at hand.
        baseline: The original network after the same training; None if that was not asked for.
        trained: Names of the trained tensors.
        parameters: Numbers in them.
        resumed_step: Step of the checkpoint that the run went on from; None if it began anew.
        warnings: One sentence each.
        blockwise: The program between the two stages, every layer fitted by itself; None if ``blockwise_tokens`` was 0.
        is_main: Whether this process is the one that writes.
    """

    program: Program
    outcome: Outcome
    config: TrainingConfig
    data: Mapping[str, Any]
    validation: Mapping[str, Any]
    teacher: str
    perplexity_ann: float | None
    baseline: Program | None
    trained: tuple[str, ...]
    parameters: int
    resumed_step: int | None
    warnings: tuple[str, ...]
    blockwise: Program | None = None
    is_main: bool = True
    baseline_log: tuple[Mapping[str, Any], ...] = ()

    @property
    def log(self) -> tuple[Mapping[str, Any], ...]:
        """Rows of ``training.jsonl``."""
        return self.outcome.rows

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys (documented in docs/json.md)."""
        o, config = self.outcome, self.config
        before, after = o.before, o.after
        perplexity, ann = after.get("valid_perplexity"), self.perplexity_ann
        baseline = None if self.baseline is None else figures_of(self.baseline)
        tuned = None if baseline is None else baseline["perplexity_after"]
        return plain_row({
            "group": config.group, "trained_tensors": len(self.trained), "trained_parameters": self.parameters,
            "teacher": self.teacher, "data": dict(self.data), "validation": dict(self.validation),
            "steps": o.steps, "planned_steps": o.planned, "tokens": o.tokens, "ended": o.ended, "best_step": o.best_step,
            "resumed_step": self.resumed_step,
            "perplexity_before": before.get("valid_perplexity"), "perplexity_after": perplexity,
            "perplexity_ann": ann, "perplexity_change": perplexity / ann - 1 if perplexity and ann else None,
            "perplexity_tuned": tuned, "perplexity_change_tuned": perplexity / tuned - 1 if perplexity and tuned else None,
            "firing_rate_before": before.get("firing_rate"), "firing_rate_after": after.get("firing_rate"),
            "rates": [
                {"population": name, "before": before.get("rates", {}).get(name), "after": rate}
                for name, rate in after.get("rates", {}).items()
            ],
            "baseline": baseline, "seconds": o.seconds, "tokens_per_second": o.tokens_per_second,
            "config": config.to_json(), "warnings": list(self.warnings),
        })  # fmt: skip


def finetune(
    program: Program | str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    config: TrainingConfig | None = None,
    teacher: Program | str | Path | None = None,
    tokenizer: Any | None = None,
    validation: str | Path | None = None,
    work: str | Path | None = None,
    baseline: bool | Program = False,
    baseline_lr: float | None = None,
    baseline_from: str | Path | None = None,
    text_field: str = "text",
    split: str = "train",
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    keep_best: bool = False,
    news: Callable[[News], None] = _nobody,
) -> Finetuned:
    """Train a program on text until it is as good as the network that it came from.

    Weights, thresholds, leaks and scales are trained with surrogate gradients (Neftci et al. 2019, arXiv 1901.09948) on cross
    entropy and on the divergence from the original network (``ntc.training.losses``), on the graph itself. In several processes
    (``accelerate launch``) every one calls this with the same arguments; the first one writes, and only its result counts.

    Args:
        program: A program, or a folder that ``ntc compile`` wrote; spiking or analog.
        data: Training text: files, folders, globs or data sets (``ntc.training.corpus.open_corpus``).
        config: Options of the run.
        teacher: The original network: a program, a model, or a compiled folder [default: the model that it was compiled from].
        tokenizer: [default: that of the folder]
        validation: Validation text [default: the end of the training text, which is then not trained on].
        work: Folder for checkpoints and log: a run that was killed goes on from there [default: a temporary one].
        baseline: Also train the original network on the same windows and steps, with cross entropy; a program is taken for it.
        baseline_lr: Its peak learning rate [default: that of the program].
        baseline_from: Take such a network from the folder of an earlier run instead; it must have seen the same windows.
        text_field: Column of the text, in formats that have columns.
        split: Split of a data set from the hub.
        streaming: Read the text in order instead of packing its tokens into a cache first; needs a validation text.
        cache_dir: Where packed tokens are kept.
        keep_best: If training fails, let the error carry the best program so far, as its ``best``.
        news: Called with what the run is doing.

    Raises:
        ConfigError: If options do not fit the program, or the work folder holds another run.
        DataError: If a text cannot be used.
        ArtifactError: If a folder holds no program, or the original network is not where it was.
        TrainingError: If a number is not finite, or the loss diverges.
    """
    news(News("load"))
    folder = None if isinstance(program, Program) else Path(program)
    program = program if isinstance(program, Program) else artifact.load(program)
    if tokenizer is None and folder is not None and (folder / "tokenizer").is_dir():
        tokenizer = load_tokenizer(folder / "tokenizer")
    config = (config or TrainingConfig()).fitting(program.info.context)
    if "integer" in program.facts:
        raise ConfigError("a program of integers has no gradients: fine-tune the one in floating point, then quantize it")
    if baseline and baseline_from is not None:
        raise ConfigError("the baseline is either trained or taken from a folder: leave out one of baseline and baseline_from")
    names = trained(roles_of(program), config.group)
    accelerator = accelerator_for(config)
    corpus, held_out = texts(
        program, data, tokenizer, config, validation, streaming=streaming, news=news, text_field=text_field, split=split,
        cache_dir=cache_dir,
    )  # fmt: skip
    original = None
    if config.needs_teacher:
        original = network_from(source_of(program, "a teacher, or weigh kl and hidden 0") if teacher is None else teacher)
    config = decided(with_first_stage(config, program, original, names), program, accelerator.num_processes)
    copied = None if baseline_from is None else load_baseline(Path(baseline_from), corpus, config)
    untuned = _network_of_baseline(program, original, baseline) if baseline else None
    if config.compile:
        torch.compiler.reset()  # torch compiles a function for eight networks per process and would run the ninth uncompiled
    beginning = corpus.state_dict()
    with _place(work, accelerator) as place:
        common = {"program": identity_of(program), "training text": corpus.sha256, "validation text": held_out.sha256}
        second = None if untuned is None else _Baseline(untuned, config.for_baseline(baseline_lr), common)
        known = original or untuned
        ann = validate(known, held_out).perplexity if known is not None and accelerator.is_main_process else None
        blockwise = None
        start = program
        if config.blockwise_tokens != 0:
            assert original is not None
            blockwise = _blockwise(program, original, names, corpus, held_out, config, common, accelerator, place, news)
            start = blockwise.program
        form = TrainingForm(
            start, names, surrogate=config.surrogate, width=config.surrogate_width, bf16=bool(config.bf16),
            checkpointing=config.checkpointing,
        )  # fmt: skip
        trainer = Trainer(
            form, None if original is None else TrainingForm(original, bf16=bool(config.bf16)), corpus, held_out, config,
            work=WorkFolder(place, writes=accelerator.is_main_process), accelerator=accelerator,
            identity={**common, "start": identity_of(start), "teacher": identity_of(original) if original is not None else ""},
            first_step=blockwise.steps if blockwise else 0, first_seconds=blockwise.seconds if blockwise else 0.0,
            constants={} if ann is None else {"valid_perplexity_ann": ann}, news=news,
        )  # fmt: skip

        def result(outcome: Outcome) -> Finetuned:
            if blockwise is not None:
                outcome = blockwise.followed_by(outcome)
            return Finetuned(
                program=recorded(program, outcome, config, corpus, held_out, names), outcome=outcome, config=config,
                data={"description": corpus.description, "sha256": corpus.sha256, "tokens": corpus.tokens},
                validation={"description": held_out.description, "sha256": held_out.sha256, "tokens": held_out.count},
                teacher=original.info.source if original is not None else "", perplexity_ann=ann, baseline=None,
                trained=tuple(sorted(names)), parameters=sum(program.tensor(n).numel() for n in names),
                resumed_step=trainer.resumed_step, warnings=(*outcome.warnings, *_remarks(outcome, config)),
                blockwise=None if blockwise is None else blockwise.program, is_main=accelerator.is_main_process,
            )  # fmt: skip

        try:
            found = result(trainer.run())
            for remark in _remarks(found.outcome, config):
                news(News("warning", message=remark))
        except TrainingError as error:
            if keep_best and accelerator.is_main_process:
                error.best = result(trainer.outcome("best"))
            raise
        if second is not None:
            corpus.load_state_dict(beginning)
            return second.train(found, corpus, held_out, accelerator, place, news)
    return found if copied is None else _with_copied(found, copied, news)


def _blockwise(
    program: Program, original: Program, names: frozenset[str], corpus: Corpus, held_out: Tokens, config: TrainingConfig,
    common: Mapping[str, str], accelerator: Any, place: Path, news: Callable[[News], None],
) -> Outcome:  # fmt: skip
    """Fit every layer by itself (``ntc.training.blockwise``)."""
    fitted = names & fitted_tensors(program)
    if not fitted:
        raise ConfigError(
            f"the group {config.group!r} has no tensor in a layer that holds neurons, so there is nothing to fit layer by layer: "
            "leave blockwise_tokens out, or choose another group"
        )
    form = TrainingForm(
        program, fitted, surrogate=config.surrogate, width=config.surrogate_width, bf16=bool(config.bf16),
        checkpointing=config.checkpointing, by_layer=True, forced=True,
    )  # fmt: skip
    trainer = Trainer(
        form, TrainingForm(original, bf16=bool(config.bf16), by_layer=True), corpus, held_out, config.for_blockwise(),
        work=WorkFolder(place, "blockwise", writes=accelerator.is_main_process), accelerator=accelerator,
        identity={**common, "teacher": identity_of(original)}, objective=BlockwiseObjective, news=news,
    )  # fmt: skip
    return trainer.run()


def _remarks(outcome: Outcome, config: TrainingConfig) -> list[str]:
    """What has to be said of the end."""
    remarks = []
    if outcome.best_step == 0 and outcome.steps:
        remarks.append("no validation was better than the one before training: the program is left as it was")
    rate = outcome.after.get("attention_rate")
    if config.target_rate is not None and rate is not None and rate > RATE_MARGIN * config.target_rate:
        remarks.append(f"the attention populations fire at {rate:.3f} on average, above the target rate of {config.target_rate:g}")
    if outcome.ended == "time":
        remarks.append(f"the time was over after {outcome.steps} of {outcome.planned} steps: the learning rate had not come down yet")
    return remarks


@contextmanager
def _place(given: str | Path | None, accelerator: Any) -> Iterator[Path]:
    """The work folder, for this run alone."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="ntc-finetune-") as folder:
            yield Path(folder)
    elif accelerator.is_main_process:
        with locked(Path(given)):
            yield Path(given)
    else:
        yield Path(given)


def _network_of_baseline(program: Program, teacher: Program | None, baseline: bool | Program) -> Program:
    """The one given, else the teacher if it is analog, else the original."""
    if isinstance(baseline, Program):
        return network_from(baseline)
    if teacher is not None and "spiking" not in teacher.facts:
        return teacher
    return network_from(source_of(program, "the original network as the baseline"))


@dataclass(frozen=True)
class _Baseline:
    """The original network, to be trained on the very windows that the program sees."""

    network: Program
    config: TrainingConfig
    identity: Mapping[str, str]

    def __post_init__(self) -> None:
        try:
            trained(roles_of(self.network), self.config.group)
        except ConfigError as error:  # the group of thresholds
            raise ConfigError(
                f"there is no baseline for the group {self.config.group}: the original network has nothing of it to train"
            ) from error

    def train(
        self, found: Finetuned, corpus: Corpus, held_out: Tokens, accelerator: Any, place: Path, news: Callable[[News], None]
    ) -> Finetuned:
        names = trained(roles_of(self.network), self.config.group)
        trainer = Trainer(
            TrainingForm(self.network, names, bf16=bool(self.config.bf16)), None, corpus, held_out, self.config,
            work=WorkFolder(place, artifact.BASELINE, writes=accelerator.is_main_process), accelerator=accelerator,
            identity={**self.identity, "original network": identity_of(self.network)}, steps=found.outcome.planned,
            stop_after=found.outcome.steps, news=news,
        )  # fmt: skip
        outcome = trainer.run()
        program = recorded(self.network, outcome, self.config, corpus, held_out, names)
        return replace(found, baseline=program, baseline_log=outcome.rows, warnings=(*found.warnings, *outcome.warnings))


def _with_copied(found: Finetuned, baseline: Program, news: Callable[[News], None]) -> Finetuned:
    tokens = figures_of(baseline)["tokens"]
    warnings = found.warnings
    if tokens != found.outcome.tokens:
        remark = f"the baseline was trained on {tokens:,} tokens and this program on {found.outcome.tokens:,}"
        news(News("warning", message=remark))
        warnings = (*warnings, remark)
    return replace(found, baseline=baseline, warnings=warnings)
