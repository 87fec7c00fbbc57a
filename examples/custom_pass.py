r"""A pass of your own, from the first line to the test: one threshold per population, as chips with one per core need.

    python examples/custom_pass.py             # what it does to quality and spikes, about a minute
    python -m pytest examples/custom_pass.py   # its tests

``fold-thresholds`` makes every threshold 1 that stands behind a linear layer, exactly. What it cannot fold is the output
neuron of spiking attention (``output = "spikes"``): a dynamic product has no stored weight. Such a population keeps one
threshold per channel.

Before::

    %r = ntc.if_rate(%x, threshold, True)         # threshold [C]
    %y = mul(%r, gain)                            # gain [C]

After::

    %r = ntc.if_rate(%x, shared, True)            # shared [1]
    %y = mul(%r, gain shared / threshold)

The result is the same for every ``|x| <= min(shared, threshold)``; above, the value clips elsewhere. Refused, with the
reason: neurons behind a linear layer, and neurons whose rate goes anywhere else than into one gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

import ntc
from ntc.loading import load_tokenizer
from ntc.meta import NEURON, building
from ntc.ops import aten
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program
from ntc.recipe import Recipe, Settings, Step
from ntc.registry import find_pass, recipe
from ntc.testing import check_pass, example_ids, tiny_gpt2
from ntc.text import calibration_from, tokens_from

HERE = Path(__file__).parent


# --- the pass


@dataclass(frozen=True)
class Options:
    """Options of ``share-thresholds``.

    Attributes:
        shared_threshold: ``mean`` of the thresholds of a population, or their ``max``: nothing clips that did not clip
            before, and there are fewer spikes.
    """

    shared_threshold: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if self.shared_threshold not in ("mean", "max"):
            raise ValueError(f"shared_threshold must be 'mean' or 'max', got {self.shared_threshold!r}")


class ShareThresholds(Pass):
    """Give every population one threshold where folding cannot."""

    name = "share-thresholds"
    requires = frozenset({"neurons-annotated"})
    required = True  # who asks for it by name wants to know that there was nothing to share
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Share what can be shared; say why the rest is left alone."""
        sites, missed, spread = 0, [], {}
        for node in list(program.graph.nodes):
            if node.target is not torch.ops.ntc.if_rate.default:
                continue
            theta = program.tensor(node.args[1]).detach()
            if bool((theta == theta[0]).all()):
                continue  # one threshold already: nothing looks wrong, so this is no miss
            if reason := _refusal(node):
                missed.append((node.name, reason))
                continue
            spread[node.name] = float(theta.max() / theta.min())
            _share(program, node, theta, self.at(node, context))
            sites += 1
        return PassResult(sites > 0, sites, tuple(missed), notes={"largest_over_smallest": spread} if sites else {})


def _refusal(node: Node) -> str:
    """Why the thresholds of a rate cannot be shared, or an empty string."""
    if node.args[0].target is aten.linear.default:
        return "its current comes from a linear layer: fold-thresholds makes its thresholds 1, and that is exact"
    gains = [u for u in node.users if u.target is aten.mul.Tensor and isinstance(u.args[1], Node) and u.args[1].op == "get_attr"]
    if len(gains) != 1 or len(node.users) != 1:
        return "its rate does not go into one gain, which alone could make up for another threshold; run before fold-thresholds"
    return ""


def _share(program: Program, node: Node, theta: Tensor, options: Options) -> None:
    """Rewrite one rate and the gain behind it."""
    (scaled,) = node.users
    shared = (theta.mean() if options.shared_threshold == "mean" else theta.max()).reshape(1)
    gain = program.tensor(scaled.args[1]).detach() * shared / theta
    with building(program.graph, before=scaled, stands_for=[node, scaled], by=ShareThresholds.name) as call:
        threshold = call(program.add_tensor(str(node.args[1].target), shared))
        rate = call(node.target, node.args[0], threshold, node.args[2], name=node.name)
        rate.meta[NEURON] = node.meta[NEURON]  # still the neuron that an earlier pass chose
        new = call(aten.mul.Tensor, rate, call(program.add_tensor(str(scaled.args[1].target), gain)), name=scaled.name)
    scaled.replace_all_uses_with(new)
    program.graph.erase_node(scaled)
    program.graph.erase_node(node)


