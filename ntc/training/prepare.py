"""What a run needs before it begins: processes, options that depend on the machine, texts, and the network it came from."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ntc import artifact
from ntc.blocks import block_outputs
from ntc.errors import ArtifactError, ConfigError, DataError
from ntc.folders import is_artifact
from ntc.frontend import capture
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.registry import find_pass
from ntc.text import Tokens, tokens_from
from ntc.training.config import TrainingConfig
from ntc.training.corpus import Corpus, PackedCorpus, open_corpus
from ntc.training.state import News

__all__ = ["accelerator_for", "decided", "identity_of", "network_from", "source_of", "texts"]

# Of the training text, if there is no validation text: a hundredth, but enough windows to tell programs apart, and never much
# of a short text.
_HELD_OUT_SHARE, _HELD_OUT_LEAST, _HELD_OUT_MOST_SHARE = 0.01, 8, 0.1

# Compiling takes 10 to 20 s per transformer block and then saves more than half of every step. It pays from about so many tokens
# x parameters per block on, or minutes; both are estimates, and the option `compile` decides otherwise.
_COMPILE_WORK, _COMPILE_MINUTES = 1.3e11, 4.0


def accelerator_for(config: TrainingConfig) -> Any:
    """The processes of this run, as ``accelerate launch`` started them; one if it did not.

    Raises:
        ConfigError: If the windows of a step do not divide into the processes.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import GradientAccumulationPlugin

    parallel = DistributedDataParallelKwargs(
        broadcast_buffers=False,  # frozen weights are the same everywhere
        gradient_as_bucket_view=True,
        find_unused_parameters=not (config.ce or config.kl),  # hidden states alone leave the head out
    )
    # Precision is the program's own affair: its membranes stay in float32.
    accelerator = Accelerator(
        cpu=True, mixed_precision="no", kwargs_handlers=[parallel],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulate, sync_with_dataloader=False),
    )  # fmt: skip
    world = accelerator.num_processes
    if config.rows % (world * config.accumulate):
        raise ConfigError(
            f"{config.rows} windows per step do not divide into {world} processes with {config.accumulate} piece(s) each: change rows"
        )
    return accelerator


def decided(config: TrainingConfig, program: Program, world: int) -> TrainingConfig:
    """The options that depend on the machine, decided."""
    bf16, compile = config.bf16, config.compile
    if bf16 is None:
        able = torch.cpu.get_capabilities()
        bf16 = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    if compile is None:
        size = sum(t.numel() for t in program.tensors.values()) / max(1, len(block_outputs(program)))
        tokens = (config.max_tokens or 0) + (config.blockwise_tokens or 0)
        is_long = (config.max_minutes or 0) >= _COMPILE_MINUTES or tokens / world * size >= _COMPILE_WORK
        compile = is_long and shutil.which(os.environ.get("CXX", "g++")) is not None
    return replace(config, bf16=bf16, compile=compile)


def identity_of(program: Program) -> str:
    """Hash of what a program computes: its graph and its tensors."""
    digest = hashlib.sha256(str(program).encode())
    for name, tensor in program.tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ texts


def texts(
    program: Program,
    data: str | Path | Sequence[str | Path],
    tokenizer: Any,
    config: TrainingConfig,
    validation: str | Path | None,
    *,
    streaming: bool,
    news: Callable[[News], None],
    **options: Any,
) -> tuple[Corpus, Tokens]:
    """The training text and the windows of the validation text, which is the end of the former if none is given.

    Args:
        program: Its vocabulary counts.
        data: Sources, as of ``open_corpus``.
        tokenizer: A Hugging Face tokenizer.
        config: With its window.
        validation: A text file.
        streaming: Read the text in order.
        news: Called while tokens are packed.
        options: More for ``open_corpus``.

    Raises:
        DataError: If a text cannot be used, or there is nothing to hold out.
    """
    window, vocab_size = config.window or 0, program.info.vocab_size
    if streaming and validation is None:
        raise DataError("a text that is streamed has no end to hold out for validation: give a validation text")
    held_out = None
    if validation is not None:
        held_out = tokens_from(Path(validation), tokenizer, window, config.validation_windows * window, vocab_size)
    corpus = open_corpus(
        data, tokenizer, window, seed=config.seed, vocab_size=vocab_size, streaming=streaming,
        progress=lambda tokens, source: news(News("read", tokens, message=source)), **options,
    )  # fmt: skip
    if held_out is None:
        assert isinstance(corpus, PackedCorpus)
        total = (corpus.tokens or 0) // window
        windows = min(max(int(_HELD_OUT_SHARE * total), _HELD_OUT_LEAST), int(_HELD_OUT_MOST_SHARE * total), config.validation_windows)
        corpus, held_out = corpus.split(max(1, windows))
    corpus.steps_per_epoch(config.rows)  # too short a text is an error before the network is loaded
    return corpus, held_out


# ------------------------------------------------------------------------------------------------ networks


def network_from(source: Program | str | Path) -> Program:
    """A network in canonical form: a program, the one in a compiled folder, or a captured model."""
    if not isinstance(source, Program):
        source = artifact.load(source) if is_artifact(Path(source)) else capture(source)
    if source.facts & {"canonical", "spiking"}:
        return source
    return run_pipeline(source, [find_pass("canonicalize").configure({})])


def source_of(program: Program, what: str) -> str:
    """Where the model is that a program was compiled from.

    Raises:
        ArtifactError: If it is not there any more; says what to give instead.
    """
    source = program.info.source
    if not Path(source).exists():
        raise ArtifactError(f"the model {source} that the program was compiled from is not there: give {what}")
    return source
