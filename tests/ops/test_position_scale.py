import pytest
import torch
from op_cases import CURRENT, RATE, SPIKES, Constant, counts, infer, node_of, operand, random, same_layout
from torch import nn
from torch.fx import GraphModule

from ntc.ops import SPECS, Counts, TypeMismatch, position_scale
from ntc.ops.position_scale import position_table
from ntc.spike_type import ANALOG, INDEX

OP = torch.ops.ntc.position_scale.default
LEADS = [(), (2,), (4, 2)]


@pytest.mark.parametrize("lead", LEADS)
def test_divides_by_the_number_of_keys_seen(lead):
    x = random(*lead, 5, 3, grad=False)
    y = position_scale(x)
    for i in range(5):
        assert torch.equal(y[..., i, :], x[..., i, :] / (i + 1))


@pytest.mark.parametrize("lead", LEADS)
def test_a_table_has_one_factor_per_head_and_position(lead):
    x, table = random(*lead, 5, 6, grad=False), random(3, 7, grad=False, low=0.1, seed=1)
    y = position_scale(x, table)
    for i in range(5):
        for c in range(6):
            assert torch.equal(y[..., i, c], x[..., i, c] * table[c // 2, i])


def test_the_first_table_divides_by_the_position():
    x = random(2, 5, 6, grad=False, dtype=torch.float32)
    table = position_table(3, 9)
    assert table.shape == (3, 9)
    torch.testing.assert_close(position_scale(x, table), position_scale(x))


def test_positions_are_exact_in_bfloat16():
    x = torch.ones(1, 300, 1, dtype=torch.bfloat16)
    y = position_scale(x)
    assert y.dtype == torch.bfloat16
    assert float(y[0, 256, 0]) == float(torch.tensor(1 / 257).bfloat16()) != float(torch.tensor(1 / 256).bfloat16())


def test_a_table_that_does_not_fit_is_refused():
    x = random(2, 5, 6, grad=False)
    with pytest.raises(ValueError, match="has factors for 4 tokens, and the sequence has 5"):
        position_scale(x, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"shape \[H, context\] with H a divisor of 6, not \[4, 9\]"):
        position_scale(x, torch.ones(4, 9))
    with pytest.raises(ValueError, match=r"not \[9\]"):
        position_scale(x, torch.ones(9))


def test_gradient_opcheck_and_layout():
    torch.autograd.gradcheck(position_scale, (random(2, 3, 2),))
    table = random(2, 4, low=0.1, seed=1)
    for lead in LEADS:
        torch.autograd.gradcheck(position_scale, (random(*lead, 3, 4), table))
    torch.library.opcheck(position_scale, (random(2, 3, 4, dtype=torch.float32),))
    torch.library.opcheck(position_scale, (random(2, 3, 4, dtype=torch.float32), random(2, 5, dtype=torch.float32)))
    for more in ([], [torch.ones(8, 3).t()]):
        assert same_layout(position_scale, random(2, 4, 3, grad=False).transpose(-1, -2).repeat(1, 1, 3), *more)
        assert same_layout(position_scale, random(1, 1, 3, grad=False).expand(2, 4, 3), *more)


@pytest.mark.parametrize("with_table", [False, True])
def test_compiles_with_gradients(with_table):
    def f(x):
        return position_scale(2 * x, *([table] if with_table else [])) ** 2

    x, table = random(2, 3, 4, dtype=torch.float32), random(2, 6, dtype=torch.float32, low=0.1)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(f(x), compiled)
    torch.testing.assert_close(torch.autograd.grad(f(x).sum(), x), torch.autograd.grad(compiled.sum(), x))


def test_types():
    for more in ([], [Constant((2, 9))]):
        assert infer(OP, ANALOG, *more) == ANALOG
        assert infer(OP, CURRENT, *more) == CURRENT
        for kind in (SPIKES, RATE, INDEX):
            with pytest.raises(TypeMismatch, match="position_scale takes a current or an analog value, and %x0"):
                infer(OP, kind, *more)
    with pytest.raises(TypeMismatch, match="a position table is an analog constant, and %x1 is spikes"):
        infer(OP, CURRENT, SPIKES)


def test_a_constant_factor_that_is_not_positive_is_refused():
    node, types = node_of(OP, CURRENT, Constant((2, 3)))
    module = nn.Module()
    module.c1 = nn.Parameter(torch.tensor([[1.0, 0.5, 0.3], [1.0, 0.0, 0.3]]))
    node.graph.output(node)
    graph = GraphModule(module, node.graph).graph
    types = {n: types[old] for n, old in zip(graph.nodes, node.graph.nodes, strict=True) if old in types}
    with pytest.raises(TypeMismatch, match="holds factors > 0, and element 4 of %c1 is 0"):
        SPECS[OP].infer(next(n for n in graph.nodes if n.op == "call_function"), types.__getitem__)


def test_counting():
    x = torch.ones(4, 2, 3, 5)
    assert counts(OP, [operand(x, CURRENT)], operand(x, CURRENT)) == Counts(elementwise=120)


def test_the_traced_form_is_the_same_function():
    traced = SPECS[OP].traced
    for more in ([], [random(2, 6, dtype=torch.float32, low=0.1)]):
        x = random(2, 3, 4, dtype=torch.float32)
        assert torch.equal(traced(x, *more), position_scale(x, *more))
        for a, b in zip(*(torch.autograd.grad((f(x, *more) ** 2).sum(), [x, *more]) for f in (traced, position_scale)), strict=True):
            torch.testing.assert_close(a, b)
