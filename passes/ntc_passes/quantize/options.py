"""The options of quantize."""

from __future__ import annotations

from dataclasses import dataclass

from ntc_passes.replace_attention.options import check_switch

__all__ = ["WEIGHT_BITS", "Options"]

WEIGHT_BITS = (4, 8, 16)
"""Widths of weights that there are."""


@dataclass(frozen=True)
class Options:
    """Options of ``quantize``.

    Attributes:
        weight_bits: Bits of a weight: 4, 8 or 16, symmetric, with one scale per output channel. 4 bits are stored as int8.
        activation_bits: Bits of what comes out of a norm, a lookup or a decoded train, 4 to 16, symmetric, one scale per site.
        error_compensation: Whether the rounding error of a column of weights is made up for by the columns after it (GPTQ).
        bias_correction: Whether biases make up for the mean error of their layer.
        tokens: Most calibration tokens that are used (one window at least).
    """

    weight_bits: int = 8
    activation_bits: int = 8
    error_compensation: bool = True
    bias_correction: bool = True
    tokens: int = 4096

    def __post_init__(self) -> None:
        if type(self.weight_bits) is not int or self.weight_bits not in WEIGHT_BITS:
            raise ValueError(f"weight_bits must be 4, 8 or 16, got {self.weight_bits!r}")
        if type(self.activation_bits) is not int or not 4 <= self.activation_bits <= 16:
            raise ValueError(f"activation_bits must be a whole number from 4 to 16, got {self.activation_bits!r}")
        for name in ("error_compensation", "bias_correction"):
            check_switch(name, getattr(self, name))
        if type(self.tokens) is not int or self.tokens < 1:
            raise ValueError(f"tokens must be a whole number of at least 1, got {self.tokens!r}")

    @property
    def weight_limit(self) -> int:
        """Largest weight: 7, 127 or 32767."""
        return (1 << (self.weight_bits - 1)) - 1

    @property
    def activation_limit(self) -> int:
        """Largest activation, 127 for 8 bits."""
        return (1 << (self.activation_bits - 1)) - 1
