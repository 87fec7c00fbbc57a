"""A recipe's program against its own quantiser in closed form: the same network with rounded operands, and no neuron anywhere.

    python benchmarks/quantiser_oracle.py examples/gpt2-books --data books-valid.txt --max-tokens 1024 --recipe sdllm las

Prints a Markdown table (docs/recipes.md holds runs of it). The oracle runs the network that the recipe starts to code, and rounds

- what a linear layer reads, ``x`` to ``d min(floor(|x| / d + 1/2), N) sign(x)``: ``sdllm`` per token, ``d = max |x| / N`` and N = T;
  ``las`` with the steps that were calibrated, one for values below the split and one for those above, N = 2^T - 1;
- for ``las`` also queries, keys and values in the same way, and the numerators of the softmax, ``e_ij = exp(S_ij - max_j S_ij)``, to
  ``P_ij = floor(N e_ij + 1/2)``; the row's loss, ``r_i = sum_j (N e_ij - P_ij) / i``, goes to all of its keys evenly:
  ``y_i = (sum_j P_ij V_j + r_i sum_j V_j) / (N sum_j e_ij)``.

It is written in plain torch. Of the program it reads steps and splits, which are numbers from calibration text, and nothing else.
Both run in float64: in float32 a sum in another order moves a value over the middle between two steps now and then, and what that
does to all that comes behind it would be compared, and not the two quantisers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ntc.compiler import Compilation, compile_model, default_calibration
from ntc.errors import NtcError
from ntc.frontend import capture
from ntc.loading import load_tokenizer
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.registry import find_pass
from ntc.text import calibration_from, tokens_from

RECIPES = ("sdllm", "las")
HEAD = "| recipe | T | network | oracle | program | program against oracle | KL [nats] | of the network |\n" + "| --- " * 8 + "|"

Logits = Callable[[Tensor], Tensor]


def rounded(x: Tensor, step: Tensor, most: float) -> Tensor:
    """The nearest multiple of the step, of at most so many steps; halves go away from zero."""
    return (x.abs() / step + 0.5).floor().clamp(max=most) * step * x.sign()


def sdllm(made: Compilation) -> Logits:
    """Logits of the rotated network whose linear layers read whole numbers of steps, a step per token."""
    steps = made.program.steps
    options = {record.name: dict(record.options) for record in made.program.history}
    passes = [find_pass(name).configure(options[name]) for name in ("fold-norms", "rotate")]
    network = run_pipeline(made.analog, passes)

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> Tensor | None:
        if node.target is not torch.ops.aten.linear.default:
            return None
        x = args[0]
        return functional.linear(rounded(x, x.abs().amax(-1, keepdim=True).clamp(min=1e-20) / steps, steps), *args[1:])

    return lambda ids: interpret(network, ids, visit)


def las(made: Compilation) -> Logits:
    """Logits of the network whose linear layers and attention products read whole numbers of calibrated steps."""
    most = 2.0**made.program.steps - 1

    def step_of(neuron: str) -> Tensor:
        return made.program.tensor(str(made.program.find(neuron).args[1].target)).detach()  # type: ignore[union-attr]

    def read(name: str, x: Tensor) -> Tensor:
        split = made.program.find(f"{name}_spikes").args[6]
        return torch.where(
            x.abs() < split, rounded(x, step_of(f"{name}_spikes"), most), rounded(x, step_of(f"{name}_outlier_spikes"), most)
        )

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> Tensor | None:
        if node.target is torch.ops.aten.linear.default:
            assert isinstance(node.args[0], Node)
            return functional.linear(read(node.args[0].name, args[0]), *args[1:])
        if node.target is torch.ops.ntc.attention.default:
            operands = [rounded(x, step_of(f"{node.name}_{role}_spikes"), most) for x, role in zip(args[:3], "qkv", strict=True)]
            return attention(*operands, *args[3:6], most)
        return None

    return lambda ids: interpret(made.analog, ids, visit)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, scale: float, most: float) -> Tensor:
    """Causal softmax attention of ``[B, L, H D]`` with rounded numerators (see the module's docstring)."""
    q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((query, heads), (key, kv_heads), (value, kv_heads)))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    length = q.shape[2]
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    e = (scores - scores.amax(-1, keepdim=True)).exp() * most
    p = (e + 0.5).floor()
    lost = (e - p).sum(-1, keepdim=True) / torch.arange(1, length + 1).unsqueeze(-1)
    y = (p @ v + lost * v.cumsum(2)) / e.sum(-1, keepdim=True)
    return y.transpose(1, 2).flatten(2)


def in_double(program: Program) -> Program:
    """The same program in float64."""
    tensors = {name: t.detach().double() if t.is_floating_point() else t for name, t in program.tensors.items()}
    return program.with_graph(program.copy().graph, tensors)


def oracle_of(made: Compilation) -> Logits:
    """The oracle of a compiled program."""
    return {"sdllm": sdllm, "las": las}[made.recipe.name](made)


def compared(made: Compilation, windows: Tensor) -> dict[str, float]:
    """Perplexities of the network, the oracle and the program on the same windows.

    Returns:
        The three by name; ``kl`` and ``kl_network``: divergence from the oracle to the program, and to the network [nats].
    """
    made = replace(made, program=in_double(made.program), analog=in_double(made.analog))
    oracle = oracle_of(made)
    losses, divergences = {"network": 0.0, "oracle": 0.0, "program": 0.0}, {"kl": 0.0, "kl_network": 0.0}
    with torch.no_grad():
        for ids in windows.split(1):
            logits = {"network": made.analog(ids), "oracle": oracle(ids), "program": made.program(ids)}
            for name, z in logits.items():
                losses[name] += float(functional.cross_entropy(z[0, :-1].double(), ids[0, 1:])) / len(windows)
            a, b, c = (logits[name][0].double().log_softmax(-1) for name in ("oracle", "program", "network"))
            for key, other in (("kl", b), ("kl_network", c)):
                divergences[key] += float((a.exp() * (a - other)).sum(-1).mean()) / len(windows)
    return {**{name: math.exp(loss) for name, loss in losses.items()}, **divergences}


def line(made: Compilation, found: dict[str, float]) -> str:
    """One row of the table."""
    apart = f"{100 * (found['program'] / found['oracle'] - 1):+.4f} %"
    perplexities = " | ".join(f"{found[name]:.3f}" for name in ("network", "oracle", "program"))
    return f"| `{made.recipe.name}` | {made.program.steps} | {perplexities} | {apart} | {found['kl']:.1e} | {found['kl_network']:.1e} |"


def main() -> None:
    """Compile, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a Hugging Face model")
    parser.add_argument("--data", type=Path, required=True, help="text to measure on")
    parser.add_argument("--calibration", type=Path, help="text for ranges (default: the model's calibration.txt)")
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=1024)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    text = args.calibration or default_calibration(args.model)
    if text is None:
        raise SystemExit("error: there is no calibration.txt beside the model: give --calibration FILE")
    try:
        network = capture(args.model)
        tokens = tokens_from(args.data, tokenizer, args.window, args.max_tokens, network.info.vocab_size)
        given = calibration_from(tokens_from(text, tokenizer, args.window, 4096, network.info.vocab_size))
        print(HEAD, flush=True)
        for name in args.recipe:
            made = compile_model(network, recipe=name, calibration=given)
            found = compared(made, tokens.windows)
            print(line(made, found), flush=True)
    except NtcError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
