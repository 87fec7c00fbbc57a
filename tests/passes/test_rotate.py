"""rotate: the same logits from a stream in another basis; where a Hadamard transform stays, it is an op; what cannot be rotated is refused."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from family_cases import analog
from programs import canonical
from test_fold_norms import tailed
from torch.nn import functional

from ntc.errors import ConfigError, PassError
from ntc.ops.hadamard import hadamard, hadamard_core, hadamard_matrix
from ntc.pipeline import Calibration, Context, run_pipeline
from ntc.program import Program, interpret
from ntc.quality import evaluate
from ntc.testing import check_pass, count_ops, example_ids
from ntc.text import Tokens
from ntc_passes.fold_norms import FoldNorms
from ntc_passes.residual import residual_stream
from ntc_passes.rotate import Rotate
from ntc_passes.rotate.principal import HeadRotation
from ntc_passes.rotate.rotations import hadamard_factors, kronecker, rotation


@cache
def folded(name: str) -> Program:
    return run_pipeline(canonical() if name == "gpt2" else analog(name), [FoldNorms()])


def rotated(name: str, **options) -> Program:
    return check_pass(Rotate.configure(options), folded(name))


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("size", [1, 2, 9, 12, 32, 72])
def test_rotations_are_orthogonal(kind: str, size: int) -> None:
    turn = rotation(size, kind, seed=3)
    q = turn(torch.eye(size))
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    blocks = torch.randn(2, 3 * size, dtype=torch.float64)
    torch.testing.assert_close(turn(blocks), blocks @ torch.block_diag(q, q, q))
    if kind == "hadamard" and size != 9:
        torch.testing.assert_close(q.abs(), torch.full_like(q, size**-0.5))
        assert "hadamard" in turn.kind
    else:
        assert "orthogonal" in turn.kind


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "smollm3", "gemma"])
def test_exact_for_each_kind_of_block(name: str) -> None:
    before = folded(name)
    after = rotated(name)
    assert count_ops(after) == count_ops(before) and after.tensors.keys() == before.tensors.keys()
    layers = count_ops(before)["ntc.attention"]
    assert after.history[-1].notes == {"stream": "hadamard 1 x 2^5, seed 0", "values": layers, "online": {}}
    assert after.history[-1].sites == 1 + layers


@pytest.mark.parametrize(("kind", "size"), [("hadamard", 48), ("hadamard", 8), ("hadamard", 256), ("orthogonal", 6)])
def test_from_the_left_is_the_transpose(kind: str, size: int) -> None:
    turn, w = rotation(size, kind, seed=1), torch.randn(3 * size, 5, dtype=torch.float64)
    assert torch.allclose(turn.from_left(w), turn(w.T).T, rtol=0, atol=1e-13)
    dense = turn(torch.eye(size))
    assert torch.allclose(turn.from_left(w[:size]), dense.T @ w[:size], rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 12, 36 * 16, 128, 2048])
def test_products_with_small_matrices_are_the_transform(size: int) -> None:
    core, doublings = found if (found := hadamard_core(size)) else (torch.ones(1, 1), 0)
    factors = hadamard_factors(core, doublings)
    assert all(1 < len(f) <= max(64, len(core)) for f in factors)
    x = torch.randn(2, 2 * size, dtype=torch.float64)
    assert torch.allclose(kronecker(x, factors), hadamard(x, core, doublings), rtol=0, atol=1e-11)


TEXT = Context(Calibration((example_ids(batch=4, length=16, seed=2),), "some", ""))


@pytest.mark.parametrize("name", ["llama", "gpt2", "smollm3"])
def test_principal_axes_are_exact_and_uncorrelated(name: str) -> None:
    """The same logits; norms of the stream have, taken together, no correlation, and powers that fall; so has each head's result."""
    before = folded(name)
    after = check_pass(Rotate.configure({"kind": "principal"}), before, context=TEXT)
    layers = count_ops(before)["ntc.attention"]
    assert after.history[-1].notes == {"stream": "principal, 64 tokens", "values": layers, "online": {}}
    stream, ids = residual_stream(after), TEXT.calibration.batches[0]
    norms = {reader for reader, _ in stream.readers if reader.target is torch.ops.aten.rms_norm.default}
    assert norms
    found, covariances = [], []

    def visit(node, args, value) -> None:
        if node in norms:
            found.append(value.flatten(0, -2).double())
        if node.target is torch.ops.ntc.attention.default:
            heads, kv_heads = args[3:5]
            y = value.double().reshape(-1, kv_heads, heads // kv_heads, value.shape[-1] // heads)
            covariances.extend(torch.einsum("nghd,nghe->gde", y, y))

    with torch.no_grad():
        interpret(after, ids, visit)
    covariances.append(torch.cat(found).T @ torch.cat(found))
    for c in covariances:
        powers = c.diagonal()
        assert (c - powers.diag()).abs().max() < 1e-5 * powers.max()
        assert (powers.diff() <= 1e-5 * powers.max()).all() and powers[0] > 2 * powers[-1]


def test_rotations_of_heads_are_block_by_block() -> None:
    q = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64))[0]
    turn, dense = HeadRotation(q, "any"), torch.block_diag(q[0], q[0], q[1], q[1])
    x, w = torch.randn(5, 24), torch.randn(12, 7)
    assert torch.allclose(turn(x), x.double() @ dense, rtol=0, atol=1e-13)
    assert torch.allclose(turn.from_left(w), torch.block_diag(q[0], q[1]).T @ w.double(), rtol=0, atol=1e-13)


