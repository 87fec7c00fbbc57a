import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntc.spike_type import ANALOG, INDEX, CurrentType, RateType, SpikeType, from_json, to_json

steps, codes = st.integers(1, 64), st.sampled_from(["rate", "phase", "count"])
types = st.one_of(
    st.just(ANALOG), st.just(INDEX), st.builds(RateType, st.booleans()), st.builds(CurrentType, steps, codes),
    st.builds(
        SpikeType, steps, codes, st.sampled_from(["binary", "ternary", "graded"]),
        st.sampled_from(["none", "tensor", "channel", "token"]), st.booleans(),
    ),
)  # fmt: skip


@given(types)
def test_json_gives_the_type_back(kind):
    again = from_json(json.loads(json.dumps(to_json(kind))))
    assert again == kind
    assert type(again) is type(kind)
    assert hash(again) == hash(kind)


@given(types, types)
def test_different_types_differ_in_json_too(a, b):
    assert (to_json(a) == to_json(b)) == (a == b)


def test_from_json_leaves_its_argument_alone_and_refuses_what_is_no_type():
    data = to_json(SpikeType(4))
    before = dict(data)
    from_json(data)
    assert data == before
    with pytest.raises(KeyError):
        from_json({"kind": "burst"})


@pytest.mark.parametrize(("kind", "text"), [
    (ANALOG, "analog"), (INDEX, "index"), (RateType(), "rate"), (RateType(signed=True), "rate ±"),
    (SpikeType(4), "spikes T=4 binary rate"), (SpikeType(8, "phase", "ternary"), "spikes T=8 ternary phase"),
    (SpikeType(4, "count", "graded", "channel"), "spikes T=4 graded count xchannel"), (CurrentType(4), "current T=4 rate"),
])  # fmt: skip
def test_text(kind, text):
    assert str(kind) == text


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_train_has_a_step(wrong):
    for kind in (SpikeType, CurrentType):
        with pytest.raises(ValueError, match=f"at least one time step, got steps={wrong}"):
            kind(wrong)


def test_types_are_values():
    assert SpikeType(4) == SpikeType(4, "rate", "binary", "none", True)
    assert SpikeType(4) != CurrentType(4)
    assert len({SpikeType(4), SpikeType(4), SpikeType(8), CurrentType(4)}) == 3
    with pytest.raises(FrozenInstanceError):
        SpikeType(4).steps = 5
