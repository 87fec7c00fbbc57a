"""What the objects of a netlist are made of: numbers, references, ports, and the limits that keep a reader safe.

Everything is strict: a number in quotes is no number, `true` is no 1. No size is above what a network can have, so that a damaged
or hostile file is refused before anybody makes room for what it claims.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypeAliasType

__all__ = [
    "LARGEST", "Argument", "Endpoint", "Integer", "Name", "NonFinite", "Number", "Part", "Port", "Sha256", "Size", "TensorRef",
    "ValueRef", "Width", "described",
]  # fmt: skip

LARGEST = 2**48
"""Of sizes and counts: more than any model has, and far from what Python or numpy could stumble over."""


def described(meaning: str, unit: str = "none", **constraints: Any) -> Any:
    """A field with its meaning and unit, which the schema and docs/netlist.md show."""
    return Field(description=meaning, json_schema_extra={"unit": unit}, **constraints)


class Part(BaseModel):
    """An object of a netlist."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True, protected_namespaces=())


Name = Annotated[str, Field(pattern=r"^\w+$", max_length=1000)]
Endpoint = Annotated[str, Field(pattern=r"^\w+:\w+$", max_length=2000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[
    Annotated[int, Field(ge=0, le=LARGEST)] | Annotated[str, Field(max_length=200)],
    Field(description="A number, or an expression of the sizes B (batch) and L (tokens)."),
]
Width = Annotated[int, Field(ge=1, le=64)]


class TensorRef(Part):
    """A constant tensor where a number or a value could stand too."""

    tensor: str = described("Name in the table `tensors`.")


class ValueRef(Part):
    """A value that the network computes, as argument of a host op."""

    value: str = described("Name of an op earlier in the same island, or of an input of the island.")


class NonFinite(Part):
    """A float that JSON cannot write."""

    float: Literal["inf", "-inf", "nan"] = described("Which one.")


Number = int | float | TensorRef
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)] | TensorRef
Argument = TypeAliasType("Argument", "bool | int | float | str | ValueRef | TensorRef | NonFinite | list[Argument] | None")


class Port(Part):
    """What an output carries."""

    kind: Literal["index", "analog", "integer", "spikes", "current"] = described(
        "`index`: ids, positions, sizes; `analog`: one value per token; `integer`: one integer per token, which stands for that many "
        "times `scale`; `spikes`, `current`: one value per token and step (axis 0)."
    )
    dtype: str = described("Dtype in the reference implementation; of the integer grade one that holds every value.", max_length=20)
    shape: list[Size] = described("Shape; B and L are free.", "elements", max_length=8)
    levels: Literal["binary", "ternary", "graded"] | None = described(
        "Of spikes: values of one step, {0, 1}, {-1, 0, 1}, or those times a factor.", default=None
    )
    scale: Number | None = described(
        "Of the integer grade, for who reads values: n stands for the real number n times it. One number, a tensor [C], or [R, C] for "
        "the token at position i in row i mod R. No executor needs it. Null: not known, or no such integer.", "real units", default=None,
    )
