"""Compile a randomly initialised GPT-2 of a given size to a netlist; print time per stage and peak memory.

    python benchmarks/scale.py small --emit netlist        # 124 M parameters
    python benchmarks/scale.py xl --emit netlist           # 1.5 B parameters
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ntc.compiler import compile_model, write

SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20), "xl": (48, 1600, 25)}


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def make_model(folder: Path, layers: int, width: int, heads: int) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=heads)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--emit", default="netlist")
    args = parser.parse_args()
    layers, width, heads = SIZES[args.size]
    report: dict[str, object] = {"size": args.size, "steps": args.steps, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        # Saved first and compiled from its folder, as a user does: then the model is not held in memory beside the program.
        model = Path(folder) / "model"
        maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(model, layers, width, heads))
        maker.start()
        maker.join()  # in a process of its own: its memory is not part of the figure
        started = time.perf_counter()
        compiled = compile_model(model, steps=args.steps)
        report["compile_seconds"] = round(time.perf_counter() - started, 1)
        report |= {f"{k}_seconds": round(v, 1) for k, v in compiled.seconds.items()}
        report["parameters"] = compiled.analog.info.parameters
        report["compile_peak_gib"] = round(peak_gib(), 2)
        started = time.perf_counter()
        results = write(compiled, Path(folder) / "out", emit=[e for e in args.emit.split(",") if e])
        report["write_seconds"] = round(time.perf_counter() - started, 1)
        report["peak_gib"] = round(peak_gib(), 2)
        report["targets"] = results
        report["files"] = {p.name: p.stat().st_size for p in sorted((Path(folder) / "out").iterdir()) if p.is_file()}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
