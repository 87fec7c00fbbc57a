"""Test a pass the way ntc tests its own: tiny models in many spellings, and one harness that holds a pass to its contract.

>>> from ntc.testing import check_pass, tiny_gpt2
>>> import ntc
>>> from ntc_passes.canonicalize import Canonicalize
>>> program = ntc.capture(tiny_gpt2(n_layer=1))
>>> after = check_pass(Canonicalize(), program, ops_after={"ntc.attention": 1, "gelu": 1}, not_after=["addmm"])
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from ntc.pipeline import Context, Pass, exact_limit, run_pipeline
from ntc.program import Program, op_name

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

__all__ = ["NanoGPT", "check_pass", "count_ops", "example_ids", "randomize", "tiny_gpt2"]

Layout: TypeAlias = Literal["split", "separate", "permute", "interleaved"]
Mask: TypeAlias = Literal["masked_fill", "additive", "where", "sdpa", "sdpa_mask", "none", "padding"]

# Logits of a model with the usual initialization are nearly the same for every input: a broken rewrite would pass.
_SPREAD = 4.0


def tiny_gpt2(*, seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """Make a Hugging Face GPT-2 of a few thousand weights whose logits vary.

    Args:
        seed: Of the random weights.
        config: Fields of ``GPT2Config``; by default 2 layers of width 32 with 4 heads, 61 tokens, a context of 24.

    Returns:
        The model in evaluation mode; biases and norms are random too, so that a pass that drops one is found out.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 61, "n_positions": 24, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, **config}))
    randomize(model, seed)
    return model.eval()


