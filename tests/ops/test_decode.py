import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import RATE, SPIKES, counts, dyadics, infer, operand, random, same_layout

from ntc.ops import Counts, TypeMismatch, decode
from ntc.ops.decode import decode_weights
from ntc.spike_type import ANALOG, INDEX, CurrentType, SpikeType

OP = torch.ops.ntc.decode.default
CODES = ["rate", "count", "phase"]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 4, 8]), st.sampled_from(CODES))
def test_is_the_weighted_sum_of_its_definition(data, steps, code):
    x = data.draw(dyadics(-8, 8, steps))
    weight = {"rate": [1 / steps] * steps, "count": [1.0] * steps, "phase": [2.0 ** -(t + 1) for t in range(steps)]}[code]
    assert decode_weights(code, steps) == weight
    got = decode(torch.tensor(x).view(steps, 1, 1), code)
    assert got.shape == (1, 1)
    assert float(got) == sum(w * s for w, s in zip(weight, x, strict=True))  # steps a power of 2: exact


def test_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    assert decode(train, "rate").tolist() == [0.5, 0.75]
    assert decode(train, "count").tolist() == [2.0, 3.0]
    assert decode(train, "phase").tolist() == [0.625, 0.4375]  # binary fractions 0.1010 and 0.0111


def test_unknown_code():
    with pytest.raises(ValueError, match="unknown spike code 'burst'"):
        decode_weights("burst", 4)
    with pytest.raises(ValueError, match="unknown spike code 'burst'"):
        decode(torch.ones(2, 2), "burst")


@pytest.mark.parametrize("code", CODES)
def test_gradient_opcheck_and_layout(code):
    torch.autograd.gradcheck(lambda x: decode(x, code), (random(3, 2, 2, 2),))
    torch.library.opcheck(decode, (random(3, 2, 3, 4, dtype=torch.float32), code))
    assert same_layout(decode, random(3, 2, 4, 3, grad=False).transpose(-1, -2), code)


def test_compiles_with_gradients():
    def f(x):
        return decode(2 * x, "phase") ** 2

    x = random(3, 2, 3, 4, dtype=torch.float32)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(f(x), compiled)
    torch.testing.assert_close(torch.autograd.grad(f(x).sum(), x), torch.autograd.grad(compiled.sum(), x))


@pytest.mark.parametrize("kind", [SpikeType, CurrentType])
@pytest.mark.parametrize("made", CODES)
@pytest.mark.parametrize("read", CODES)
def test_codes_do_not_mix(kind, made, read):
    if made == read:
        assert infer(OP, kind(4, made), read) == ANALOG
    else:
        with pytest.raises(TypeMismatch, match=rf"decode reads the {read} code, and %x0 is .*{made}") as caught:
            infer(OP, kind(4, made), read)
        assert caught.value.argument.name == "x0"


@pytest.mark.parametrize("kind", [ANALOG, RATE, INDEX])
def test_only_trains_are_decoded(kind):
    with pytest.raises(TypeMismatch, match="decode takes spikes or currents"):
        infer(OP, kind, "rate")


def test_counting():
    train = torch.ones(4, 1, 2, 3)
    assert counts(OP, [operand(train, SPIKES)], operand(torch.ones(1, 2, 3))) == Counts(elementwise=24)