def test_the_stream_is_the_old_one_times_the_rotation() -> None:
    before, after = folded("llama"), rotated("llama", seed=7)
    turn, seen = rotation(32, "hadamard", 7), {}
    members = {n.name for n in residual_stream(before).members}

    def visit(node, args, value):
        if node.name in members:
            seen.setdefault(node.name, []).append(value)

    with torch.no_grad():
        for program in (before, after):
            interpret(program, before.example, visit)
    assert len(seen) == 9
    for x, y in seen.values():
        torch.testing.assert_close(y.double(), turn(x), rtol=0, atol=1e-5 * float(x.abs().max()))


def test_weights_in_closed_form() -> None:
    before, after = folded("llama"), rotated("llama")
    q, r = (rotation(n, "hadamard", 0)(torch.eye(n)) for n in (32, 8))
    kv, heads = torch.block_diag(r, r), torch.block_diag(r, r, r, r)

    def check(name: str, expected) -> None:
        weight = f"{name}.weight"
        torch.testing.assert_close(after.tensor(weight).double(), expected(before.tensor(weight).double()), rtol=0, atol=1e-6)

    check("model.embed_tokens", lambda e: e @ q)
    check("model.layers.0.self_attn.q_proj", lambda w: w @ q)
    check("model.layers.0.self_attn.v_proj", lambda w: kv.T @ w @ q)
    check("model.layers.1.self_attn.o_proj", lambda w: q.T @ w @ heads)
    check("model.layers.1.mlp.up_proj", lambda w: w @ q)
    check("model.layers.1.mlp.down_proj", lambda w: q.T @ w)
    check("lm_head", lambda w: w @ q)


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(1, 32)
    x[0, 5] = 100.0
    assert torch.equal(rotation(32, "hadamard", 0)(x).abs(), torch.full((1, 32), 100 / 32**0.5, dtype=torch.float64))


@pytest.mark.parametrize(("which", "count"), [("ffn", 2), ("all", 4)])
def test_online_transforms(which: str, count: int) -> None:
    before, after = folded("llama"), rotated("llama", online=which, values=False)
    assert count_ops(after)["ntc.hadamard"] == count
    assert after.history[-1].sites == 1 + count
    down = after.find("layers_0_mlp_down_proj")
    transform = down.args[0]
    assert transform.args[0] is after.find("layers_0_mlp_mul") and transform.args[2] == 2
    h, q = hadamard_matrix(48).double(), rotation(32, "hadamard", 0)(torch.eye(32))
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(after.tensor(name).double(), q.T @ before.tensor(name).double() @ h / 48, rtol=0, atol=1e-6)
    assert {n for n in after.tensors if "hadamard" in n} == ({"hadamard_12"} if which == "ffn" else {"hadamard_12", "hadamard_1"})
    online = after.history[-1].notes["online"]
    assert online["layers_0_mlp_down_proj"] == "hadamard 12 x 2^2, 1 blocks" and len(online) == count


