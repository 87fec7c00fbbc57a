"""The netlist format, version 1.1: what ``netlist.json`` holds, field by field.

A netlist is one directed acyclic graph from the token ids to the logits. Its elements are populations (neurons), projections
(synapses), dynamic products (spiking attention), scales, decodes and host islands (what stays analog). Every element names its
inputs by the outputs of other elements (``"element:port"``), every weight is a reference into ``netlist.safetensors``.

Objects are written in the order of the fields here, tables by name, lists of elements in the order of execution.

    python -m ntc_backends.netlist_schema          # writes netlist.schema.json beside this file, and the tables of docs/netlist.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypeAliasType

__all__ = [
    "FORMAT", "READABLE", "SCHEMA_FILE", "SCHEMA_VERSION", "AnyElement", "Argument", "Blob", "Conventions", "CurrentOutput", "Decode",
    "DynamicProduct", "Element", "Endpoint", "Generator", "HostIsland", "HostOp", "Model", "Netlist", "NonFinite", "Number",
    "PassName", "Population", "PopulationInput", "Port", "ProductInputs", "ProductOutput", "Projection", "ProjectionInput",
    "RowSumInputs", "Scale", "Sink", "Source", "SpikesOutput", "TensorEntry", "TensorRef", "Time", "TrainInput", "TrainOutput",
    "ValueOutput", "ValueRef", "schema_text",
]  # fmt: skip

FORMAT = "ntc-netlist"
SCHEMA_VERSION: Final = "1.1"
"""1.1: potentials v0 and time constants tau may be tensors; dynamic products may leak; scales by table, RMS and row sum."""

READABLE = ("1.0", "1.1")
"""Versions that the reader takes: each field of an older one means the same today."""
SCHEMA_FILE = Path(__file__).with_name("netlist.schema.json")


def _field(meaning: str, unit: str = "none", **constraints: Any) -> Any:
    return Field(description=meaning, json_schema_extra={"unit": unit}, **constraints)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


Endpoint = Annotated[str, Field(pattern=r"^\w+:\w+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int | str, Field(description="A number, or an expression of the sizes B (batch) and L (tokens).")]


class TensorRef(_Part):
    """A constant tensor where a number or a value could stand too."""

    tensor: str = _field("Name in the table `tensors`.")


class ValueRef(_Part):
    """A value that the network computes, as argument of a host op."""

    value: str = _field("Name of an op earlier in the same island, or of an input of the island.")


class NonFinite(_Part):
    """A float that JSON cannot write."""

    float: Literal["inf", "-inf", "nan"] = _field("Which one.")


Number = float | TensorRef
Argument = TypeAliasType("Argument", "bool | int | float | str | ValueRef | TensorRef | NonFinite | list[Argument] | None")


class Generator(_Part):
    """The program that wrote the file."""

    name: Literal["ntc"] = _field("Name of the program.")
    version: str = _field("Its version.")


class Model(_Part):
    """The model that was compiled."""

    source: str = _field("Hub id or name of the folder, never an absolute path.")
    architecture: str = _field("Class of the model.")
    vocab_size: int = _field("Number of token ids; ids run from 0 to one less.", "tokens")
    context: int = _field("Most tokens of one sequence, 0 if not limited.", "tokens")
    parameters: int = _field("Parameters of the original model, tied ones counted once.", "parameters")


class PassName(_Part):
    """One compiler pass."""

    name: str = _field("Name of the pass.")
    sites: int = _field("Places that it rewrote or annotated.", "places")


class Time(_Part):
    """The time axis: T steps are run for every token, and a sequence is L times T steps."""

    steps: int = _field("T, the largest number of time steps of a spike train.", "steps", ge=1)
    dt: float | Literal["step"] = _field("Length of one step; `step` = dimensionless, the chip decides.", "s")


class Conventions(_Part):
    """What other tools leave open."""

    comparison: Literal[">="] = _field("A neuron fires when its membrane potential is `>=` the threshold.")
    reset: Literal["soft", "hard", "mixed"] = _field("Reset of the populations: `soft` subtracts the threshold, `hard` sets to 0.")
    rounding: Literal["float"] = _field("Arithmetic in the dtype of the tensors, IEEE 754 to nearest even, sums in any order.")
    codes: list[Literal["rate", "count", "phase"]] = _field("Spike codes in use; `rate` = the value is the mean over the steps.")
    weight_dtypes: list[str] = _field("Dtypes of the weights of projections.")
    layout: Literal["T,B,L,C"] = _field("Axes of trains: step, batch, token, channel. Analog values lack T.")


class TensorEntry(_Part):
    """One constant tensor. Tensors with the same bytes share a key and are stored once (tied weights)."""

    dtype: str = _field("`float32`, `bfloat16`, `int64` ...")
    shape: list[int] = _field("Shape.", "elements")
    key: str = _field("Key in the safetensors file.")
    sha256: Sha256 = _field("SHA-256 of the raw bytes, row-major, little-endian.")


class Blob(_Part):
    """The safetensors file."""

    file: str = _field("Its name, in the folder of the netlist.")
    bytes: int = _field("Its size.", "bytes")
    sha256: Sha256 = _field("SHA-256 of the whole file.")


class Port(_Part):
    """What an output carries."""

    kind: Literal["index", "analog", "spikes", "current"] = _field(
        "`index`: integers; `analog`: one value per token; `spikes`, `current`: one value per token and step (axis 0)."
    )
    dtype: str = _field("Dtype in the reference implementation.")
    shape: list[Size] = _field("Shape; B and L are free.", "elements")
    levels: Literal["binary", "ternary", "graded"] | None = _field(
        "Of spikes: values of one step, {0, 1}, {-1, 0, 1}, or those times a factor.", default=None
    )


class Element(_Part):
    """What every element has."""

    name: str = _field("Unique name; of anything but a host island the name of its node in the compiler's graph.")
    module: str = _field("Module of the model that it comes from; may be empty.", default="")
    block: str = _field("Transformer block; empty outside of blocks.", default="")
    source: str = _field("Line of the model's source; may be empty.", default="")


class Source(_Part):
    """Where the network starts."""

    name: str = _field("Name of the element; its only output is `ids`.")
    ids: Port = _field("Token ids.", "token ids")


class Sink(_Part):
    """Where the network ends."""

    name: str = _field("Name of the element.")
    logits: Endpoint = _field("Output that holds the logits [B, L, V].", "logits")


class PopulationInput(_Part):
    """Input of a population."""

    current: Endpoint = _field("Input current x.", "membrane units per step")


class SpikesOutput(_Part):
    """Output of a population."""

    spikes: Port = _field("Spikes s(t).", "spikes")


class Population(Element):
    """Neurons of one kind: per token of the sequence `size` neurons, each starting anew from v(0) = v0 threshold."""

    model: Literal["if", "lif"] = _field("Neuron model: integrate and fire, or leaky integrate and fire.")
    role: str = _field("What it is for: `q`, `k`, `v`, `ssa`, `ffn`; may be empty.")
    size: int = _field("Number of neurons for one token.", "neurons", ge=1)
    steps: int = _field("T of this population.", "steps", ge=1)
    threshold: Number = _field("Firing threshold, one number if all are equal, else one per neuron.", "membrane units")
    v0: Number = _field("Membrane potential before the first step, as a fraction of the threshold; as `threshold`.", "thresholds")
    tau: Number | None = _field("Membrane time constant of `lif`, as `threshold`; null for `if`.", "steps", default=None)
    signed: bool = _field("Ternary: a spike of -1 when the membrane is below 0 before the reset.")
    reset: Literal["soft", "hard"] = _field("After a spike: `soft` subtracts threshold times spike, `hard` sets to 0.")
    input: Literal["constant", "timed"] = _field("One current per token, held for all T steps, or one current per step.")
    inputs: PopulationInput = _field("Inputs.")
    outputs: SpikesOutput = _field("Outputs.")


class ProjectionInput(_Part):
    """Input of a projection."""

    pre: Endpoint = _field("Presynaptic values.", "spikes, or analog units")


class CurrentOutput(_Part):
    """Output of a projection."""

    current: Port = _field("Postsynaptic current.", "membrane units per step")


class Projection(Element):
    """All synapses from one place to another: current = weight @ pre + bias, at every step if the input has steps."""

    kind: Literal["dense"] = _field("Connectivity: every pre to every post.")
    synapse: Literal["spikes", "analog"] = _field(
        "`spikes`: events at every step. `analog`: one analog vector per token, which gives a current held for all T steps."
    )
    shape: list[int] = _field("[post, pre], the shape of the weight.", "neurons", min_length=2, max_length=2)
    synapses: int = _field("post times pre.", "synapses")
    weight: str = _field("Tensor [post, pre].", "membrane units per spike or analog unit")
    bias: str | None = _field("Tensor [post], a constant current added at every step, or null.", "membrane units per step")
    inputs: ProjectionInput = _field("Inputs.")
    outputs: CurrentOutput = _field("Outputs.")


class ProductInputs(_Part):
    """Inputs of a dynamic product."""

    query: Endpoint = _field("Spikes Q, heads x head_size channels.", "spikes")
    key: Endpoint = _field("Spikes K, kv_heads x head_size channels.", "spikes")
    value: Endpoint = _field("Spikes V, kv_heads x value_size channels.", "spikes")


class ProductOutput(_Part):
    """Output of a dynamic product."""

    counts: Port = _field("Spike counts Y, heads x value_size channels; integers without a leak.", "coincidences")


class DynamicProduct(Element):
    """Causal spiking attention: plastic synapses M, per key head and step, which spikes write (Hebbian) and read."""

    rule: Literal["M += outer(K, V); Y = Q M", "M = leak M + outer(K, V); Y = Q M"] = _field(
        "For each token in order, at each step: first leak and write, then read; a step sees only the M of the same step."
    )
    leak: Number | None = _field(
        "What is left of M after a token, in (0, 1]: one number, or a tensor [kv_heads] (one per M) or [kv_heads D] (one per row of "
        "M, which is a channel of K). Null: everything.", "1", default=None,
    )
    heads: int = _field("Query heads; head h reads the M of key head h * kv_heads // heads.", "heads", ge=1)
    kv_heads: int = _field("Key and value heads, each with its own M.", "heads", ge=1)
    head_size: int = _field("D, channels of Q and K per head; head h holds channels h D to (h + 1) D - 1.", "channels", ge=1)
    value_size: int = _field("Dv, channels of V and Y per head.", "channels", ge=1)
    steps: int = _field("T.", "steps", ge=1)
    state_shape: list[int] = _field("[T, kv_heads, D, Dv], shape of M for one sequence; zeros before its first token.", "elements")
    max_state: int | None = _field("Bound of |M| after `context` tokens; null if not limited.", "coincidences")
    max_count: int | None = _field("Bound of |Y| after `context` tokens; null if not limited.", "coincidences")
    inputs: ProductInputs = _field("Inputs.")
    outputs: ProductOutput = _field("Outputs.")


class TrainInput(_Part):
    """Input of a scale or decode."""

    train: Endpoint = _field("Spikes or currents.", "spikes, or membrane units per step")


class TrainOutput(_Part):
    """Output of a scale."""

    train: Port = _field("The scaled train.", "spikes x factor, or membrane units per step")


class RowSumInputs(_Part):
    """Inputs of a row-sum scale."""

    train: Endpoint = _field("Counts Y of spiking attention.", "coincidences")
    query: Endpoint = _field("Spikes Q of the same attention.", "spikes")
    key: Endpoint = _field("Spikes K of the same attention.", "spikes")


class Scale(Element):
    """A gain on a train, the same for all steps of a token; `position`, `table` and `constant` are known at compile time."""

    kind: Literal["position", "table", "rms", "row-sum", "constant"] = _field(
        "`position`: divide by i + 1 for the token at position i = 0, 1 ...; `table`: multiply head h by `factor`[h, i]; `rms`: divide "
        "each head by sqrt(mean over its channels of (mean over the steps)^2 + eps); `row-sum`: divide each head by max(abs(z), 1) with "
        "z = mean over the steps of Q_i . (sum over j <= i of K_j); `constant`: multiply by `factor`."
    )
    factor: Number | None = _field(
        "Of `constant`: a tensor broadcasts against [B, L, C] from the right. Of `table`: tensor [heads, context]. Else null.", "1"
    )
    heads: int | None = _field("Of `table`, `rms` and `row-sum`: heads, channels as of a dynamic product.", "heads", default=None)
    kv_heads: int | None = _field("Of `row-sum`: key heads, as of a dynamic product.", "heads", default=None)
    eps: float | None = _field("Of `rms`.", "squared train units", default=None)
    inputs: TrainInput | RowSumInputs = _field("Inputs; of a `row-sum` scale also queries and keys.")
    outputs: TrainOutput = _field("Outputs.")


class ValueOutput(_Part):
    """Output of a decode."""

    value: Port = _field("The decoded value.", "analog units")


class Decode(Element):
    """From a train to one analog value per token: value = sum over t of step_weights[t] train[t]."""

    code: Literal["rate", "count", "phase"] = _field("Spike code of the train.")
    step_weights: list[float] = _field("Weight of each step; 1/T each for the rate code.", "1")
    inputs: TrainInput = _field("Inputs.")
    outputs: ValueOutput = _field("Outputs.")


class HostOp(_Part):
    """One analog op."""

    name: str = _field("Unique name of the op and of its result.")
    op: str = _field("Operator with namespace and overload: `aten.layer_norm.default`, `ntc.attention.default`, `operator.getitem`.")
    module: str = _field("Module of the model that it comes from; may be empty.", default="")
    source: str = _field("Line of the model's source; may be empty.", default="")
    arguments: dict[str, Argument] = _field("Arguments in the order of the operator's signature, defaults included.")


class HostIsland(Element):
    """A maximal connected group of analog ops between two crossings; runs on the host (or an analog-capable core)."""

    ops: list[HostOp] = _field("Ops in the order of execution.", min_length=1)
    inputs: dict[str, Endpoint] = _field("Values from other elements, by the name that `arguments` use.")
    outputs: dict[str, Port] = _field("Results that other elements use, by the name of their op.")


class Netlist(_Part):
    """A compiled network."""

    format: Literal["ntc-netlist"] = _field("Name of the format.")
    schema_version: Literal["1.0", "1.1"] = _field("Version of this schema, major.minor.")
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
    host: list[HostIsland] = _field("What stays analog.")
    tensors: dict[str, TensorEntry] = _field("Constant tensors by name.")
    blob: Blob = _field("The file that holds them.")

    def elements(self) -> Iterator[AnyElement]:
        """All elements but input and output, table by table."""
        for table in (self.populations, self.projections, self.dynamic_products, self.scales, self.decodes, self.host):
            yield from table


AnyElement = Population | Projection | DynamicProduct | Scale | Decode | HostIsland


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
