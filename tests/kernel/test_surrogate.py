import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntc.errors import ConfigError
from ntc.surrogate import SURROGATES, surrogate

NAMES = sorted(SURROGATES)
widths = st.floats(0.125, 4.0)


@pytest.mark.parametrize("width", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_integrates_to_one(name, width):
    reach = 8.0 * width
    u = torch.linspace(-reach, reach, 400_001, dtype=torch.float64)
    area = float(torch.trapezoid(surrogate(name)(u, width), u))
    if name == "atan":  # heavy tails
        area += 1.0 - 2.0 / math.pi * math.atan(8.0)
    assert area == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@given(width=widths, u=st.floats(-10, 10))
def test_is_even_and_never_negative_and_scales_with_its_width(name, width, u):
    f, x = surrogate(name), torch.tensor([u], dtype=torch.float64)
    assert float(f(x, width)) >= 0
    torch.testing.assert_close(f(-x, width), f(x, width))
    if abs(abs(u) - 1) > 1e-6:  # the straight-through one jumps there
        torch.testing.assert_close(f(x * width, width) * width, f(x, 1.0), rtol=1e-6, atol=1e-9)
    assert float(f(x, width)) <= float(f(torch.zeros(1, dtype=torch.float64), width))


@pytest.mark.parametrize(("name", "values"), [
    ("triangular", [1.0, 0.5, 0.0, 0.0]), ("straight-through", [0.5, 0.5, 0.5, 0.0]),
    ("sigmoid", [1.0, 0.41997434161402614, 0.07065082485316447, 0.0013409506830258]),
    ("atan", [0.3183098861837907, 0.25464790894703254, 0.15915494309189535, 0.06366197723675814]),
])  # fmt: skip
def test_by_hand(name, values):
    got = surrogate(name)(torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64), 1.0)
    torch.testing.assert_close(got, torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        surrogate("step")
    assert all(name in str(caught.value) for name in NAMES)
