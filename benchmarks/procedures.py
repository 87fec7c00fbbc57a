"""Ways to train a converted network, each on as many tokens: for attention_variants.py, which compares them.

================================================  ==================================================================================
blockwise, then end to end                        every layer fitted to the original's by itself, then cross entropy and KL
end to end                                        cross entropy and KL alone
end to end, hidden states instead of KL           cross entropy and the distance of the residual stream behind every block
progressive replacement                           block after block: what spikes so far is trained before the next one is converted
the original network                              what all are compared with: no spikes, cross entropy, the same windows
================================================  ==================================================================================
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ntc.blocks import block_outputs
from ntc.errors import ConfigError, TrainingError
from ntc.pipeline import Override
from ntc.program import Program
from ntc.training.config import TrainingConfig
from ntc.training.prepare import texts
from ntc.training.run import Finetuned, finetune
from ntc.training.state import News

BOTH, END_TO_END, HIDDEN = "blockwise, then end to end", "end to end", "end to end, hidden states instead of KL"
PROGRESSIVE, ORIGINAL = "progressive replacement", "the original network"
PROCEDURES = (BOTH, END_TO_END, HIDDEN, PROGRESSIVE)

FREE = ("save_every", "save_minutes", "log_every")  # options of a training that its result does not depend on

Convert = Callable[[Program, tuple[Override, ...]], Program]


def tell(news: News) -> None:
    """Warnings, and that a training goes on, on standard error."""
    if news.message and news.stage in ("warning", "resume"):
        print(f"  {news.message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Training:
    """What all procedures have in common.

    Attributes:
        text: Training text.
        validation: Validation text; None = the end of the training text.
        config: Of the stage by layers and the one end to end, one after the other.
        teacher: The original network.
        tokenizer: Of the texts.
        hashes: Of the two texts.
    """

    text: str
    validation: Path | None
    config: TrainingConfig
    teacher: Program
    tokenizer: Any
    hashes: Mapping[str, str]

    @classmethod
    def on(cls, text: str, validation: Path | None, config: TrainingConfig, teacher: Program, tokenizer: Any) -> Training:
        """Read the texts now: for their hashes, and because an error should come at once."""
        config = config.fitting(teacher.info.context)
        corpus, held_out = texts(teacher, text, tokenizer, config, validation, streaming=False, news=tell)
        return cls(text, validation, config, teacher, tokenizer, {"text": corpus.sha256, "validation": held_out.sha256})

    def by(self, procedure: str) -> TrainingConfig:
        """Options of a procedure, all its tokens in one."""
        config = self.config
        if procedure == BOTH:
            return config
        total = (config.max_tokens or 0) + (config.blockwise_tokens or 0)
        whole = replace(config, max_tokens=total, blockwise_tokens=0)
        if procedure == HIDDEN:
            return replace(whole, kl=0.0, hidden=1.0)
        return whole.for_baseline() if procedure == ORIGINAL else whole

    def about(self, procedure: str) -> dict[str, Any]:
        """What the result of a procedure depends on, with values where the configuration leaves them open."""
        config = self.by(procedure)
        options = {**config.to_json(), "rate": config.rate_weight}
        return {"procedure": procedure, **self.hashes, "config": {k: v for k, v in options.items() if k not in FREE}}

    def run(self, procedure: str, start: Program, convert: Convert, place: Path) -> Finetuned:
        """Train; what was begun in ``place`` goes on.

        Args:
            procedure: One of ``PROCEDURES``, or ``ORIGINAL``.
            start: The calibrated network.
            convert: Makes it spiking, but for modules that overrides leave as they are.
            place: Folder for checkpoints.

        Raises:
            TrainingError: Carries the best program of the run, if all of it was converted by then.
        """
        if procedure == PROGRESSIVE:
            return self._progressive(start, convert, place)
        return self._finetune(self.teacher if procedure == ORIGINAL else convert(start, ()), self.by(procedure), place)

    def _progressive(self, program: Program, convert: Convert, place: Path) -> Finetuned:
        """Block after block.

        Every block gets an equal share of the tokens, in an order of its own. It is calibrated, fitted and folded when its turn
        comes, on what the trained blocks before it give; all other tensors stay as training left them.
        """
        blocks = list(block_outputs(program))
        if not blocks:
            raise ConfigError(f"{program.info.source} has no transformer blocks that could be replaced one after another")
        whole = self.by(PROGRESSIVE)
        share = max(1, (whole.max_tokens or 0) // len(blocks))
        for number in range(len(blocks)):
            later = blocks[number + 1 :]
            left = tuple(Override(glob, {"convert": False}) for block in later for glob in (block, f"{block}.*"))
            stage = replace(whole, max_tokens=share, seed=whole.seed + number)
            try:
                found = self._finetune(convert(program, left), stage, place / f"block{number}")
            except TrainingError as error:
                if later:
                    error.best = None  # part of it is still analog: its figures would flatter
                raise
            program = found.program
        return found

    def _finetune(self, program: Program, config: TrainingConfig, place: Path) -> Finetuned:
        return finetune(
            program, self.text, config=config, teacher=self.teacher, tokenizer=self.tokenizer, validation=self.validation, work=place,
            keep_best=True, news=tell,
        )  # fmt: skip
