r"""The arithmetic that the integer ops share: rounding, exact products, the types that they take.

    round(a / 2^k) = (a + 2^(k-1)) >> k         arithmetic shift: halves go up; nothing is added for k = 0
    round(a / b)   = floor((a + floor(b / 2)) / b),  b > 0
    isqrt(n)       = floor(sqrt(n))

All in int64, exact while nothing exceeds it, which the width analysis proves of a program (``ntc.widths``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.spec import TypeMismatch
from ntc.spike_type import CurrentType, Integer, NodeType

__all__ = [
    "MOST_SHIFT", "as_int32", "check_integers", "check_per_channel_or_position", "check_range", "check_shift", "constant_of",
    "dtype_of_range", "exact_matmul", "holds_integers", "integer_argument", "integer_constants", "isqrt", "largest", "round_divide",
    "round_shift",
]  # fmt: skip

MOST_SHIFT = 62


def round_shift(a: Tensor, shift: int) -> Tensor:
    """``round(a / 2**shift)`` of int64, ``a < 2**63 - 2**(shift - 1)``."""
    return (a + (1 << (shift - 1))) >> shift if shift else a


def round_divide(a: Tensor, b: Tensor | int) -> Tensor:
    """``round(a / b)`` of int64, b > 0."""
    half = torch.div(b, 2, rounding_mode="floor") if isinstance(b, Tensor) else b // 2
    return torch.div(a + half, b, rounding_mode="floor")


def isqrt(n: Tensor) -> Tensor:
    """``floor(sqrt(n))`` of int64, 0 <= n < 2**62: the root in float64 is wrong by less than one, which one step back or up mends."""
    root = n.double().sqrt().to(torch.int64)
    root = root - (root * root > n).to(torch.int64)
    return root + ((root + 1) * (root + 1) <= n).to(torch.int64)


def largest(x: Tensor) -> int:
    """``max |x|``; 0 of an empty tensor."""
    if not x.numel():
        return 0
    low, high = torch.aminmax(x)
    return max(-int(low), int(high))


def exact_matmul(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """``a @ b`` of integers through floating point, exactly: int64.

    A product in floating point is exact, in any order, while every partial sum is an integer that the format holds.

    Args:
        a: ``[..., m, k]``, integers in any dtype.
        b: ``[..., k, n]``, likewise.
        bound: ``max over rows and columns of sum_k |a_ik b_kj|``, or more.

    Raises:
        ValueError: If the bound is 2**53 or more.
    """
    if bound >= 1 << 53:
        raise ValueError(f"a sum of integer products can reach {bound}, and 2**53 is the most that is computed exactly")
    # A user may have traded float32 products for bfloat16 ones.
    narrow = bound < 1 << 24 and torch.get_float32_matmul_precision() == "highest"
    dtype = torch.float32 if narrow else torch.float64
    return (a.to(dtype) @ b.to(dtype)).to(torch.int64)


def as_int32(x: Tensor, what: str) -> Tensor:
    """An int64 result in int32.

    Raises:
        ValueError: If it does not fit.
    """
    if largest(x) >= 1 << 31:
        raise ValueError(f"{what} reaches {largest(x)} and does not fit into int32; ntc.widths says where a program does that")
    return x.to(torch.int32)


# ------------------------------------------------------------------------------------------------ arguments of the kernels


def dtype_of_range(low: int, high: int) -> torch.dtype:
    """The narrowest of int8, int16 and int32 that holds a range."""
    for dtype in (torch.int8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= low <= high <= limits.max:
            return dtype
    raise ValueError(f"a result in {low} ... {high} is no range that int32 holds")


def check_range(low: int, high: int) -> None:
    """Refuse a range that is empty or wider than int32."""
    dtype_of_range(low, high)


def check_shift(shift: int) -> None:
    """Refuse a shift that int64 cannot do."""
    if not 0 <= shift <= MOST_SHIFT:
        raise ValueError(f"a shift lies in 0 ... {MOST_SHIFT}, and not at {shift}")


def check_integers(**tensors: Tensor | None) -> None:
    """Refuse tensors that hold no integers. Looks at dtypes only."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} holds integers, and not {tensor.dtype}")


def check_per_channel_or_position(what: str, value: Tensor, channels: int | torch.SymInt) -> None:
    """Refuse a parameter that is not ``[1]``, ``[C]`` or ``[R, C]``."""
    if value.dim() not in (1, 2) or (value.shape[-1] != channels and (value.dim() == 2 or value.shape[-1] != 1)):
        raise ValueError(f"{what} has shape [1], [{channels}] or [R, {channels}], and not {list(value.shape)}")


# -------------------------------------------------------------------------------------------------------------- type rules


def integer_argument(node: Node, type_of: Callable[[Node], NodeType], *, currents: bool = False) -> NodeType:
    """The type of argument 0, which has to be an integer (with ``currents``: or an integer current of the count code).

    Raises:
        TypeMismatch: If it is something else.
    """
    x = node.args[0]
    assert isinstance(x, Node)
    given = type_of(x)
    if isinstance(given, Integer) or (currents and isinstance(given, CurrentType) and given.code == "count" and holds_integers(x)):
        return given
    wanted = "integers or count-coded currents of integers" if currents else "integers"
    raise TypeMismatch(f"{node.target} takes {wanted}, and %{x.name} is {given}", x)


def holds_integers(node: Node) -> bool:
    """Whether the value of a node is of an integer dtype, as far as that is known."""
    value = node.meta.get("val")
    return not (isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.bool))


def constant_of(node: Node, position: int) -> Tensor | None:
    """The tensor at that position of the arguments, if it is a constant of a program."""
    argument, found = node.args[position], node.graph.owning_module
    if not isinstance(argument, Node) or argument.op != "get_attr":
        return None
    for part in str(argument.target).split("."):
        found = getattr(found, part, None)
    return found.detach() if isinstance(found, Tensor) and not found.is_meta else None


def integer_constants(node: Node, *positions: int) -> None:
    """Refuse a tensor at one of those positions that holds no integers (None passes).

    Raises:
        TypeMismatch: Names the argument and its dtype.
    """
    for position in positions:
        argument = node.args[position] if len(node.args) > position else None
        if isinstance(argument, Node) and not holds_integers(argument):
            raise TypeMismatch(f"{node.target} takes integer constants, and %{argument.name} is {argument.meta['val'].dtype}", argument)