# --- its tests


def annotated(headroom: float = 1.0) -> Program:
    """A tiny GPT-2 with spiking attention, ready for the pass; ``headroom`` widens the output thresholds so that nothing clips."""
    program = ntc.capture(tiny_gpt2(n_layer=1))
    ids = example_ids()
    steps = (Step("canonicalize"), Step("calibrate"), Step("replace-attention"))
    passes = Recipe("test", "", "", "", "", steps).build(Settings(), find_pass)
    program = ntc.run_pipeline(program, passes, Context(ntc.Calibration((ids,), "random", "")))
    for name, value in program.tensors.items():
        if ".ssa." in name:  # rate and gain together: r(x, a theta) a g = r(x, theta) g where nothing clips
            value.data.mul_(headroom)
    return program


def test_shares_the_output_neuron_and_leaves_the_rest_to_folding() -> None:
    """Number of ops, sites, misses; ``check_pass`` adds facts, types, the untouched input, and a second run."""
    after = check_pass(
        ShareThresholds(), annotated(), ops_before={"ntc.if_rate": 4, "mul": 1}, ops_after={"ntc.if_rate": 4, "mul": 1},
        sites=1, missed=["comes from a linear layer"] * 3,
    )  # fmt: skip
    assert after.tensor("transformer.h.0.attn.ssa.threshold").shape == (1,)


def test_is_exact_where_nothing_clips() -> None:
    """Numbers: a gain that is 1 % off moves the logits more than that."""
    check_pass(ShareThresholds(Options("max")), annotated(headroom=1e3), rtol=1e-4, atol=1e-4, sites=1)


def test_after_folding_there_is_no_gain_left() -> None:
    """The refusal."""
    folded = ntc.run_pipeline(annotated(), [find_pass("fold-thresholds")()])
    try:
        ntc.run_pipeline(folded, [ShareThresholds()])
    except ntc.PassError as error:
        assert "run before fold-thresholds" in str(error)  # noqa: PT017 - pytest is not needed to read this file
    else:
        raise AssertionError("a pass that is required and finds nothing is an error")


# --- what it does to a real network


def main(model: Path = HERE / "gpt2-books", text: Path = HERE / "data" / "books-sample.txt", steps: int = 4, tokens: int = 2048) -> None:
    """Print quality and spikes of the recipe as it is and with the pass in it."""
    tokenizer = load_tokenizer(model)
    program = ntc.capture(model)
    vocabulary = program.info.vocab_size
    calibration = calibration_from(tokens_from(model / "calibration.txt", tokenizer, 256, tokens, vocabulary))
    measured_on = tokens_from(text, tokenizer, 256, tokens, vocabulary)

    plain = recipe("neurtransformer").with_options("replace-attention", output="spikes")  # as it is, it has no output neuron
    variants = {"neurtransformer, output = spikes": plain}
    for how in ("mean", "max"):
        step = Step(ShareThresholds, {"shared_threshold": how})  # the class: an installed pass is named by its name
        variants[f"with share-thresholds, {how}"] = plain.insert_after("convert-ffn", step)

    # The variants differ behind convert-ffn: what comes before runs once. With one variant, ntc.compile(model, recipe=variant).
    first = plain.until("convert-ffn").build(Settings({"steps": steps}), find_pass)
    prepared = ntc.run_pipeline(program, first, Context(calibration))
    print(f"{'T = ' + str(steps) + ', ' + measured_on.description:<58} perplexity  events/value  attention output")
    for label, variant in variants.items():
        compiled = ntc.run_pipeline(prepared, variant.after("convert-ffn").build(Settings(), find_pass))
        quality = ntc.evaluate(compiled, program, measured_on)
        outputs = [p.events_per_value for p in quality.populations if p.role == "ssa"]
        print(f"{label:<58} {quality.perplexity:10.2f}  {quality.events_per_value:12.3f}  {sum(outputs) / len(outputs):16.3f}")


if __name__ == "__main__":
    main()
