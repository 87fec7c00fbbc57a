"""The netlist simulator against snnTorch 1.0 on a feed-forward block of the reference GPT-2, and its memory against the weights.

    pip install -e ".[dev]"                                      # with snntorch
    OMP_NUM_THREADS=1 python benchmarks/simulator.py             # one thread for both

Same weights, thresholds, T, input and machine, in one process, runs taking turns. snnTorch runs step by step, as its users write it:
``linear``, ``Leaky(beta=1, reset_mechanism="subtract")``, ``linear`` at each of the T steps, all tokens as one batch. That neuron fires for
``u > theta`` and the netlist's for ``u >= theta``, which no float cares about; the spikes of both are compared. *hoisted* is snnTorch
with the first linear layer, whose input is the same at all steps, taken out of the loop by hand. Times are processor seconds, the least of
several runs, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ntc_backends.simulator.engine import Simulator
from ntc_backends.simulator.inputs import ids_from_text
from ntc_backends.simulator.piece import Counter, Piece

ROOT = Path(__file__).parents[1]


def compiled(model: Path, folder: Path, steps: int) -> Path:
    """In a process of its own, so that its memory and caches are not part of the figures."""
    command = [sys.executable, "-m", "ntc", "compile", model, "-o", folder / "out", "--steps", str(steps), "--emit", "netlist", "--json"]
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
    return folder / "out"


class Block:
    """One feed-forward block of a netlist: projection, population, projection and decode."""

    def __init__(self, simulator: Simulator, number: int) -> None:
        populations = [p for p in simulator.netlist.populations if p.role == "ffn"]
        self.population = populations[number]
        fc = self.population.inputs.current.partition(":")[0]
        proj = next(p for p in simulator.netlist.projections if p.inputs.pre == f"{self.population.name}:spikes")
        self.decode = next(d for d in simulator.netlist.decodes if d.inputs.train == f"{proj.name}:current")
        self.fc, self.act, self.proj = (simulator._runners[name] for name in (fc, self.population.name, proj.name))
        self.weights = {name: simulator.constants.tensor(name) for p in (self.fc, self.proj) for name in (p.element.weight, p.element.bias)}
        self.spikes = np.zeros(0)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        piece = Piece(x.shape[0], 0, x.shape[1], False, {}, Counter())
        self.spikes = self.act(piece, self.fc(piece, x))
        return self.proj.decoded(piece, self.spikes, self.decode.step_weights)


def recorded_input(simulator: Simulator, block: Block, ids: np.ndarray) -> np.ndarray:
    """What reaches the block when the whole netlist runs on a text."""
    seen: list[np.ndarray] = []
    name = block.fc.element.name
    simulator._runners[name] = lambda piece, pre: (seen.append(pre), block.fc(piece, pre))[1]
    try:
        simulator.run(ids)
    finally:
        simulator._runners[name] = block.fc
    return seen[0]


class SnnTorch(torch.nn.Module):
    """The block in snnTorch."""

    def __init__(self, block: Block, hoisted: bool) -> None:
        import snntorch

        super().__init__()
        self.fc, self.proj = (self._linear(p, block) for p in (block.fc, block.proj))
        theta = torch.from_numpy(block.act.threshold.copy())
        self.start = torch.from_numpy(np.ascontiguousarray(block.act.start))
        self.neuron = snntorch.Leaky(beta=1.0, threshold=theta, reset_mechanism="subtract")
        self.steps, self.hoisted = block.population.steps, hoisted
        self.spikes: list[torch.Tensor] = []

    @staticmethod
    def _linear(projection: Any, block: Block) -> torch.nn.Linear:
        weight = torch.from_numpy(np.array(block.weights[projection.element.weight]))
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data = weight
        layer.bias.data = torch.from_numpy(np.array(block.weights[projection.element.bias]))
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        current = self.fc(x)
        membrane = self.start.expand_as(current)
        total, self.spikes = torch.zeros_like(x), []
        for _ in range(self.steps):
            spikes, membrane = self.neuron(current if self.hoisted else self.fc(x), membrane)
            self.spikes.append(spikes)
            total = total + self.proj(spikes)
        return total / self.steps


def seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least processor time of each, taking turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    return best


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most memory that was held at once by what ``run`` made."""
    tracemalloc.start()
    run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "gpt2-books")
    parser.add_argument("--netlist", type=Path, help="a folder with a netlist, instead of compiling the model")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "data" / "books-sample.txt")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: the model)")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        source = args.netlist or compiled(args.model, Path(folder), args.steps)
        ids = ids_from_text(args.data, args.tokenizer or args.model, args.tokens)
        print(json.dumps(measured(source, ids, args.block, args.repeats), indent=1))


def measured(source: Path, ids: np.ndarray, number: int, repeats: int) -> dict[str, Any]:
    whole = peak_bytes(lambda: Simulator(source).run(ids))
    simulator = Simulator(source)
    block = Block(simulator, number)
    x = recorded_input(simulator, block, ids)
    theirs = {"snntorch": SnnTorch(block, False), "snntorch hoisted": SnnTorch(block, True)}
    given = torch.from_numpy(np.array(x[0]))
    ours, expected = block(x)[0], theirs["snntorch"](given).numpy()
    spikes = block.spikes[:, 0]
    fired = torch.stack(theirs["snntorch"].spikes).numpy()
    runs: dict[str, Callable[[], Any]] = {"simulator": lambda: block(x)}
    runs |= {name: lambda net=net: net(given) for name, net in theirs.items()}
    best = seconds(runs, repeats)
    one, row = x[:, :1], given[:1]
    single = seconds({"simulator": lambda: block(one)} | {name: lambda net=net: net(row) for name, net in theirs.items()}, repeats)
    fresh = Simulator(source)  # has read no weights yet

    def once() -> None:
        b = Block.__new__(Block)
        b.__dict__ |= {k: v for k, v in block.__dict__.items() if k not in ("weights", "fc", "proj", "act")}
        b.fc, b.act, b.proj = (fresh._runners[p.element.name] for p in (block.fc, block.act, block.proj))
        b(x)

    weights = sum(w.nbytes for w in block.weights.values())
    block_peak, tokens, file = peak_bytes(once), len(ids), simulator.netlist.blob.bytes
    return {
        "block": block.population.name, "tokens": tokens, "steps": block.population.steps, "snntorch": __import__("snntorch").__version__,
        "weights_shape": [list(p.element.shape) for p in (block.fc, block.proj)],
        "firing_rate": round(float((spikes != 0).mean()), 4),
        "spikes_that_differ": int((spikes != fired).sum()), "spikes": int((fired != 0).sum()),
        "largest_difference": float(np.abs(ours - expected).max()),
        "tokens_per_second": {name: round(tokens / s) for name, s in best.items()},
        "ratio": {name: round(best[name] / best["simulator"], 2) for name in theirs},
        "ratio_one_token": {name: round(single[name] / single["simulator"], 2) for name in theirs},
        "memory_of_the_block": {"weights": weights, "peak": block_peak, "ratio": round(block_peak / weights, 2)},
        "memory_of_the_netlist": {"file": file, "peak": whole, "ratio": round(whole / file, 2)},
    }  # fmt: skip


if __name__ == "__main__":
    main()
