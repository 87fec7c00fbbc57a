r"""Hadamard transform: sums and differences of channels, nothing multiplied.

    y = x (I (x) H),   H = A (x) S_k,   n = m 2^k

on blocks of n channels side by side, with A a Hadamard matrix ``[m, m]`` (entries +-1, ``A A^T = m I``) and Sylvester's

    S_0 = 1,   S_(k+1) = [[S_k, S_k], [S_k, -S_k]]

so that ``H H^T = n I``: H / sqrt(n) is an orthogonal rotation, which spreads an outlier over all channels of its block (QuaRot,
arXiv 2404.00456). The factor 1/n is left to the weights behind. The fast form takes k butterflies, one sum or difference per
channel each, and m - 1 more for A: ``m - 1 + k`` additions per channel, where a dense product has n - 1.

A is 1 by 1 where n is a power of two, else Paley's (1933) for a prime q: of order q + 1 if q = 3 mod 4, of order 2 (q + 1) if
q = 1 mod 4. That gives 12, 20, 28, 36, 44, 60, 68, 72, 76, 84, 108, 140, 148 ... times any power of two, and so the widths of most models.
Orders above 256 are not used: their additions would be as many as those of a dense product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.spike_type import ANALOG, Analog, NodeType

__all__ = ["HADAMARD", "hadamard", "hadamard_core", "hadamard_matrix"]


_LARGEST_CORE = 256


def hadamard_core(n: int) -> tuple[Tensor, int] | None:
    """A and k of ``n = m 2^k`` with the smallest m that is known; None if none is.

    Args:
        n: Number of channels.

    Returns:
        A, ``[m, m]`` in float32 with entries +-1, and k.
    """
    if n < 1:
        return None
    k = (n & -n).bit_length() - 1
    odd = n >> k
    if odd == 1:
        return torch.ones(1, 1), k
    for twos in range(2, k + 1):
        core = _paley(odd << twos) if odd << twos <= _LARGEST_CORE else None
        if core is not None:
            return core, k - twos
    return None


def hadamard_matrix(n: int) -> Tensor:
    """H ``[n, n]`` in float32 with entries +-1 and ``H H^T = n I``.

    Raises:
        ValueError: If this file knows none of that size.
    """
    found = hadamard_core(n)
    if found is None:
        raise ValueError(
            f"no Hadamard matrix of size {n} is known here: it is no power of two times 1 or an order of Paley's up to {_LARGEST_CORE}"
        )
    matrix, k = found
    for _ in range(k):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _paley(order: int) -> Tensor | None:
    """Paley's Hadamard matrix of that order, for primes."""
    q = order - 1
    if q % 4 == 3 and _is_prime(q):  # I + S is one, with S skew-symmetric
        return torch.eye(order) + _bordered(q, skew=True)
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):  # S is symmetric: each entry becomes a block
        signs, ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(_bordered(q, skew=False), signs) + torch.kron(torch.eye(q + 1), ones)
    return None


def _bordered(q: int, skew: bool) -> Tensor:
    """``[[0, 1], [+-1, Q]]`` with the Jacobsthal matrix ``Q[i, j] = chi(i - j)``, chi the quadratic character of the prime q."""
    chi = torch.full((q,), -1.0)
    chi[[x * x % q for x in range(1, q)]] = 1.0
    chi[0] = 0.0
    index = torch.arange(q)
    result = torch.zeros(q + 1, q + 1)
    result[0, 1:], result[1:, 0], result[1:, 1:] = 1.0, -1.0 if skew else 1.0, chi[(index[:, None] - index[None, :]) % q]
    return result


def _check(x: Tensor, core: Tensor, doublings: int) -> None:
    if core.dim() != 2 or core.shape[0] != core.shape[1]:
        raise ValueError(f"a Hadamard matrix is square, and not {list(core.shape)}")
    if doublings < 0 or x.shape[-1] % (core.shape[0] << doublings):
        raise ValueError(
            f"a Hadamard transform of blocks of {core.shape[0]} x 2^{doublings} channels needs a multiple of them, and not {x.shape[-1]}"
        )


