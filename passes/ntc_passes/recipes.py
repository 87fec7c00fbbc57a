"""The recipes that ship with ntc: one published method each, one screen long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ntc.recipe import Recipe, Step

__all__ = [
    "ATTENTION", "ECMT", "FFN", "FFN_ONLY", "LAS", "LOSSLESS", "LOSSLESS_SPARSE", "LOSSLESS_SPIKING", "NEURTRANSFORMER", "PHASE", "SDLLM",
    "SSA_ONLY",
]  # fmt: skip

ATTENTION: Mapping[str, Any] = {"normalizer": "leak", "output": "current"}
"""Options of replace-attention that the recipes choose, the winner of the comparison in docs/results.md. Binary Q and K, ternary V and
the 90th percentile are the pass's own defaults."""

FFN: Mapping[str, Any] = {"refit": True}
"""Options of convert-ffn that the recipes choose: the layer behind the neurons is fitted to their spikes, which takes back 1.8 of the 6.6 %
that they cost at four steps (docs/results.md)."""

NEURTRANSFORMER = Recipe(
    name="neurtransformer",
    summary="Spiking self-attention in place of softmax attention, IF neurons in the FFN, thresholds folded to 1.",
    source="NeurTransformer, arXiv 2510.00133, with the attention that won the comparison in docs/results.md",
    spiking="Q, K, V and the attention products; the FFN's hidden layer",
    analog="embeddings, LayerNorm, residual stream, inputs of the Q, K, V and first FFN projections, output projection, lm_head",
    steps=(
        Step("canonicalize"),
        Step("calibrate"),
        Step("replace-attention", ATTENTION),  # before convert-ffn only for the reader: neither sees the other's result
        Step("convert-ffn", FFN),
        Step("fold-thresholds"),  # before insert-neurons, where it is exact to rounding and not up to threshold ties
        Step("insert-neurons"),
    ),
)

SSA_ONLY = Recipe(
    name="ssa-only",
    summary="Spiking self-attention in every block, the FFN left analog: what attention conversion alone costs.",
    source="NeurTransformer, arXiv 2510.00133, step 1, with the attention that won the comparison in docs/results.md",
    spiking="Q, K, V and the attention products",
    analog="the FFN, embeddings, LayerNorm, residual stream, inputs of the Q, K and V projections, output projection, lm_head",
    steps=(
        Step("canonicalize"), Step("calibrate"), Step("replace-attention", ATTENTION), Step("fold-thresholds"), Step("insert-neurons"),
    ),
)  # fmt: skip

FFN_ONLY = Recipe(
    name="ffn-only",
    summary="IF neurons in the FFN, softmax attention left analog: what FFN conversion alone costs.",
    source="Rueckauer et al. 2017, 10.3389/fnins.2017.00682; Bu et al. 2022 (QCFS)",
    spiking="the FFN's hidden layer",
    analog="attention, embeddings, LayerNorm, residual stream, lm_head",
    steps=(Step("canonicalize"), Step("calibrate"), Step("convert-ffn", FFN), Step("fold-thresholds"), Step("insert-neurons")),
)

SDLLM = Recipe(
    name="sdllm",
    summary="Nothing trained: the residual stream rotated, ternary counts in front of every linear layer.",
    source="SDLLM, arXiv 2604.16475: LLaMA2-7B, mean of five zero-shot tasks 61.09 against 63.72 in FP16, with 4-bit weights and spiking "
    "attention products, which this recipe does not have; no perplexity of it is known to us (docs/recipes.md)",
    spiking="the inputs of all linear layers: Q, K, V and output projections, FFN, lm_head",
    analog="the attention products (Q K, P V) and softmax, RMSNorm, SiLU and the gated product, rotary positions, embeddings, residual "
    "stream; weights in float; the step of each token is measured, and the gated product transformed, while the network runs",
    steps=(
        Step("canonicalize"),
        Step("fold-norms"),
        Step("rotate", {"online": "ffn"}),  # without it the gated product keeps its outliers (docs/recipes.md)
        Step("encode-linears", {"code": "count", "steps": 7, "scale": "token"}),  # 4 bits: 2^3 - 1 steps, bidirectional
    ),
)

LOSSLESS = Recipe(
    name="lossless",
    summary="Nothing trained: balanced ternary digits in front of every linear layer and in both products of attention.",
    source="ntc's own, of published parts: rotation (QuaRot, arXiv 2404.00456), balanced ternary digits (Knuth, TAOCP 2, 4.1), softmax "
    "numerators coded with the size of the values behind them; measured in docs/recipes.md",
    spiking="the inputs of all linear layers, queries, keys, values and the softmax's numerators: every multiplication by a weight and "
    "every product of two activations in attention",
    analog="softmax (exp and one division per result), RMSNorm, SiLU and the gated product, rotary positions, embeddings, residual stream; "
    "weights in float; the steps of each token are measured, and the gated product, queries and keys transformed, while the network runs",
    steps=(
        Step("canonicalize"),
        Step("fold-norms"),
        Step("rotate", {"online": "ffn"}),
        Step("spike-products", {"steps": 5}),
        Step("encode-linears", {"code": "digits", "steps": 5}),
    ),
)

