"""What a fine-tuned program says of its training, and the folder that it is written to.

=======================  ==========================================================================================
file                     what
=======================  ==========================================================================================
as of ``ntc compile``    the program, with a record ``finetune`` in its history
``training.jsonl``       the log, one row per line
``curve.png``, ``.svg``  losses, validation perplexity and firing rates over the tokens
``baseline/``            the original network after the same training, a compiled folder of its own
=======================  ==========================================================================================
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntc import artifact
from ntc.errors import ConfigError
from ntc.folders import is_artifact, replacing_folder
from ntc.program import PassRecord, Program
from ntc.text import Tokens
from ntc.training.checkpoint import plain_row
from ntc.training.config import TrainingConfig
from ntc.training.corpus import Corpus
from ntc.training.curve import write_curve
from ntc.training.state import Outcome
from ntc.verify import max_difference

if TYPE_CHECKING:
    from ntc.training.run import Finetuned

__all__ = ["add_training_files", "figures_of", "load_baseline", "recorded", "write_finetuned"]

_NAME = "finetune"

# What decides which windows a run sees, in which order.
_WINDOWS = ("group", "window", "rows", "seed")


def recorded(
    program: Program, outcome: Outcome, config: TrainingConfig, corpus: Corpus, held_out: Tokens, names: Collection[str]
) -> Program:
    """The program that came of a run, with one more line of history. Times stay out: the same run gives the same bytes."""
    result = outcome.program.copy()
    notes = plain_row({
        "data": {"description": corpus.description, "sha256": corpus.sha256},
        "validation": {"description": held_out.description, "sha256": held_out.sha256},
        "steps": outcome.steps, "planned_steps": outcome.planned, "tokens": outcome.tokens, "ended": outcome.ended,
        "best_step": outcome.best_step, "perplexity_before": outcome.before.get("valid_perplexity"),
        "perplexity_after": outcome.after.get("valid_perplexity"), "rates": outcome.after.get("rates", {}),
    })  # fmt: skip
    drift, _ = max_difference(program, result)
    result.with_record(PassRecord(_NAME, config.to_json(), sites=len(names), drift=drift, notes=notes))
    return result


def figures_of(program: Program) -> dict[str, Any]:
    """Figures of the last fine-tuning of a program, as its history has them.

    Raises:
        ConfigError: If it was not fine-tuned.
    """
    record = next((r for r in reversed(program.history) if r.name == _NAME), None)
    if record is None:
        raise ConfigError(f"the program of {program.info.source} was not fine-tuned: its history has no {_NAME}")
    notes = record.notes
    keys = ("steps", "planned_steps", "tokens", "best_step", "perplexity_before", "perplexity_after")
    return {"lr": record.options["lr"], **{k: notes[k] for k in keys}, "data_sha256": notes["data"]["sha256"]}


def load_baseline(folder: Path, corpus: Corpus, config: TrainingConfig) -> Program:
    """The baseline of an earlier run, from its folder or from the one that holds it.

    Raises:
        ConfigError: If it was trained on other windows or otherwise; names what differs.
        ArtifactError: If there is none.
    """
    program = artifact.load(folder / artifact.BASELINE if is_artifact(folder / artifact.BASELINE) else folder)
    if "spiking" in program.facts:
        raise ConfigError(f"the program in {folder} is spiking: a baseline is the original network, trained with --baseline")
    figures = figures_of(program)
    options = next(r.options for r in reversed(program.history) if r.name == _NAME)
    now = config.to_json()
    differing = [f"{k} = {options.get(k)} (now {now[k]})" for k in _WINDOWS if options.get(k) != now[k]]
    if figures["data_sha256"] != corpus.sha256:
        differing.append("another training text")
    planned = config.planned_steps()
    if planned is not None and figures["planned_steps"] != planned:
        differing.append(f"{figures['planned_steps']} steps (now {planned})")
    if differing:
        raise ConfigError(f"the baseline in {folder} was trained with {', '.join(differing)}: give the same again, or train one anew")
    return program


def write_finetuned(found: Finetuned, folder: Path, *, source: Path) -> None:
    """Write the program to a folder that takes the place of what was there (``ntc.folders.check_output`` has seen to that).

    Args:
        found: What ``finetune`` returned.
        folder: Where to.
        source: The compiled folder that it came from: tokenizer, original graph and how it was compiled are taken over.
    """
    manifest = artifact.read_manifest(source)
    about: dict[str, Any] = {key: manifest[key] for key in ("recipe", "settings", "calibration") if key in manifest}
    with replacing_folder(folder) as beside:
        artifact.save(found.program, beside, about=about)
        _copy(source, beside)
        add_training_files(found, beside, source=source)
        artifact.seal(beside)


def add_training_files(found: Finetuned, folder: Path, *, source: Path | None = None) -> None:
    """Write log, curve and baseline into a folder.

    Args:
        found: What ``finetune`` returned.
        folder: An existing one.
        source: A compiled folder whose tokenizer and original graph the baseline gets too [default: ``folder``].
    """
    _write_log(folder / "training.jsonl", found.log)
    rows = list(found.log)
    if found.baseline is not None and rows:
        rows[-1] = {**rows[-1], "valid_perplexity_tuned": figures_of(found.baseline)["perplexity_after"]}
    write_curve(rows, folder / "curve")
    if found.baseline is not None:
        below = folder / artifact.BASELINE
        below.mkdir()
        artifact.save(found.baseline, below)
        _copy(folder if source is None else source, below)
        if found.baseline_log:
            _write_log(below / "training.jsonl", found.baseline_log)
        artifact.seal(below)


def _copy(source: Path, folder: Path) -> None:
    if (source / "analog.json").is_file():
        shutil.copyfile(source / "analog.json", folder / "analog.json")
    if (source / "tokenizer").is_dir():
        shutil.copytree(source / "tokenizer", folder / "tokenizer")


def _write_log(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(plain_row(row), allow_nan=False) + "\n" for row in rows), encoding="utf-8")
