r"""Train a small GPT-2 from plain text: the reference model that ships with ntc.

    python examples/train_gpt2.py --text books-train.txt.xz --valid books-valid.txt --test books-test.txt \
        --about "36 MB of public-domain English books: Standard Ebooks productions, CC0" --license cc0-1.0 \
        --out build/gpt2-books

The result is an ordinary Hugging Face folder (GPT2LMHeadModel, byte-level BPE, fp16 safetensors, model card) with a
calibration.txt for "ntc compile". Tokens, checkpoints, training.jsonl and curve.svg stay in the work folder.

The work is resumable: run the same command again after a kill and it goes on from the last checkpoint with the
same data order. --text takes any UTF-8 file, plain or .xz; documents are separated by <|endoftext|>.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, plain or xz-compressed."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def make_tokenizer(text: str, vocab_size: int, context: int, folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE once; later runs load the one that is there."""
    if (folder / "tokenizer_config.json").exists():  # written after tokenizer.json: both are there
        return PreTrainedTokenizerFast.from_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.split(END), vocab_size=vocab_size, min_frequency=2, special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END, unk_token=END, model_max_length=context
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def calibration_text(text: str, chars: int) -> str:
    """From the middle of each document, whole lines of at most so many characters; of a line longer than that, its start."""
    passages = []
    for document in (d for d in text.split(END) if d.strip()):
        middle = len(document) // 2
        start = document.find("\n", middle) + 1 or middle
        end = document.rfind("\n", start, start + chars)
        passages.append(document[start : end if end > start else start + chars].strip("\n"))
    return "\n".join(passages) + "\n"