def _transformed(x: Tensor, core: Tensor, doublings: int) -> Tensor:
    """The fast form, in plain torch operations."""
    m, size = core.shape[0], 1 << doublings
    y = x.reshape(*x.shape[:-1], -1, size)
    if m > 1:
        y = torch.einsum("...as,ac->...cs", x.reshape(*x.shape[:-1], -1, m, size), core.to(x.dtype))
    for _ in range(doublings):  # every butterfly works on the first bit of the index and moves it to the end
        first, second = y[..., : size // 2], y[..., size // 2 :]
        y = torch.stack((first + second, first - second), -1).flatten(-2)
    return y.reshape(x.shape)


@torch.library.custom_op("ntc::hadamard", mutates_args=())
def hadamard(x: Tensor, core: Tensor, doublings: int) -> Tensor:
    """Transform blocks of channels by ``H = core (x) S_k``; not divided by anything.

    Args:
        x: ``[..., C]``.
        core: A, ``[m, m]`` with entries +-1; C is a multiple of ``m 2^k``.
        doublings: k.

    Returns:
        ``[..., C]``; ``hadamard(x) H^T = n x`` for each block.

    Raises:
        ValueError: If A is not square or the channels are no multiple of the block.
    """
    _check(x, core, doublings)
    result = _transformed(x, core, doublings)
    return result.clone() if result.data_ptr() == x.data_ptr() else result.contiguous()


@hadamard.register_fake
def _fake(x: Tensor, core: Tensor, doublings: int) -> Tensor:
    _check(x, core, doublings)
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, core, ctx.doublings = inputs
    ctx.save_for_backward(core)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """``g H^T``: Sylvester's part is symmetric. The signs are no parameters and have no gradient."""
    (core,) = ctx.saved_tensors
    return _transformed(grad, core.T, ctx.doublings).contiguous(), None, None


hadamard.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    for argument in node.all_input_nodes:
        if not isinstance(type_of(argument), Analog):
            raise TypeMismatch(f"a Hadamard transform takes analog values, and %{argument.name} is {type_of(argument)}", argument)
    return ANALOG


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """Additions and subtractions of real values: an accumulate each."""
    doublings = node.args[2]
    assert isinstance(doublings, int)
    return Counts(acs=result.numel * (operands[1].shape[0] - 1 + doublings))


_ONNX = """
<domain: "ntc", opset_import: ["": 20]>
Hadamard <doublings> (x, core) => (y)
{
    whole = Shape(x)
    order = Shape <start = 0, end = 1> (core)
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    any = Constant <value_ints = [-1]> ()
    pair = Constant <value_ints = [2]> ()
    last = Constant <value_ints = [-1]> ()
    flat = Constant <value_ints = [0]> ()
    k = Constant <value_int: int = @doublings> ()
    length = Pow(two, k)
    size = Unsqueeze(length, flat)
    blocks = Concat <axis = 0> (any, order, size)
    split = Reshape(x, blocks)
    turned = Transpose <perm = [0, 2, 1]> (split)
    mixed = MatMul(turned, core)
    back = Transpose <perm = [0, 2, 1]> (mixed)
    rows = Concat <axis = 0> (any, size)
    start = Reshape(back, rows)
    yes = Equal(one, one)
    done = Loop (k, yes, start) <body = butterfly (int64 tick, bool go, v) => (on, v_next) {
        on = Identity(go)
        first, second = Split <axis = -1, num_outputs = 2> (v)
        sum = Add(first, second)
        difference = Sub(first, second)
        sum_column = Unsqueeze(sum, last)
        difference_column = Unsqueeze(difference, last)
        both = Concat <axis = -1> (sum_column, difference_column)
        v_next = Reshape(both, rows)
    }>
    y = Reshape(done, whole)
}
"""
HADAMARD = register(
    OpSpec(target=torch.ops.ntc.hadamard.default, infer=_infer, count=_count, kind="rotation", onnx=_ONNX, traced=_transformed)
)
