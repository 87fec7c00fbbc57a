"""How fast is the integer ONNX? Against that of the original network in float32 and dynamically quantized to 8 bits.

    ntc compile examples/gpt2-books -o build/integer --quantize 8 --emit onnx
    python benchmarks/integer_onnx.py examples/gpt2-books build/integer --data books-valid.txt
    python benchmarks/integer_onnx.py examples/gpt2-books build/integer --tokens 128 --rounds 100 --json

The original network is captured, canonicalized and written by the same exporter as the integer one; ONNX Runtime's ``quantize_dynamic``
makes the 8-bit one of that file. Each round runs one window of tokens through every file, in turns, so that the noise of a
shared machine meets all of them; a ratio is the median over the rounds of times of the same round. With one thread the time is CPU time,
which others on the machine disturb least, with more it is wall time. Memory is how much the largest resident set of a process grows by
loading the file and running it once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

import ntc
from ntc.loading import load_tokenizer
from ntc.program import Program
from ntc.registry import find_pass
from ntc.text import random_tokens, tokens_from
from ntc_backends.onnx_export import build
from ntc_backends.onnx_writer import EXTERNAL_BYTES, MODEL, save

FLOAT, DYNAMIC, INTEGER = "original, float32", "original, int8 (quantize_dynamic)", "integer spiking network"

Row = dict[str, Any]


def export(program: Program, folder: Path) -> Path:
    folder.mkdir()
    model, weights = build(program)
    save(model, weights, folder, EXTERNAL_BYTES)
    return folder / MODEL


def files(network: str, compiled: Path, work: Path) -> dict[str, Path]:
    """The three files; a network that is an ONNX file is taken as it is."""
    program = ntc.load(compiled)
    if program.results[0].target is not torch.ops.ntc.from_integer.default:
        raise SystemExit(f"{compiled} does not compute with integers: compile with --quantize 8")
    found = {INTEGER: export(program, work / "integer")}
    if network.endswith(".onnx"):
        found[FLOAT] = Path(network)
    else:
        original = ntc.run_pipeline(ntc.capture(network), [find_pass("canonicalize").configure({})])
        found[FLOAT] = export(original, work / "float")
    folded, found[DYNAMIC] = work / "folded.onnx", work / "dynamic.onnx"
    quant_pre_process(str(found[FLOAT]), str(folded), skip_symbolic_shape=True)  # weights become constants
    quantize_dynamic(str(folded), str(found[DYNAMIC]), weight_type=QuantType.QInt8)
    if not any(node.op_type == "MatMulInteger" for node in onnx.load(found[DYNAMIC]).graph.node):
        raise SystemExit("quantize_dynamic has quantized nothing")
    return {name: found[name] for name in (FLOAT, DYNAMIC, INTEGER)}


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(paths: dict[str, Path], ids: torch.Tensor, threads: int, rounds: int) -> list[Row]:
    """Times of each round, by file."""
    clock = time.process_time if threads == 1 else time.perf_counter
    sessions = {name: session(path, threads) for name, path in paths.items()}
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds + 3):
        for name, runtime in sessions.items():
            started = clock()
            runtime.run(["logits"], {"input_ids": ids.numpy()})
            if number >= 3:  # the first ones warm up
                seconds[name].append(clock() - started)
    return [row(name, seconds, ids.numel(), paths[name], grown(paths[name], ids, threads)) for name in paths]


def row(name: str, seconds: dict[str, list[float]], tokens: int, path: Path, memory: int) -> Row:
    ratios = [a / b for a, b in zip(seconds[FLOAT], seconds[name], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "file": name, "milliseconds": 1e3 * statistics.median(seconds[name]), "least_milliseconds": 1e3 * min(seconds[name]),
        "tokens_per_second": tokens / statistics.median(seconds[name]), "speed_against_float32": statistics.median(ratios),
        "speed_quartiles": [low, high], "file_bytes": path.stat().st_size, "memory_bytes": memory,
    }  # fmt: skip


def grown(path: Path, ids: torch.Tensor, threads: int) -> int:
    """Bytes by which the largest resident set of a process of its own grows."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as given:
        json.dump(ids.tolist(), given)
        given.flush()
        command = [sys.executable, __file__, str(path), str(path), "--grown", given.name, "--threads", str(threads)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak() -> int:
    """Bytes of the largest resident set so far; Linux's own record, because ``getrusage`` counts the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_grown(path: Path, ids: Path, threads: int) -> None:
    tokens, before = torch.tensor(json.loads(ids.read_text())).numpy(), peak()
    session(path, threads).run(["logits"], {"input_ids": tokens})
    print(peak() - before)


def markdown(rows: list[Row]) -> str:
    lines = ["| file | one window [ms], median (least) | tokens/s | speed : float32 | file | memory |", "| --- " * 6 + "|"]
    for r in rows:
        low, high = r["speed_quartiles"]
        cells = [r["file"], f"{r['milliseconds']:.1f} ({r['least_milliseconds']:.1f})", f"{r['tokens_per_second']:,.0f}"]
        cells += [f"{r['speed_against_float32']:.2f} ({low:.2f} ... {high:.2f})", f"{r['file_bytes'] / 1e6:.1f} MB"]
        lines.append(f"| {' | '.join(cells)} | {r['memory_bytes'] / 1e6:.0f} MB |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a model folder, or the ONNX file that ntc has made of one")
    parser.add_argument("compiled", type=Path, help="a folder of ntc compile --quantize")
    parser.add_argument("--data", type=Path, help="text; default: random tokens")
    parser.add_argument("--tokens", type=int, default=256, help="of the window")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--grown", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grown:
        print_grown(options.compiled, options.grown, options.threads)
        return 0
    with tempfile.TemporaryDirectory() as work:
        paths = files(options.network, options.compiled, Path(work))
        vocabulary = ntc.load(options.compiled).info.vocab_size
        if options.data:
            tokenizer = load_tokenizer(options.compiled / "tokenizer")
            ids = tokens_from(options.data, tokenizer, options.tokens, options.tokens, vocabulary).windows[:1]
        else:
            ids = random_tokens(vocabulary, options.tokens, options.tokens).windows[:1]
        rows = measure(paths, ids, options.threads, options.rounds)
    setup = {
        "tokens": ids.numel(), "rounds": options.rounds, "threads": options.threads, "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(), "load": [round(x, 1) for x in os.getloadavg()],
    }  # fmt: skip
    print(json.dumps({**setup, "rows": rows}, indent=1) if options.json else f"{markdown(rows)}\n\n{setup}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
