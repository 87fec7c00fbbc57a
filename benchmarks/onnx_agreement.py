"""Does ONNX Runtime give the same tokens as the program? Measured on text, windows of fixed length, none overlapping.

    python benchmarks/onnx_agreement.py examples/gpt2-books books-valid.txt --tokens 20000

Prints one JSON object: the share of positions with the same most probable token, how far the logits move (quantiles over
positions of ``max_v |delta logit|``), the same with every population's readers held to the program's spikes, and the time of
export and comparison.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

import ntc
from ntc.loading import load_tokenizer
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc_backends.onnx_export import OnnxBackend


def windows(model: str, text: Path, window: int, tokens: int) -> torch.Tensor:
    """Token ids ``[N, window]`` from the start of a text, at least ``tokens`` of them if the text is long enough."""
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise SystemExit(f"{model} has no tokenizer")
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    count = min(len(ids) // window, -(-tokens // window))
    return ids[: count * window].view(count, window)


def main() -> None:
    """Compile, export, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--recipe", default="neurtransformer")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the recipe, such as steps=8")
    parser.add_argument("--calibration", type=Path, help="default: calibration.txt of the model folder")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    given = parser.parse_args()

    text = given.calibration or Path(given.model) / "calibration.txt"
    calibration = windows(given.model, text, given.window, given.calibration_tokens)
    options = {k: int(v) if v.isdigit() else v for k, v in (s.split("=", 1) for s in given.set)}
    context = ntc.Context(ntc.Calibration(tuple(calibration.split(8)), text.name, ""))
    program = ntc.run_pipeline(ntc.capture(given.model), recipe(given.recipe).build(Settings(options), find_pass), context)
    ids = windows(given.model, given.data, given.window, given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        report = OnnxBackend().emit(program, folder, tokens=ids)
        seconds = time.perf_counter() - started
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "threads": torch.get_num_threads()}
    setup = {"recipe": given.recipe, "T": program.steps, "window": given.window, "data": given.data.name, **options}
    print(json.dumps({**setup, **report, "seconds": round(seconds, 1), **versions}, indent=1))


if __name__ == "__main__":
    main()
