"""The ATen ops of host islands in numpy, by name, with the arguments that a netlist writes (docs/netlist.md).

Two rules of torch are not those of numpy: an integer tensor with a floating-point one gives the dtype of the latter, and an integer tensor
with a fraction, or divided, gives float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import erf

from ntc_backends.simulator.attention import softmax
from ntc_backends.simulator.piece import Array, TokenCount

__all__ = ["ATEN_OPS", "MIXES_TOKENS"]

MIXES_TOKENS = frozenset({
    "aten.matmul.default", "aten.bmm.default", "aten.tril.default", "aten.masked_fill.Scalar", "aten.scaled_dot_product_attention.default",
})  # fmt: skip
"""Ops that could look at other tokens, so that a piece of the sequence is not enough for them."""

_DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float32, "bfloat16": np.float32, "int64": np.int64, "int32": np.int32,
    "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
}  # fmt: skip


def _dtype(name: str | None, default: Any) -> Any:
    return default if name is None else _DTYPES[name]


def _pair(a: Any, b: Any) -> tuple[Any, Any]:
    """Both operands in the dtype that torch gives the result."""
    arrays = [x for x in (a, b) if isinstance(x, np.ndarray)]
    floating = [x.dtype for x in arrays if np.issubdtype(x.dtype, np.floating)]
    if floating:
        dtype: Any = max(floating, key=lambda d: d.itemsize)
    elif any(isinstance(x, float) for x in (a, b)):
        dtype = np.dtype(np.float32)
    else:
        return a, b
    return (np.asarray(a).astype(dtype, copy=False), np.asarray(b).astype(dtype, copy=False))


def _arithmetic(compute: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def op(self: Any, other: Any, alpha: Any = 1) -> Any:
        a, b = _pair(self, other)
        return compute(a, b if alpha == 1 else b * alpha)

    return op


def _divide(self: Any, other: Any) -> Any:
    a, b = _pair(self, other)
    exact = np.issubdtype(np.asarray(a).dtype, np.integer)
    return np.asarray(a).astype(np.float32) / np.asarray(b).astype(np.float32) if exact else a / b


def _power(self: Array, exponent: float) -> Array:
    base, power = _pair(self, exponent)
    return np.asarray(np.power(base, power))


def _floating(function: Callable[[Array], Any]) -> Callable[..., Array]:
    def op(self: Array) -> Array:
        x = self if np.issubdtype(self.dtype, np.floating) else self.astype(np.float32)
        return np.asarray(function(x), dtype=x.dtype)

    return op


def _arange(start: Any, end: Any, dtype: str | None) -> Array:
    """Positions go on where the piece before ended."""
    before = end.before if isinstance(end, TokenCount) else 0
    whole = isinstance(start, int) and isinstance(end, int)
    if not end - start <= 1 << 24:
        raise ValueError(f"a range of {end - start} numbers is longer than any sequence")
    return np.arange(start + before, end + before, dtype=_dtype(dtype, np.int64 if whole else np.float32))


def _layer_norm(input: Array, normalized_shape: Sequence[int], weight: Array | None, bias: Array | None, eps: float) -> Array:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdims=True)
    scaled = centred / np.sqrt((centred * centred).mean(axes, keepdims=True) + input.dtype.type(eps))
    return _affine(scaled, weight, bias)


def _rms_norm(input: Array, normalized_shape: Sequence[int], weight: Array | None, eps: float | None) -> Array:
    axes = tuple(range(-len(normalized_shape), 0))
    smallest = float(np.finfo(input.dtype).eps) if eps is None else eps
    return _affine(input / np.sqrt((input * input).mean(axes, keepdims=True) + input.dtype.type(smallest)), weight, None)


def _affine(x: Array, weight: Array | None, bias: Array | None) -> Array:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _linear(input: Array, weight: Array, bias: Array | None) -> Array:
    return _affine(input @ weight.T, None, bias)


def _addmm(self: Array, mat1: Array, mat2: Array, beta: float, alpha: float) -> Array:
    product = mat1 @ mat2
    return np.asarray((self if beta == 1 else self * beta) + (product if alpha == 1 else product * alpha))


def _embedding(weight: Array, indices: Array, **unused: Any) -> Array:
    if indices.size and not 0 <= indices.min() <= indices.max() < len(weight):
        raise IndexError(f"row {indices.max()} of a table of {len(weight)}")
    return np.asarray(weight[indices])


def _gelu(self: Array, approximate: str) -> Array:
    x = self
    if approximate == "tanh":
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))), dtype=x.dtype)
    return np.asarray(0.5 * x * (1 + erf(x * math.sqrt(0.5))), dtype=x.dtype)


def _sigmoid(x: Array) -> Array:
    return np.asarray(np.where(x >= 0, 1, np.exp(-np.abs(x))) / (1 + np.exp(-np.abs(x))))


def _slice(self: Array, dim: int, start: int | None, end: int | None, step: int) -> Array:
    index = [slice(None)] * self.ndim
    index[dim] = slice(start, end, step)
    return np.asarray(self[tuple(index)])


def _split(self: Array, split_size: int, dim: int) -> list[Array]:
    return np.split(self, range(split_size, self.shape[dim], split_size), axis=dim)


def _split_with_sizes(self: Array, split_sizes: Sequence[int], dim: int) -> list[Array]:
    return np.split(self, np.cumsum(split_sizes)[:-1].tolist(), axis=dim)


def _chunk(self: Array, chunks: int, dim: int) -> list[Array]:
    return _split(self, -(-self.shape[dim] // chunks), dim)


def _expand(self: Array, size: Sequence[int], implicit: bool = False) -> Array:
    padded = (1,) * (len(size) - self.ndim) + self.shape
    return np.broadcast_to(self, tuple(have if want == -1 else want for have, want in zip(padded, size, strict=True)))


def _unflatten(self: Array, dim: int, sizes: Sequence[int]) -> Array:
    at = dim % self.ndim
    return self.reshape(*self.shape[:at], *sizes, *self.shape[at + 1 :])


def _flatten(self: Array, start_dim: int, end_dim: int) -> Array:
    first, last = start_dim % self.ndim, end_dim % self.ndim
    return self.reshape(*self.shape[:first], -1, *self.shape[last + 1 :])


def _filled(size: Sequence[int], value: Any, dtype: str | None) -> Array:
    if math.prod(size) > 1 << 28:
        raise ValueError(f"a constant of shape {list(size)} is larger than any mask")
    return np.full(tuple(size), value, dtype=_dtype(dtype, np.float32 if isinstance(value, float) else np.int64))


def _index(self: Array, indices: Sequence[Array | None]) -> Array:
    return np.asarray(self[tuple(slice(None) if i is None else i for i in indices)])


def _masked_fill(self: Array, mask: Array, value: float) -> Array:
    return np.where(mask, self.dtype.type(value), self)


def _sdpa(
    query: Array, key: Array, value: Array, attn_mask: Array | None, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool = False,
) -> Array:  # fmt: skip
    if enable_gqa:
        key, value = (np.repeat(x, query.shape[-3] // x.shape[-3], axis=-3) for x in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.swapaxes(-1, -2) * query.dtype.type(factor)
    if is_causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], dtype=bool)), scores, -np.inf)
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == np.bool_ else scores + attn_mask
    return np.asarray(softmax(scores, -1) @ value, dtype=query.dtype)


def _mean(self: Array, dim: Sequence[int] | None, keepdim: bool, dtype: str | None) -> Array:
    return np.asarray(self.mean(None if dim is None else tuple(dim), keepdims=keepdim))


def _cast(self: Array, dtype: str | None, **unused: Any) -> Array:
    return self.astype(_dtype(dtype, self.dtype), copy=False)


def _same(self: Array, **unused: Any) -> Array:
    return self


ATEN_OPS: dict[str, Callable[..., Any]] = {
    # Arithmetic.
    "aten.add.Tensor": _arithmetic(lambda a, b: a + b),
    "aten.sub.Tensor": _arithmetic(lambda a, b: a - b),
    "aten.mul.Tensor": _arithmetic(lambda a, b: a * b),
    "aten.div.Tensor": _divide,
    "aten.pow.Tensor_Scalar": _power,
    "aten.neg.default": lambda self: -self,
    "aten.exp.default": _floating(np.exp),
    "aten.sin.default": _floating(np.sin),
    "aten.cos.default": _floating(np.cos),
    "aten.tanh.default": _floating(np.tanh),
    "aten.erf.default": _floating(erf),
    "aten.rsqrt.default": _floating(lambda x: 1 / np.sqrt(x)),
    "aten.sigmoid.default": _floating(_sigmoid),
    "aten.silu.default": _floating(lambda x: x * _sigmoid(x)),
    "aten.relu.default": lambda self: np.maximum(self, 0),
    "aten.gelu.default": _gelu,
    "aten.mean.dim": _mean,
    "aten.softmax.int": lambda self, dim, dtype=None: softmax(_cast(self, dtype), dim),
    "aten._softmax.default": lambda self, dim, half_to_float=False: softmax(self, dim),
    "aten.masked_fill.Scalar": _masked_fill,
    # Layers.
    "aten.embedding.default": _embedding,
    "aten.layer_norm.default": _layer_norm,
    "aten.rms_norm.default": _rms_norm,
    "aten.linear.default": _linear,
    "aten.matmul.default": lambda self, other: self @ other,
    "aten.mm.default": lambda self, mat2: self @ mat2,
    "aten.bmm.default": lambda self, mat2: self @ mat2,
    "aten.addmm.default": _addmm,
    "aten.scaled_dot_product_attention.default": _sdpa,
    # Shapes. Sizes are computed where the piece of the sequence is known (host.py).
    "aten.sym_size.int": lambda self, dim: self.shape[dim],
    "aten.arange.default": lambda end, dtype: _arange(0, end, dtype),
    "aten.arange.start": _arange,
    "aten.unsqueeze.default": lambda self, dim: np.expand_dims(self, dim),
    "aten.squeeze.dim": lambda self, dim: np.squeeze(self, dim) if self.shape[dim] == 1 else self,
    "aten.view.default": lambda self, size: self.reshape(tuple(size)),
    "aten._unsafe_view.default": lambda self, size: self.reshape(tuple(size)),
    "aten.reshape.default": lambda self, shape: self.reshape(tuple(shape)),
    "aten.flatten.using_ints": _flatten,
    "aten.unflatten.int": _unflatten,
    "aten.transpose.int": lambda self, dim0, dim1: np.swapaxes(self, dim0, dim1),
    "aten.permute.default": lambda self, dims: np.transpose(self, dims),
    "aten.t.default": lambda self: self.T,
    "aten.expand.default": _expand,
    "aten.slice.Tensor": _slice,
    "aten.select.int": lambda self, dim, index: np.take(self, index, axis=dim),
    "aten.index.Tensor": _index,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split_with_sizes,
    "aten.chunk.default": _chunk,
    "aten.cat.default": lambda tensors, dim: np.concatenate(tensors, axis=dim),
    "aten.contiguous.default": _same,
    "aten.clone.default": _same,
    "aten.to.dtype": _cast,
    "aten._to_copy.default": _cast,
    "aten.full.default": lambda size, fill_value, dtype: _filled(size, fill_value, dtype),
    "aten.ones.default": lambda size, dtype: _filled(size, 1.0, dtype),
    "aten.zeros.default": lambda size, dtype: _filled(size, 0.0, dtype),
    "aten.tril.default": lambda self, diagonal: np.tril(self, diagonal),
}
