"""Compile a randomly initialised model of a given size; print time per stage and peak memory.

Memory is told in two figures: all that was in memory (``ru_maxrss``), mapped files among it, which the kernel drops when it needs the
space, and the part that it cannot drop without swap (``RssAnon`` and ``RssShmem``, looked at 20 times a second).

    python benchmarks/scale.py small --emit netlist        # 124 M parameters
    python benchmarks/scale.py xl --emit netlist           # 1.5 B parameters
    python benchmarks/scale.py llama-1b --recipe sdllm --emit ""   # 1.1 B parameters, weights saved in bfloat16
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from ntc.cli.options import settings_from
from ntc.compiler import DEFAULT_RECIPE, compile_model, write


def gpt2(layers: int, width: int, heads: int) -> PretrainedConfig:
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads)


def llama(layers: int, width: int, heads: int, key_heads: int, inner: int) -> PretrainedConfig:
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=key_heads, intermediate_size=inner,
        max_position_embeddings=2048, vocab_size=32000, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip


SIZES = {
    "small": (gpt2, 12, 768, 12), "medium": (gpt2, 24, 1024, 16), "large": (gpt2, 36, 1280, 20), "xl": (gpt2, 48, 1600, 25),
    "llama-135m": (llama, 30, 576, 9, 3, 1536), "llama-1b": (llama, 22, 2048, 32, 4, 5632),
}  # fmt: skip


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Watch(threading.Thread):
    """The most memory that the kernel could not drop, in GiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0

    def run(self) -> None:
        while True:
            rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.peak = max(self.peak, sum(int(rows[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 2**20)
            time.sleep(0.05)


def make_model(folder: Path, size: str) -> None:
    make, *numbers = SIZES[size]
    torch.manual_seed(0)
    config = make(*numbers)
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--emit", default="netlist")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    parser.add_argument("--steps", type=int, help="T; by default as the recipe says")
    args = parser.parse_args()
    report: dict[str, object] = {"size": args.size, "recipe": args.recipe, "set": args.set, "threads": torch.get_num_threads()}
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        # Saved first and compiled from its folder, as a user does: then the model is not held in memory beside the program.
        model = Path(folder) / "model"
        maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(model, args.size))
        maker.start()
        maker.join()  # in a process of its own: its memory is not part of the figure
        watch.start()
        started, cpu = time.perf_counter(), time.process_time()
        settings = settings_from(None, args.set, args.steps, None)
        compiled = compile_model(model, recipe=args.recipe, settings=settings)
        report["compile_seconds"] = round(time.perf_counter() - started, 1)
        report["compile_cpu_seconds"] = round(time.process_time() - cpu, 1)
        report["passes"] = {r.name: round(r.seconds, 1) for r in compiled.program.history}
        report |= {f"{k}_seconds": round(v, 1) for k, v in compiled.seconds.items()}
        report["parameters"] = compiled.analog.info.parameters
        report["compile_peak_gib"], report["compile_peak_not_droppable_gib"] = round(peak_gib(), 2), round(watch.peak, 2)
        started = time.perf_counter()
        results = write(compiled, Path(folder) / "out", emit=[e for e in args.emit.split(",") if e])
        report["write_seconds"] = round(time.perf_counter() - started, 1)
        report["peak_gib"], report["peak_not_droppable_gib"] = round(peak_gib(), 2), round(watch.peak, 2)
        report["cpu_seconds"] = round(time.process_time() - cpu, 1)
        report["targets"] = results
        report["files"] = {p.name: p.stat().st_size for p in sorted((Path(folder) / "out").iterdir()) if p.is_file()}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
