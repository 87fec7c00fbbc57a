"""Convert the feed-forward blocks of a program whose attention is spiking and fine-tuned already: half a network after the other.

    ntc compile examples/gpt2-books -o build/ssa --recipe ssa-only
    ntc finetune build/ssa --data books-train.txt.xz -o build/ssa-tuned
    python examples/progressive.py build/ssa-tuned build/full --data books-train.txt.xz
    ntc finetune build/full --data books-train.txt.xz -o build/full-tuned

The feed-forward blocks are calibrated on what the fine-tuned attention gives them, and the layers behind their neurons are fitted to the
spikes. The new folder is a compiled folder like any other.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ntc import artifact
from ntc.folders import replacing_folder
from ntc.loading import load_tokenizer
from ntc.pipeline import Context, run_pipeline
from ntc.registry import find_pass
from ntc.text import calibration_from, tokens_from

COPIED = ("recipe", "settings")


def main() -> None:
    """Calibrate, convert and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="compiled with --recipe ssa-only, and fine-tuned")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--data", type=Path, required=True, help="calibration text")
    parser.add_argument("--tokens", type=int, default=16384, help="of that text (default: 16384)")
    parser.add_argument("--steps", type=int, default=4, help="time steps of the new neurons (default: 4)")
    args = parser.parse_args()
    window = min(256, artifact.load(args.folder).info.context or 256)
    tokens = tokens_from(args.data, load_tokenizer(args.folder / "tokenizer"), window, args.tokens)
    passes = [
        find_pass("calibrate").configure({"rows": args.tokens}),
        find_pass("convert-ffn").configure({"steps": args.steps, "refit": True}),
        find_pass("fold-thresholds").configure({}),
        find_pass("insert-neurons").configure({}),
    ]
    program = run_pipeline(artifact.load(args.folder), passes, Context(calibration_from(tokens)))
    manifest = artifact.read_manifest(args.folder)
    with replacing_folder(args.out) as beside:
        artifact.save(program, beside, about={key: manifest[key] for key in COPIED if key in manifest})
        shutil.copyfile(args.folder / "analog.json", beside / "analog.json")
        shutil.copytree(args.folder / "tokenizer", beside / "tokenizer")
        artifact.seal(beside)
    for record in program.history:
        if "refit_squared_error" in record.notes:
            for block, layers in record.notes["refit_squared_error"].items():
                for error in layers:
                    print(f"{block}: unexplained share of the layer behind the spikes {error['before']:.3f} -> {error['after']:.3f}")


if __name__ == "__main__":
    main()