LOSSLESS_SPARSE = Recipe(
    name="lossless-sparse",
    summary="Nothing trained, nothing measured while it runs: digits with the fewest spikes, steps per site under a budget of events.",
    source="ntc's own: principal axes (Karhunen-Loeve), the non-adjacent form (Reitwiesner 1960), a price on spikes, and steps by Fisher "
    "information (reverse water-filling); measured in docs/recipes.md",
    spiking=LOSSLESS.spiking,
    analog="softmax (exp and one division per result), RMSNorm, SiLU and the gated product, rotary positions, embeddings, residual stream; "
    "weights in float",
    steps=(
        Step("canonicalize"),
        Step("fold-norms"),
        Step("rotate", {"kind": "principal"}),
        # Where mixed-steps sets out from: fine enough that sensitivities are those of the original, with room for twice what the text has.
        # A digit of room costs no spike, and tokens that rest on one channel cannot do without it.
        Step("spike-products", {"steps": 12, "base": 2.0, "probability_steps": 4, "scale": "channel", "ratio": 2.0}),
        Step("encode-linears", {"code": "digits", "steps": 12, "base": 2.0, "price": 0.9, "scale": "static", "ratio": 2.0}),
        Step("mixed-steps", {"events": 1.5}),
    ),
)

LOSSLESS_SPIKING = Recipe(
    name="lossless-spiking",
    summary="Nothing trained: lossless, and softmax, norms, activations and gated products of spikes, too.",
    source="ntc's own: lossless with few-spikes neurons (Stoeckl and Maass 2021, 10.1038/s42256-021-00311-4; several side by side: LAS, "
    "arXiv 2505.09659) and incremental products of trains (LAS); measured in docs/recipes.md",
    spiking="what lossless makes spiking; exp and the division of softmax, norms, activations and gated products",
    analog="rotary positions, embeddings, residual stream; transforms of queries, keys and gated products; sums of real values in softmax "
    "and norms, the largest score of a row, products with steps, which are measured for tokens and rows while the network runs; weights in "
    "float",
    steps=(
        Step("canonicalize"),
        Step("fold-norms"),
        Step("rotate", {"online": "ffn"}),
        Step("spike-functions", {**dict.fromkeys(("activation", "gate", "norm", "softmax"), "spiking"), "steps": 8}),
        Step("spike-products", {"steps": 8}),  # behind spike-functions, which opens attention
        Step("encode-linears", {"code": "digits", "steps": 8}),
    ),
)

PHASE = Recipe(
    name="phase",
    summary="Nothing trained, nothing rotated: phase codes with a base per site, learned on calibration text.",
    source="Phase coding with learned bases (ICLR 2026): LLaMA-2-7B +15 % perplexity at T = 8, +0.5 % at T = 10 (second-hand; its own "
    "network and text); digits are signed here",
    spiking="the inputs of all linear layers, queries, keys, values and the softmax's numerators",
    analog=LOSSLESS.analog,
    steps=(
        Step("canonicalize"),
        Step("spike-products", {"steps": 8, "base": "learned"}),
        Step("encode-linears", {"code": "digits", "steps": 8, "base": "learned"}),
    ),
)

LAS = Recipe(
    name="las",
    summary="Nothing trained: sixteen binary phases with halving thresholds, outliers with neurons of their own, ranges known in advance.",
    source="LAS, arXiv 2505.09659: GPT-2 on WikiText-103, perplexity 16.53 as a network and 16.79 at T = 16 (second-hand); ranges are "
    "calibrated here and constants there, and softmax, norms and activations stay analog until spike-functions is asked for",
    spiking="the inputs of all linear layers, in two ranges, queries, keys, values and the softmax's numerators",
    analog="softmax, norms, activations, rotary positions, embeddings, residual stream; weights in float",
    steps=(
        Step("canonicalize"),
        Step("spike-products", {"steps": 16, "base": 2.0, "probability_base": 2.0, "scale": "static"}),
        Step("encode-linears", {"code": "digits", "steps": 16, "base": 2.0, "scale": "static", "ranges": 2}),
    ),
)

ECMT = Recipe(
    name="ecmt",
    summary="Nothing trained: multi-threshold neurons in front of every linear layer, read as rates.",
    source="ECMT, arXiv 2502.21193: vision only, EVA (1 B) on ImageNet 88.60 % at T = 4, a loss of about 1 % (second-hand); it has "
    "eight thresholds of either sign, here are seven, equal for both signs, the largest one at the largest activation (docs/recipes.md)",
    spiking="the inputs of all linear layers: Q, K, V and output projections, FFN, lm_head",
    analog="the attention products and softmax, norms, activations, gated products, rotary positions, embeddings, residual stream, on the "
    "means over the steps: what the paper's expectation compensation tells in T parts, each of them real-valued; weights in float",
    steps=(Step("canonicalize"), Step("multi-threshold", {"steps": 4, "levels": 7})),
)
