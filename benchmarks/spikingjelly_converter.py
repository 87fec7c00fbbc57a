"""SpikingJelly 2.0.0's Qwen2 converter and ntc's `lossless`, on one network, the same tokens and the same machine.

    pip install --no-deps spikingjelly==2.0.0 "loguru<1" requests tqdm       # for this benchmark alone
    python benchmarks/spikingjelly_converter.py SmolLM2-135M.gguf --data wikitext2-test.txt --calibration wikitext2-valid.txt \\
        --output spikingjelly.jsonl --page docs/comparison.md

Its converter takes Qwen2 only. A network of LLaMA type is a Qwen2 whose biases of queries, keys and values are zero, so that is what it is
given: the same weights, and the same logits, which is checked. Both sides are calibrated on the same tokens.

Its network computes with differences in time: spikes of embeddings, queries, keys, values and the hidden layer of each FFN, all else in
float at each of T steps. Only what the steps add up to reaches the logits, and its own mode ``qcfs_sg`` computes those sums: perplexity is
measured in it. The spikes themselves (``signed_if``) run on the first tokens of the text, --passes / T of them: events, operations and CPU
time are from there, and the losses in both modes on these tokens stand beside each other. CPU time is a ratio to the original on the same
tokens within one run. Each row is a line of --output, and a second run measures only what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ntc.bootstrap import bootstrap_means, percentile_interval
from ntc.compiler import compile_model
from ntc.energy import measure_energy
from ntc.errors import ConfigError, NtcError
from ntc.loading import load_model, load_tokenizer
from ntc.ops.digit_neuron import digit_neuron, digit_thresholds, digit_weights
from ntc.ops.encode import token_step
from ntc.ops.hadamard import hadamard, hadamard_core
from ntc.recipe import Settings
from ntc.text import Tokens, calibration_from, tokens_from

INSTALL = 'pip install --no-deps spikingjelly==2.0.0 "loguru<1" requests tqdm'
MARK = "spikingjelly"

_CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
)  # fmt: skip

Coded = tuple[Tensor, Tensor, Tensor]
"""What a code tells of a value, in the basis of the value or of its transform; weights in that basis; events of each value."""


@dataclass(frozen=True)
class Setting:
    """Settings of its converter: T, which is also the largest count, and the whole numbers up to a quantile of each channel."""

    steps: int
    levels: int
    quantile: float

    @classmethod
    def read(cls, text: str) -> Setting:
        try:
            steps, levels, quantile = text.split("/")
            return cls(int(steps), int(levels), float(quantile))
        except ValueError as error:
            raise ConfigError(f"a setting is T/levels/quantile, such as 160/16/0.999, got {text!r}") from error

    @property
    def label(self) -> str:
        return f"SpikingJelly, {self.levels} levels, quantile {self.quantile:g}"


# ------------------------------------------------------------------------------------------------ both networks


def spikingjelly() -> tuple[Any, Any]:
    """Its converter, and its functions for whole networks.

    Raises:
        ConfigError: If it, or a package that it needs, is not installed.
    """
    try:
        from spikingjelly.activation_based import ann2snn  # type: ignore[import-not-found]
        from spikingjelly.activation_based import functional as resetting
    except ImportError as error:
        raise ConfigError(f"SpikingJelly 2.0.0, which this benchmark compares with, cannot be imported ({error}): {INSTALL}") from error
    return ann2snn, resetting


def as_qwen2(model: Any) -> Any:
    """The same network as a ``Qwen2ForCausalLM``: a LLaMA's weights, and zeros for the biases that a LLaMA does not have.

    Raises:
        ConfigError: If it is no such network.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = model.config
    if config.model_type == "qwen2":
        return model
    if config.model_type != "llama" or config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        raise ConfigError(f"SpikingJelly's converter takes Qwen2, and {config.model_type} is none under another name: give a LLaMA")
    made = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(config, name) for name in _CARRIED}, use_sliding_window=False)).eval()
    weights = model.state_dict()
    biases = {name: torch.zeros_like(t) for name, t in made.state_dict().items() if name not in weights and name.endswith("_proj.bias")}
    made.load_state_dict({**weights, **biases})
    return made


def logits_of(network: Any) -> Callable[[Tensor], Tensor]:
    """A network of transformers as a function of token ids."""
    return lambda ids: network(ids, use_cache=False).logits


