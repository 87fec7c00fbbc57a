"""The netlist format, version 1.2: what ``netlist.json`` holds, field by field.

A netlist is one directed acyclic graph from the token ids to the logits. Its elements are populations (neurons), projections
(synapses), dynamic products (spiking attention), scales, decodes and host islands (what stays analog). Every element names its
inputs by the outputs of other elements (``"element:port"``), every weight is a reference into ``netlist.safetensors``.

Objects are written in the order of the fields here, tables by name, lists of elements in the order of execution. The elements are in
``netlist_elements``, what they are made of in ``netlist_fields``; nothing here imports torch.

    python -m ntc_backends.netlist_schema          # writes netlist.schema.json beside this file, and the tables of docs/netlist.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from ntc_backends.netlist_elements import (
    AnyElement,
    CurrentOutput,
    Decode,
    DynamicProduct,
    Element,
    HostIsland,
    HostOp,
    Population,
    PopulationInput,
    ProductInputs,
    ProductOutput,
    Projection,
    ProjectionInput,
    RowSumInputs,
    Scale,
    SpikesOutput,
    TrainInput,
    TrainOutput,
    ValueOutput,
)
from ntc_backends.netlist_fields import (
    LARGEST,
    Argument,
    Endpoint,
    Integer,
    Name,
    NonFinite,
    Number,
    Part,
    Port,
    Sha256,
    TensorRef,
    ValueRef,
)
from ntc_backends.netlist_fields import described as _field

__all__ = [
    "FORMAT", "READABLE", "SCHEMA_FILE", "SCHEMA_VERSION", "AnyElement", "Argument", "Blob", "Conventions", "CurrentOutput", "Decode",
    "DynamicProduct", "Element", "Endpoint", "Generator", "HostIsland", "HostOp", "Integer", "Model", "Netlist", "NonFinite", "Number",
    "PassName", "Population", "PopulationInput", "Port", "ProductInputs", "ProductOutput", "Projection", "ProjectionInput",
    "RowSumInputs", "Scale", "Sink", "Source", "SpikesOutput", "TensorEntry", "TensorRef", "Time", "TrainInput", "TrainOutput",
    "ValueOutput", "ValueRef", "schema_text",
]  # fmt: skip

FORMAT = "ntc-netlist"
SCHEMA_VERSION: Final = "1.2"
"""1.1: potentials v0 and time constants tau may be tensors; dynamic products may leak; scales by table, RMS and row sum.
1.2: the integer grade."""

READABLE = ("1.0", "1.1", "1.2")
"""Versions that the reader takes: each field of an older one means the same today."""
SCHEMA_FILE = Path(__file__).with_name("netlist.schema.json")


class Generator(Part):
    """The program that wrote the file."""

    name: Literal["ntc"] = _field("Name of the program.")
    version: str = _field("Its version.")


class Model(Part):
    """The model that was compiled."""

    source: str = _field("Hub id or name of the folder, never an absolute path.")
    architecture: str = _field("Class of the model.")
    vocab_size: int = _field("Number of token ids; ids run from 0 to one less.", "tokens", ge=0, le=LARGEST)
    context: int = _field("Most tokens of one sequence, 0 if not limited.", "tokens", ge=0, le=LARGEST)
    parameters: int = _field("Parameters of the original model, tied ones counted once.", "parameters", ge=0, le=LARGEST)


class PassName(Part):
    """One compiler pass."""

    name: str = _field("Name of the pass.")
    sites: int = _field("Places that it rewrote or annotated.", "places")


class Time(Part):
    """The time axis: T steps are run for every token, and a sequence is L times T steps."""

    steps: int = _field("T, the largest number of time steps of a spike train.", "steps", ge=1)
    dt: float | Literal["step"] = _field("Length of one step; `step` = dimensionless, the chip decides.", "s")


class Conventions(Part):
    """What other tools leave open."""

    comparison: Literal[">="] = _field("A neuron fires when its membrane potential is `>=` the threshold.")
    reset: Literal["soft", "hard", "mixed"] = _field("Reset of the populations: `soft` subtracts the threshold, `hard` sets to 0.")
    rounding: Literal["float", "integer"] = _field(
        "`float`: arithmetic in the dtype of the tensors, IEEE 754 to nearest even, sums in any order. `integer`: exact; round(a / 2^k) "
        "= (a + 2^(k-1)) >> k with an arithmetic shift, nothing added for k = 0; round(a / b) = floor((a + floor(b / 2)) / b)."
    )
    codes: list[Literal["rate", "count", "phase"]] = _field(
        "Spike codes in use; `rate` = the value is the mean over the steps, `count` = the sum."
    )
    weight_dtypes: list[str] = _field("Dtypes of the weights of projections.")
    layout: Literal["T,B,L,C"] = _field("Axes of trains: step, batch, token, channel. Values without steps lack T.")


class TensorEntry(Part):
    """One constant tensor. Tensors with the same bytes share a key and are stored once (tied weights)."""

    dtype: str = _field("`float32`, `bfloat16`, `int8`, `int64` ...")
    shape: list[int] = _field("Shape.", "elements", max_length=8)
    key: str = _field("Key in the safetensors file.")
    sha256: Sha256 = _field("SHA-256 of the raw bytes, row-major, little-endian.")


class Blob(Part):
    """The safetensors file."""

    file: str = _field("Its name, in the folder of the netlist: no path.", pattern=r"^\w[\w.-]*$", max_length=200)
    bytes: int = _field("Its size.", "bytes", ge=0, le=LARGEST)
    sha256: Sha256 = _field("SHA-256 of the whole file.")


class Source(Part):
    """Where the network starts."""

    name: Name = _field("Name of the element; its only output is `ids`.")
    ids: Port = _field("Token ids.", "token ids")


class Sink(Part):
    """Where the network ends."""

    name: Name = _field("Name of the element.")
    logits: Endpoint = _field("Output that holds the logits [B, L, V].", "logits")


class Netlist(Part):
    """A compiled network."""

    format: Literal["ntc-netlist"] = _field("Name of the format.")
    schema_version: Literal["1.0", "1.1", "1.2"] = _field("Version of this schema, major.minor.")
    generator: Generator = _field("The program that wrote the file.")
    model: Model = _field("The model that was compiled.")
    history: list[PassName] = _field("Compiler passes, oldest first.")
    time: Time = _field("The time axis.")
    conventions: Conventions = _field("What other tools leave open.")
    input: Source = _field("Where the network starts.")
    output: Sink = _field("Where the network ends.")
    order: list[str] = _field("Names of all elements but input and output, in an order in which they can run.")
    populations: list[Population] = _field("Neurons.")
    projections: list[Projection] = _field("Synapses.")
    dynamic_products: list[DynamicProduct] = _field("Products of two trains.")
    scales: list[Scale] = _field("Gains.")
    decodes: list[Decode] = _field("From trains to values.")
    host: list[HostIsland] = _field("What stays analog, or is computed in integers but with no neuron.")
    tensors: dict[str, TensorEntry] = _field("Constant tensors by name.")
    blob: Blob = _field("The file that holds them.")

    def elements(self) -> Iterator[AnyElement]:
        """All elements but input and output, table by table."""
        for table in (self.populations, self.projections, self.dynamic_products, self.scales, self.decodes, self.host):
            yield from table


def schema_text() -> str:
    """The published JSON Schema (draft 2020-12)."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:ntc:netlist:{SCHEMA_VERSION}",
        **Netlist.model_json_schema(mode="serialization"),
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    from ntc_backends.netlist_docs import renew_file  # reads this module

    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    page = Path(__file__).parents[2] / "docs" / "netlist.md"
    if page.is_file():  # not in an installed package
        renew_file(page)