def encode(text: str, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Token ids of the text; one end-of-text token after each document."""
    documents = [d for d in text.split(END) if d.strip()]
    ids: list[int] = []
    for document in documents:
        # A book is encoded in lumps of paragraphs, so that the tokenizer's memory stays small.
        lumps = document.split("\n")
        for start in range(0, len(lumps), 2000):
            lump = "\n".join(lumps[start : start + 2000])
            ids += tokenizer(lump if start == 0 else "\n" + lump, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, dtype=np.uint16 if len(tokenizer) <= 65536 else np.uint32)


def steps_per_epoch(tokens: int, batch: int, context: int) -> int:
    """Full batches in one pass over the text, whatever the offset of the epoch."""
    return (tokens - context) // (context * batch)


def batch_at(data: np.ndarray, step: int, batch: int, context: int, seed: int) -> torch.Tensor:
    """Windows of one step: a permutation of non-overlapping windows, drawn afresh (with a new offset) each epoch.

    A pure function of ``step``, so a resumed run sees exactly the windows that an uninterrupted one would.
    """
    per_epoch = steps_per_epoch(len(data), batch, context)
    epoch, within = divmod(step, per_epoch)
    random = np.random.default_rng((seed, epoch))
    offset = int(random.integers(context))
    starts = offset + context * random.permutation((len(data) - offset) // context)
    rows = starts[within * batch : (within + 1) * batch]
    return torch.from_numpy(np.stack([data[s : s + context] for s in rows]).astype(np.int64))


@torch.no_grad()
def perplexity(model: torch.nn.Module, data: np.ndarray, context: int, max_windows: int | None = None) -> float:
    """exp(mean next-token loss) over non-overlapping windows of ``context`` tokens, fp32."""
    windows = torch.from_numpy(data[: len(data) // context * context].astype(np.int64)).view(-1, context)
    total, count = 0.0, 0
    for rows in windows[:max_windows].split(16):
        logits = model(input_ids=rows).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1), reduction="sum"
        ).item()
        count += rows[:, 1:].numel()
    return math.exp(total / count)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < args.warmup:
        return float(args.lr * (step + 1) / args.warmup)
    along = (step - args.warmup) / max(1, args.steps - args.warmup)
    return float(args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * along))))


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside, then rename: a kill while writing leaves the previous file whole."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        write(file)
    os.replace(beside, path)


def replace_text(path: Path, text: str) -> None:
    """Likewise for text."""
    replace_file(path, lambda file: file.write(text.encode()))


def recipe_of(args: argparse.Namespace) -> dict[str, object]:
    """What a checkpoint depends on: with any other value the run would be another one."""
    names = ("layers", "width", "heads", "vocab", "context", "steps", "batch", "lr", "decay", "warmup", "seed", "valid_windows", "every")
    return {name: getattr(args, name) for name in names}


def curve_svg(log: list[dict[str, float]]) -> str:
    """Validation perplexity (log scale) over tokens as an SVG image, 640 x 360."""
    left, right, top, bottom = 60, 620, 20, 310
    last = max(row["tokens"] for row in log)
    values = [row["valid_perplexity"] for row in log]
    low, high = math.log(min(values)) - 0.05, math.log(max(values)) + 0.05

    def x(tokens: float) -> float:
        return left + (right - left) * tokens / last

    def y(perplexity: float) -> float:
        return bottom - (bottom - top) * (math.log(perplexity) - low) / (high - low)

    path = " ".join(f"{x(row['tokens']):.1f},{y(row['valid_perplexity']):.1f}" for row in log)
    marks = [m * 10**k for k in range(8) for m in (1, 2, 5) if low <= math.log(m * 10**k) <= high] or [values[-1]]
    rows = "".join(
        f'<line x1="{left}" x2="{right}" y1="{y(m):.1f}" y2="{y(m):.1f}" stroke="#ddd"/>'
        f'<text x="{left - 8}" y="{y(m) + 4:.1f}" text-anchor="end">{m:,.0f}</text>'
        for m in marks
    )
    columns = "".join(
        f'<text x="{x(last * i / 4):.1f}" y="{bottom + 18}" text-anchor="middle">{last * i / 4e6:.3g}</text>' for i in range(5)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="360" font-family="sans-serif" font-size="12">'
        f'<rect width="640" height="360" fill="white"/>{rows}{columns}'
        f'<polyline points="{path}" fill="none" stroke="#1f5fa8" stroke-width="2"/>'
        f'<text x="{(left + right) // 2}" y="350" text-anchor="middle">million tokens</text>'
        f'<text x="14" y="{(top + bottom) // 2}" text-anchor="middle" transform="rotate(-90 14 {(top + bottom) // 2})">'
        "validation perplexity</text></svg>\n"
    )


def model_card(args: argparse.Namespace, log: list[dict[str, float]], figures: dict[str, float], n: int) -> str:
    """The README.md of the model folder, from what was measured."""
    points = [row for row in log if "valid_perplexity" in row]
    every = max(1, len(points) // 16)
    shown = points[::every] if points and points[::every][-1] is points[-1] else [*points[::every], *points[-1:]]
    curve = "\n".join(
        f"| {int(r['step'])} | {r['tokens'] / 1e6:.1f} M | {r['loss']:.3f} | {r['valid_perplexity']:.1f} |" for r in shown
    )
    results = "\n".join(f"| {name} | {value:.2f} |" for name, value in figures.items())
    licence = f"license: {args.license}\n" if args.license else ""
    about = f" ({args.about})" if args.about else ""
    return f"""---
{licence}language: en
library_name: transformers
pipeline_tag: text-generation
---
# A small GPT-2, trained on books

The reference model of [ntc](../../README.md): {args.layers} layers, {args.width} wide, {args.heads} heads, context
{args.context}, {args.vocab}-token byte-level BPE, tied embeddings, {n / 1e6:.2f} M parameters, stored in fp16. It is
small enough to compile, fine-tune and export in seconds, and real enough that quality can be measured. It is not a
useful writer.

- **Data**: `{args.text.name}`{about};
  validation `{args.valid.name}`, test `{args.test.name}`, neither seen in training.
- **`calibration.txt`**: one passage from the middle of each training book, for `ntc compile`.
- **Training**: {args.steps:,} steps of {args.batch} x {args.context} tokens = {args.steps * args.batch * args.context / 1e6:.1f} M tokens,
  AdamW (lr {args.lr:g}, cosine, {args.warmup} warm-up steps, weight decay {args.decay:g}, betas 0.9/0.95), bf16 autocast,
  dropout 0, seed {args.seed}. Script: `examples/train_gpt2.py`.

## Perplexity

Non-overlapping windows of {args.context} tokens, all tokens of the file, the shipped fp16 weights evaluated in fp32.

| text | perplexity |
| --- | --- |
{results}

## Curve

Training loss is the mean since the row before; validation is measured on the first {args.valid_windows} windows of `{args.valid.name}`.

| step | tokens | training loss | validation perplexity |
| --- | --- | --- | --- |
{curve}
"""


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, required=True, help="training text, plain or .xz")
    p.add_argument("--valid", type=Path, required=True, help="validation text")
    p.add_argument("--test", type=Path, required=True, help="test text: measured once, at the end")
    p.add_argument("--out", type=Path, required=True, help="folder of the finished model; an earlier model in it is replaced")
    p.add_argument("--work", type=Path, help="folder for checkpoints and logs [default: OUT.work]")
    p.add_argument("--about", default="", help="what the training text is, for the model card")
    p.add_argument("--license", default="", help="licence of the model, for the model card")

    def number(name: str, default: float, meaning: str) -> None:
        p.add_argument(name, type=type(default), default=default, metavar="N", help=f"{meaning} [default: {default:g}]")

    number("--layers", 4, "transformer blocks")
    number("--width", 256, "channels of the residual stream")
    number("--heads", 4, "attention heads")
    number("--vocab", 4096, "tokens of the byte-level BPE")
    number("--context", 256, "tokens per window")
    number("--steps", 7400, "optimizer steps")
    number("--batch", 16, "windows per step")
    number("--lr", 1.5e-3, "peak learning rate")
    number("--decay", 0.1, "weight decay of the matrices")
    number("--warmup", 200, "steps of linear warm-up")
    number("--seed", 0, "of the weights and of the data order")
    number("--valid-windows", 96, "windows of the validation text that are measured while training")
    number("--every", 200, "steps between validations and checkpoints")
    number("--calibration-chars", 3600, "most characters of each training document in calibration.txt")
    p.add_argument("--no-compile", action="store_true", help="train in eager mode: slower, and needs no C++ compiler")
    return p.parse_args()


def main() -> None:
    """Tokenize, train (resuming where a run stopped), measure, write the model folder."""
    args = parse()
    for path in (args.text, args.valid, args.test):
        if not path.is_file():
            sys.exit(f"train_gpt2: no such file: {path}")
    if args.out.exists() and not (args.out / "config.json").is_file():
        sys.exit(f"train_gpt2: {args.out} is no model folder and will not be replaced; choose another --out")
    work = args.work or args.out.with_name(args.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    text = read_text(args.text)
    tokenizer = make_tokenizer(text, args.vocab, args.context, work)
    tokens_file = work / "train-tokens.npy"
    if not tokens_file.exists():
        tokens = encode(text, tokenizer)
        replace_file(tokens_file, lambda file: np.save(file, tokens))
    data = np.load(tokens_file, mmap_mode="r")
    calibration = calibration_text(text, args.calibration_chars)
    del text
    valid, test = encode(read_text(args.valid), tokenizer), encode(read_text(args.test), tokenizer)
    if steps_per_epoch(len(data), args.batch, args.context) < 1:
        sys.exit(f"train_gpt2: {args.text} has {len(data):,} tokens, too few for one step of {args.batch} x {args.context}")
    for path, ids in ((args.valid, valid), (args.test, test)):
        if len(ids) < args.context:  # before training, not after it
            sys.exit(f"train_gpt2: {path} has {len(ids):,} tokens, too few for one window of {args.context}")

    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=args.context, n_embd=args.width, n_layer=args.layers, n_head=args.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"  # on CPUs SDPA trains more slowly than this under bf16
    model = GPT2LMHeadModel(config)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.decay}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip

    first, log = 0, []
    checkpoint = work / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        wanted = recipe_of(args)
        other = [f"--{k.replace('_', '-')} {v}" for k, v in state.get("recipe", wanted).items() if v != wanted[k]]
        if other:
            sys.exit(f"train_gpt2: the checkpoint in {work} was made with {' '.join(other)}; use the same, or another --work")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, log = state["step"], json.loads(state["log"])
        print(f"resuming at step {first}")

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=rows).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.float().reshape(-1, config.vocab_size), rows[:, 1:].reshape(-1))

    step_loss = loss_of if args.no_compile else torch.compile(loss_of)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=args.steps, completed=first, note="")
        losses, since = [], time.monotonic()
        for step in range(first, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            loss = step_loss(batch_at(data, step, args.batch, args.context, args.seed))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            done = step + 1
            speed = len(losses) * args.batch * args.context / (time.monotonic() - since)
            bar.update(task, completed=done, note=f"loss {losses[-1]:.3f}  {speed:,.0f} tokens/s")
            if done % args.every == 0 or done == args.steps:
                row = {
                    "step": done, "tokens": done * args.batch * args.context, "loss": float(np.mean(losses)),
                    "valid_perplexity": perplexity(model, valid, args.context, args.valid_windows),
                    "lr": learning_rate(step, args), "tokens_per_second": speed,
                }  # fmt: skip
                log.append(row)
                state = {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "log": json.dumps(log),
                    "recipe": recipe_of(args),
                }  # fmt: skip
                replace_file(checkpoint, lambda file, state=state: torch.save(state, file))
                # After the checkpoint and from its log: a kill in between neither doubles a row nor loses one for good.
                replace_text(work / "training.jsonl", "".join(json.dumps(r) + "\n" for r in log))
                replace_text(work / "curve.svg", curve_svg(log))
                losses, since = [], time.monotonic()

    finished = model.half()  # what ships is what is measured
    beside = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    finished.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    measured = GPT2LMHeadModel.from_pretrained(beside, dtype=torch.float32).eval()
    figures = {
        args.valid.stem: perplexity(measured, valid, args.context),
        args.test.stem: perplexity(measured, test, args.context),
    }
    (beside / "calibration.txt").write_text(calibration, encoding="utf-8")
    card = model_card(args, log, figures, sum(p.numel() for p in model.parameters()))
    (beside / "README.md").write_text(card, encoding="utf-8")
    old = args.out.with_name(args.out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if args.out.exists():  # a folder cannot be replaced at once: the old one is only deleted when the new one is in place
        os.replace(args.out, old)
    os.replace(beside, args.out)
    shutil.rmtree(old, ignore_errors=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