def example_ids(vocab_size: int = 61, batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Random token ids ``[batch, length]``."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module, seed: int) -> None:
    """Give a model random weights in place, biases and norms among them, with which its logits differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * _SPREAD / 2 / math.sqrt(max(parameter.shape)))
            else:
                parameter.add_(noise * 0.2)


class NanoGPT(nn.Module):
    """A decoder as people write it by hand, with the spelling of its attention to choose from.

    Args:
        layout: How queries, keys and values leave the linear layers: ``split`` (one fused layer, nanoGPT), ``separate``
            (three layers), ``permute`` (fused, ``reshape(B, L, 3, H, D).permute``), ``interleaved`` (fused, q k v per
            head as in GPT-NeoX).
        mask: ``masked_fill`` with a ``bias`` buffer (nanoGPT), ``additive`` -inf, ``where``, ``sdpa`` with ``is_causal``,
            ``sdpa_mask`` with a boolean mask, or the two that are no causal attention: ``none`` (bidirectional) and
            ``padding`` (causal, and token 0 is not attended to).
        scaled: Whether ``scores`` or the ``query`` carry the factor ``D ** -0.5``.
        heads: H, number of query heads.
        kv_heads: Number of key and value heads, repeated to H with ``repeat_interleave``; only for ``separate``.
        layers: Number of blocks.
        width: Of the residual stream.
        vocab_size: V.
        context: Most tokens that it takes.
        activation: ``gelu``, ``gelu_tanh`` or ``relu``.
        bias: Whether linear layers have biases.
        seed: Of the random weights.
    """

    def __init__(
        self,
        *,
        layout: Layout = "split",
        mask: Mask = "masked_fill",
        scaled: Literal["scores", "query"] = "scores",
        heads: int = 4,
        kv_heads: int | None = None,
        layers: int = 2,
        width: int = 32,
        vocab_size: int = 61,
        context: int = 24,
        activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu_tanh",
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.context = context
        self.wte = nn.Embedding(vocab_size, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(
            _Block(layout, mask, scaled, heads, kv_heads or heads, width, context, activation, bias) for _ in range(layers)
        )
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        randomize(self, seed)
        self.eval()

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        """Logits ``[B, L, V]`` and no loss, as nanoGPT returns them."""
        _, length = idx.size()
        assert length <= self.context, f"cannot forward {length} tokens, the context is {self.context}"
        x = self.wte(idx) + self.wpe(torch.arange(length, dtype=torch.long, device=idx.device))
        for block in self.h:
            x = block(x, idx)
        return self.lm_head(self.ln_f(x)), None


class _Block(nn.Module):
    def __init__(self, layout: Layout, mask: Mask, scaled: str, heads: int, kv_heads: int, width: int, context: int,
                 activation: str, bias: bool) -> None:  # fmt: skip
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _Attention(layout, mask, scaled, heads, kv_heads, width, context, bias)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width, activation, bias)

    def forward(self, x: Tensor, idx: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), idx)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, width: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if self.activation == "relu":
            x = functional.relu(x)
        else:
            x = functional.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.dropout(self.c_proj(x))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    bias: Tensor

    def __init__(self, layout: Layout, mask: Mask, scaled: str, heads: int, kv_heads: int, width: int, context: int,
                 bias: bool) -> None:  # fmt: skip
        super().__init__()
        self.layout, self.mask, self.scaled, self.heads, self.kv_heads = layout, mask, scaled, heads, kv_heads
        self.size = width // heads
        if layout == "separate":
            self.q_proj = nn.Linear(width, width, bias=bias)
            self.k_proj = nn.Linear(width, kv_heads * self.size, bias=bias)
            self.v_proj = nn.Linear(width, kv_heads * self.size, bias=bias)
        else:
            self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.attn_dropout = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(context, context)).view(1, 1, context, context))

    def forward(self, x: Tensor, idx: Tensor) -> Tensor:
        b, length, width = x.size()
        q, k, v = self.projected(x)
        if self.scaled == "query":
            q = q * self.size**-0.5
        if self.mask in ("sdpa", "sdpa_mask"):
            keep = self.bias[0, 0, :length, :length].bool() if self.mask == "sdpa_mask" else None
            scale = 1.0 if self.scaled == "query" else None
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=keep is None, scale=scale)
        else:
            scores = q @ k.transpose(-2, -1)
            if self.scaled == "scores":
                scores = scores * (1.0 / math.sqrt(self.size))
            y = self.attn_dropout(self.masked(scores, idx, length).softmax(dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, length, width))  # type: ignore[no-any-return]

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[B, H, L, D]``."""
        b, length, width = x.size()
        if self.layout == "separate":
            q, k, v = (
                p(x).view(b, length, -1, self.size).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
            )
            if self.kv_heads != self.heads:
                k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            return q, k, v
        if self.layout == "permute":
            q, k, v = self.c_attn(x).reshape(b, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if self.layout == "interleaved":
            q, k, v = self.c_attn(x).view(b, length, self.heads, 3 * self.size).transpose(1, 2).chunk(3, dim=-1)
            return q, k, v
        q, k, v = (t.view(b, length, self.heads, self.size).transpose(1, 2) for t in self.c_attn(x).split(width, dim=2))
        return q, k, v

    def masked(self, scores: Tensor, idx: Tensor, length: int) -> Tensor:
        """The scores with those of later tokens taken out."""
        if self.mask == "none":
            return scores
        if self.mask == "additive":
            return scores + torch.full((length, length), float("-inf")).triu(1)
        keep = self.bias[:, :, :length, :length]
        if self.mask == "where":
            return torch.where(keep > 0, scores, torch.finfo(scores.dtype).min)
        scores = scores.masked_fill(keep == 0, float("-inf"))
        if self.mask == "padding":
            scores = scores.masked_fill((idx == 0)[:, None, None, :], -1e9)
        return scores


def count_ops(program: Program) -> Counter[str]:
    """How many nodes there are of each op, by short name such as ``linear`` or ``ntc.attention``."""
    return Counter(op_name(n.target) for n in program.graph.nodes if n.op == "call_function")


def check_pass(
    pass_: Pass,
    program: Program,
    *,
    context: Context | None = None,
    ops_before: Mapping[str, int] | None = None,
    ops_after: Mapping[str, int] | None = None,
    not_after: Sequence[str] = (),
    sites: int | None = None,
    missed: Sequence[str] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    idempotent: bool = True,
) -> Program:
    """Run one pass through the real pipeline and hold it to its contract.

    The pipeline itself checks the facts, the metadata and types of every node and the claim ``exact``. On top of that
    this checks that the given program is left as it was, that exactness also holds for another batch and length than the
    example's, and that a second run finds nothing more to do.

    Args:
        pass_: The pass.
        program: What to run it on; has the facts that the pass requires.
        context: Calibration data and overrides, if the pass needs any.
        ops_before: Exact numbers of these ops before, by short name; makes a test say what it starts from.
        ops_after: Exact numbers of these ops after.
        not_after: Ops that must be gone.
        sites: How many places the pass must report.
        missed: A part of the reason of each place that it must report as missed, in order; ``[]`` = it misses none.
        rtol: With ``atol``: relative tolerance of the logits against those before, for passes that are not exact.
        atol: Absolute tolerance of the logits. Without the two, only exact passes are compared.
        idempotent: Whether a second run must report ``modified=False``.

    Returns:
        The program after the pass.

    Raises:
        AssertionError: Says which part of the contract is broken.
        NtcError: What the pipeline raises, such as ``PassError`` for a pass that is not as exact as it claims.
    """
    name = type(pass_).name
    _expect_ops(ops_before, program, f"before {name}")
    before = program.fingerprint()
    after = run_pipeline(program, [pass_], context)
    _expect(program.fingerprint() == before, f"{name} changed the program that it was given: it must work on the copy and make new tensors")
    _expect_ops(ops_after, after, f"after {name}")
    _expect_ops(dict.fromkeys(not_after, 0), after, f"after {name}")
    record = after.history[-1]
    _expect(sites is None or record.sites == sites, f"{name} reports {record.sites} sites, expected {sites}")
    if missed is not None:
        reasons = [reason for _, reason in record.missed]
        fits = len(reasons) == len(missed) and all(part in reason for part, reason in zip(missed, reasons, strict=True))
        _expect(fits, f"{name} missed {reasons}, expected {list(missed)}")
    _compare_logits(pass_, program, after, rtol, atol)
    if idempotent:
        again = after.copy()
        result = pass_.run(again, context or Context())
        _expect(not result.modified, f"a second run of {name} still reports {result.sites} sites")
        _expect(again.fingerprint() == after.copy().fingerprint(), f"a second run of {name} edits, although it says modified=False")
    return after


def _expect(holds: bool, message: str) -> None:
    if not holds:  # not an assert statement: those vanish under python -O, and pytest rewrites none outside of tests
        raise AssertionError(message)


def _expect_ops(expected: Mapping[str, int] | None, program: Program, when: str) -> None:
    have = count_ops(program)
    wrong = [f"{have[op]} {op} instead of {number}" for op, number in (expected or {}).items() if have[op] != number]
    _expect(not wrong, f"{when} there are {', '.join(wrong)}; the program:\n{program}")


def _compare_logits(pass_: Pass, before: Program, after: Program, rtol: float | None, atol: float | None) -> None:
    if not type(pass_).exact and rtol is None and atol is None:
        return
    example = before.example
    for ids in (example, example[:1, : max(1, example.shape[1] - 1)]):
        with torch.no_grad():
            expected, got = before.module(ids), after.module(ids)
        where = f"the logits of {list(ids.shape)} tokens"
        _expect(got.shape == expected.shape, f"{type(pass_).name} changed the shape of {where} to {list(got.shape)}")
        drift, limit = (got - expected).abs(), exact_limit(float(expected.abs().max()))
        if type(pass_).exact:
            _expect(float(drift.max()) <= limit, f"{type(pass_).name} moved {where} by {float(drift.max()):.3g} (limit {limit:.3g})")
        if rtol is not None or atol is not None:
            allowed = (atol or 0.0) + (rtol or 0.0) * expected.abs()
            worst = float((drift - allowed).max())
            _expect(worst <= 0, f"{type(pass_).name} moved {where} by up to {float(drift.max()):.3g}, {worst:.3g} more than allowed")