def test_a_width_without_a_hadamard_matrix_is_cut_into_blocks_or_turned_at_random() -> None:
    def body(m, x):
        return functional.linear(functional.rms_norm(x + functional.linear(functional.linear(x, m.up).relu(), m.down), [16]), m.head)

    program = run_pipeline(tailed(body, up=(22, 16), down=(16, 22), head=(11, 16)), [FoldNorms()])
    after = check_pass(Rotate.configure({"online": "ffn"}), program, ops_after={"ntc.hadamard": 1})
    assert after.history[-1].notes["online"] == {"down": "hadamard 1 x 2^1, 11 blocks"}
    assert rotation(22, "hadamard", 0).kind == "orthogonal 22, seed 0"


def test_a_tied_embedding_stays_tied_where_its_norm_has_no_gain() -> None:
    def body(m, x):
        return functional.linear(functional.rms_norm(x, [16]), m.wte.weight)

    after = check_pass(Rotate(), run_pipeline(tailed(body), [FoldNorms()]))
    assert list(after.tensors) == ["wte.weight"] and "untied" not in after.history[-1].notes


def test_the_seed_chooses() -> None:
    first, same, other = (rotated("llama", seed=s).tensor("lm_head.weight") for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.allclose(first, other)


def test_twice_is_once() -> None:
    program = run_pipeline(folded("llama"), [Rotate()])
    assert not Rotate().run(program.copy(), Context()).modified
    with pytest.raises(PassError, match="the program is rotated already"):
        run_pipeline(program, [Rotate()])


def test_values_that_are_not_linear_are_left_alone() -> None:
    def body(m, x):
        n = functional.rms_norm(x, [16])
        q, k, v = functional.linear(n, m.q), functional.linear(n, m.k), functional.linear(n, m.v).relu()
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return functional.linear(functional.rms_norm(x + functional.linear(y, m.o), [16]), m.head)

    program = run_pipeline(tailed(body, q=(16, 16), k=(16, 16), v=(16, 16), o=(16, 16), head=(11, 16)), [FoldNorms()])
    check_pass(Rotate(), program, sites=1, missed=["are not the result of a linear layer"])


def test_refusals_name_the_node_and_the_remedy() -> None:
    with pytest.raises(PassError, match="rotate needs a program that is norms-folded: no pass in this recipe provides it"):
        run_pipeline(canonical(), [Rotate()])
    with pytest.raises(PassError, match=r"cannot pass a LayerNorm.*%h_0_ln_1 .*; fold-norms makes it an RMSNorm"):
        run_pipeline(canonical(), [FoldNorms(FoldNorms.Options(centre=False)), Rotate()])
    with pytest.raises(PassError, match=r"linear layers write, and node %layers_0_post_attention_layernorm .*has no form in another basis"):
        run_pipeline(folded("olmo2"), [Rotate()])
    with pytest.raises(PassError, match=r"principal axes on calibration text: .* or choose kind = hadamard"):
        run_pipeline(folded("llama"), [Rotate.configure({"kind": "principal"})])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: functional.linear(functional.rms_norm(x, [16]), m.w) + functional.relu(x), "only norms and linear layers read"),
        (lambda m, x: functional.linear(functional.rms_norm(x, [16]).relu(), m.w), "norms that only linear layers read"),
        (lambda m, x: functional.linear(y := functional.rms_norm(x, [16], m.g), m.w) + y, "a norm with a gain for each channel"),
        (lambda m, x: functional.linear(functional.rms_norm(x, [16]), m.w.exp()), "changes the weights of"),
    ],
)
def test_streams_that_are_read_otherwise(body, reason: str) -> None:
    program = run_pipeline(tailed(body, w=(16, 16), g=(16,)), [FoldNorms()])
    with pytest.raises(PassError, match=reason):
        run_pipeline(program, [Rotate()])


def test_options() -> None:
    for options, sentence in (
        ({"kind": "random"}, "kind must be 'hadamard', 'orthogonal' or 'principal', got 'random'"),
        ({"online": True}, "online must be 'none', 'ffn' or 'all', got True"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"values": "yes"}, "values must be true or false, got 'yes'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Rotate.configure(options)


def test_layers_of_a_rotated_network_are_not_compared() -> None:
    """Its channels are other ones: a cosine of the two bases would say nothing. The logits are the same."""
    before = analog("llama")
    after = run_pipeline(before, [FoldNorms(), Rotate()])
    tokens = Tokens(example_ids(length=12, seed=3), "some", "")
    found = evaluate(after, before, tokens)
    assert found.layers == () and math.isnan(found.cosine_hidden) and found.cosine > 0.9999
    assert len(evaluate(run_pipeline(before, [FoldNorms()]), before, tokens).layers) == 6