class Converted:
    """Its spiking network of a Qwen2, as functions of token ids."""

    def __init__(self, original: Any, setting: Setting, calibration: Tokens) -> None:
        ann2snn, self._resetting = spikingjelly()
        config = ann2snn.Qwen2SNNConfig(setting.steps, setting.levels, setting.quantile)
        batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration.batches(2)]
        scales = ann2snn.calibrate_qwen2_snn(original, batches, config)
        self.network = ann2snn.ModuleConverter(recipe=ann2snn.Qwen2SNNRecipe(scales, config)).convert(original)
        self.steps = setting.steps

    def _run(self, ids: Tensor, mode: str, steps: int) -> Tensor:
        for part in (self.network, *self.network.layers):
            part.time_steps = steps  # of its sequences; the neurons have their own
        self._resetting.reset_net(self.network)  # its operators remember the last window
        return self.network(ids, encoding_mode=mode).logits  # type: ignore[no-any-return]

    def sums(self, ids: Tensor) -> Tensor:
        """Logits of what the steps add up to, in one step: ``qcfs_sg`` has zeros in all others."""
        return self._run(ids, "qcfs_sg", 1)

    def spikes(self, ids: Tensor, statistics: bool = False) -> Tensor:
        """Logits of the spikes themselves."""
        self.network.set_collect_statistics(statistics)
        return self._run(ids, "signed_if", self.steps)

    def hidden(self, x: Tensor, weight: Tensor) -> Coded:
        """What the encoder of the middle block's FFN tells of its values."""
        encoder = self.network.layers[len(self.network.layers) // 2].encoders["mlp"]
        told = encoder.reconstruct(x)
        return told, weight, (told / encoder.positive_neuron.v_threshold).round().abs()

    def operations(self, ids: Tensor) -> dict[str, float]:
        """Events and operations of one run of the spikes, per coded value and per multiplication of the original.

        A linear layer is counted as the product of each step's part with the weights, zeros skipped. Attention computes softmax anew
        on the running sums at each step: T times its products.
        """
        counted, dense = {"spiking": 0.0, "real": 0.0}, {"spiking": 0.0, "real": 0.0}

        def linear(module: Any, arguments: tuple[Tensor, ...]) -> None:
            kind = "spiking" if any(module is layer.down_proj for layer in self.network.layers) else "real"  # the one behind an encoder
            counted[kind] += float(arguments[0].count_nonzero()) * module.out_features
            dense[kind] += arguments[0][0].numel() * module.out_features

        def product(_: Any, arguments: tuple[Tensor, ...]) -> None:
            query = arguments[0][0]
            macs = float(query.numel() * (query.shape[-2] + 1))  # Q K and P V, with the keys that a query sees
            counted["real"] += macs * self.steps
            dense["spiking"] += macs

        hooks = {"TDLinear": linear, "TDScaledDotProductAttention": product}
        watched = [m for m in self.network.layers.modules() if type(m).__name__ in hooks]
        handles = [m.register_forward_pre_hook(hooks[type(m).__name__]) for m in watched]
        self.spikes(ids, statistics=True)
        for handle in handles:
            handle.remove()
        head = float(ids.numel() * self.network.lm_head.weight.numel())  # once, on the sum
        all_dense = sum(dense.values()) + head
        found = self.network.encoder_statistics()
        events = sum(e["positive_spike_count"] + e["negative_spike_count"] for e in found)
        values = sum(e["spike_value_count"] for e in found) / self.steps
        return {
            "events_per_value": events / values, "coded_values_per_token": values / ids.numel(),
            "real_macs_per_mac": (counted["real"] + head) / all_dense, "acs_per_mac": counted["spiking"] / all_dense,
            "analog_share": (dense["real"] + head) / all_dense,
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------ measuring


def losses(run: Callable[[Tensor], Tensor], tokens: Tokens) -> Tensor:
    """Mean next-token cross entropy of each window."""
    with torch.no_grad():
        return torch.stack([cross_entropy(run(ids), ids) for ids in tokens.batches(1)])


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).double()


def timed(run: Callable[[Tensor], Tensor], ids: Tensor, times: int = 1) -> tuple[Tensor, float]:
    """Logits, and the CPU seconds of a run: the least of so many."""
    spent = []
    for _ in range(times):
        started = time.process_time()
        with torch.no_grad():
            logits = run(ids)
        spent.append(time.process_time() - started)
    return logits, min(spent)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|``, the mean of each token taken away: logits are known up to a constant."""
    centred = [x.double() - x.double().mean(-1, keepdim=True) for x in (found, wanted)]
    return float((centred[0] - centred[1]).norm() / centred[1].norm())


def quality(run: Callable[[Tensor], Tensor], tokens: Tokens, original: Tensor, network: Any) -> dict[str, Any]:
    """Perplexity beside the original's, and the error of the logits of the first window."""
    ours = losses(run, tokens)
    change = bootstrap_means(torch.stack([ours, original], 1)) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    with torch.no_grad():
        error = relative_error(*(one(tokens.windows[:1]) for one in (run, logits_of(network))))
    return {
        "perplexity": math.exp(float(ours.mean())), "perplexity_ann": math.exp(float(original.mean())), "logit_error": error,
        "change": math.exp(float(ours.mean() - original.mean())) - 1, "change_interval": list(percentile_interval(change.exp() - 1)),
        "data": tokens.description,
    }  # fmt: skip


def their_row(network: Any, setting: Setting, calibration: Tokens, tokens: Tokens, original: Tensor, passes: int) -> dict[str, Any]:
    run = logits_of(network)
    converted = Converted(network, setting, calibration)
    some = tokens.windows[:1, : max(8, passes // setting.steps)]
    with torch.no_grad():
        found = quality(converted.sums, tokens, original, network)
        counts = converted.operations(some)
        sums = converted.sums(some)
    (spikes, theirs), (exact, dense) = timed(converted.spikes, some), timed(run, some, 3)
    lost = {name: float(cross_entropy(x, some)) for name, x in (("original", exact), ("sums", sums), ("spikes", spikes))}
    return {
        "key": f"{setting.label}, T = {setting.steps}", "label": setting.label, "steps": setting.steps, **found, **counts,
        "spike_tokens": int(some.numel()), "losses": lost, "cpu_ratio": theirs / dense,
        "layer": one_layer(network, tokens, converted.hidden),
    }  # fmt: skip


def our_row(network: Any, steps: int, calibration: Tokens, tokens: Tokens, original: Tensor, tokenizer: Any) -> dict[str, Any]:
    settings = Settings(options={"steps": steps})
    made = compile_model(network, recipe="lossless", settings=settings, calibration=calibration_from(calibration), tokenizer=tokenizer)
    found = quality(made.program, tokens, original, network)
    first = Tokens(tokens.windows[:1], tokens.description, tokens.sha256)
    report = measure_energy(made.program, made.analog, first, batch=1)
    snn, ann = report.snn.total(), report.ann.total()
    return {
        "key": f"ntc, lossless, T = {steps}", "label": "ntc, lossless", "steps": steps, **found,
        "events_per_value": snn.spikes / snn.neurons, "coded_values_per_token": snn.neurons,
        "real_macs_per_mac": snn.macs / ann.macs, "acs_per_mac": snn.acs / ann.macs, "analog_share": snn.macs / ann.macs,
        "cpu_ratio": timed(made.program, first.windows)[1] / timed(logits_of(network), first.windows, 3)[1],
        "layer": one_layer(network, tokens, lambda x, weight: digits(x, weight, steps)),
    }  # fmt: skip


def one_layer(network: Any, tokens: Tokens, code: Callable[[Tensor, Tensor], Coded]) -> dict[str, float]:
    """Error of the results of the middle block's last FFN layer, and events per value, where a code stands in front of it."""
    layer = network.model.layers[len(network.model.layers) // 2].mlp.down_proj
    held: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: held.append(arguments[0]))
    with torch.no_grad():
        network(tokens.windows[:1], use_cache=False)
        handle.remove()
        told, weight, events = code(held[0], layer.weight)
        wanted = functional.linear(held[0], layer.weight)
        error = (functional.linear(told, weight) - wanted).norm() / wanted.norm()
    return {"error": float(error), "events_per_value": float(events.mean())}


def digits(x: Tensor, weight: Tensor, steps: int) -> Coded:
    """Ternary digits with the step of each token, behind a Hadamard transform: what `lossless` has there."""
    core = hadamard_core(x.shape[-1])
    if core is None:
        raise ConfigError(f"no Hadamard matrix of the FFN's width {x.shape[-1]} is known, which lossless needs: give another network")
    turned, turned_weight = (hadamard(m, *core) / math.sqrt(x.shape[-1]) for m in (x, weight))
    place = torch.tensor(digit_weights(3.0, steps))
    step = token_step(turned, 1 / float(place.sum()))
    spikes = digit_neuron(turned, step, place, torch.tensor(digit_thresholds(place.tolist())), True)
    return torch.tensordot(place, spikes, dims=1) * step, turned_weight, spikes.abs().sum(0)


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Whole networks, as Markdown."""

    def cells() -> Iterator[Sequence[str]]:
        for d in lines:
            low, high = (f"{100 * end:+,.2f}" for end in d["change_interval"])
            yield (
                d["label"], str(d["steps"]), f"{d['perplexity']:,.2f}", f"{100 * d['change']:+,.2f} %", f"{low} ... {high}",
                f"{d['logit_error']:.4f}", f"{d['events_per_value']:.2f}", f"{d['real_macs_per_mac']:,.2f}", f"{d['acs_per_mac']:.2f}",
                f"{100 * d['analog_share']:.1f} %", f"{d['cpu_ratio']:,.1f}",
            )  # fmt: skip

    return _markdown(
        ("converter", "T", "perplexity", "change", "95 %", "error of logits", "events per value", "real MACs per MAC", "ACs per MAC",
         "analog MACs", "CPU time : original"),
        cells(),
    )  # fmt: skip


def section(lines: Sequence[dict[str, Any]]) -> str:
    """Both tables with what they were measured on."""
    texts = sorted({d["data"] for d in lines})
    if len(texts) != 1:
        raise ConfigError(f"the tables have one text, and these lines have {len(texts)}: {'; '.join(texts) or 'no line at all'}")
    theirs = [d for d in lines if "losses" in d]
    modes = (f"T = {d['steps']}, {d['spike_tokens']} tokens: {', '.join(f'{loss:.3f}' for loss in d['losses'].values())}" for d in theirs)
    return "\n\n".join([
        f"{texts[0]}; the original has a perplexity of {lines[0]['perplexity_ann']:.2f}.",
        table(lines),
        f"Mean loss [nats] of the original, of the sums and of the spikes, on the tokens that the spikes ran on: {'; '.join(modes)}.",
        "One layer, the last of the middle block's FFN, on the original's activations:",
        _markdown(
            ("in front of it", "T", "error of its results", "events per value"),
            ([d["label"], str(d["steps"]), f"{d['layer']['error']:.5f}", f"{d['layer']['events_per_value']:.2f}"] for d in lines),
        ),
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------ the command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a LLaMA or a Qwen2: a folder, a GGUF file or a hub id")
    parser.add_argument("--data", type=Path, required=True, help="text to measure on")
    parser.add_argument("--calibration", type=Path, required=True, help="text that both sides are calibrated on")
    for name, default in (("window", 256), ("windows", 16), ("calibration-tokens", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--settings", default="8/8/1,32/16/1,160/16/0.999,512/128/1", help="T/levels/quantile of its converter")
    parser.add_argument("--steps", default="4,5,8", help="T of lossless")
    parser.add_argument("--passes", type=int, default=8192, help="tokens times T that the spikes themselves run on")
    parser.add_argument("--stored", action="store_true", help="measure nothing: the lines that --output has")
    parser.add_argument("--output", type=Path, default=Path("spikingjelly.jsonl"))
    parser.add_argument("--page", type=Path, help=f"put the tables between this page's marks <!-- begin {MARK} --> and <!-- end {MARK} -->")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    done = {d["key"]: d for d in map(json.loads, args.output.read_text().splitlines())} if args.output.exists() else {}
    if not args.stored:
        measure_missing(args, done)
    if args.page:  # theirs first
        write_between(args.page, section(sorted(done.values(), key=lambda d: ("losses" not in d, d["steps"]))))


def measure_missing(args: argparse.Namespace, done: dict[str, dict[str, Any]]) -> None:
    """Measure the rows that have no line, and append theirs."""
    spikingjelly()
    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    network = as_qwen2(model)
    tokens = tokens_from(args.data, tokenizer, args.window, args.window * args.windows)
    calibration = tokens_from(args.calibration, tokenizer, args.window, args.calibration_tokens)
    with torch.no_grad():
        apart = relative_error(*(logits_of(one)(tokens.windows[:1]) for one in (network, model)))
    if apart > 1e-5:
        raise ConfigError(f"as a Qwen2 the network computes something else (logits {apart:.1e} apart): give one without scaled positions")
    original = losses(logits_of(network), tokens)
    print(f"original: {math.exp(float(original.mean())):.4f} on {tokens.description}", flush=True)
    settings = map(Setting.read, args.settings.split(","))
    rows = {f"{s.label}, T = {s.steps}": partial(their_row, network, s, calibration, tokens, original, args.passes) for s in settings}
    for t in map(int, args.steps.split(",")):
        rows[f"ntc, lossless, T = {t}"] = partial(our_row, model, t, calibration, tokens, original, tokenizer)
    for key in (k for k in rows if k not in done):
        done[key] = rows[key]()
        with args.output.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(done[key]) + "\n")
        print(table([done[key]]).splitlines()[-1], flush=True)


def write_between(page: Path, text: str) -> None:
    begin, end = f"<!-- begin {MARK} -->", f"<!-- end {MARK} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{page} has no marks {begin} and {end}: put them where these tables belong")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(_arguments())
    except NtcError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
