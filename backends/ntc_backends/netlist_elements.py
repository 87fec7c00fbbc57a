"""The elements of a netlist: populations, projections, dynamic products, scales, decodes, host islands.

Each has a floating-point and an integer form (``conventions.rounding`` of the netlist says which it is made of); fields of one
form are null in the other.
"""

from __future__ import annotations

from typing import Final, Literal

from ntc_backends.netlist_fields import LARGEST, Argument, Endpoint, Integer, Name, Number, Part, Port, Width, described

__all__ = [
    "LAZY", "LEAKY", "PLAIN", "AnyElement", "CurrentOutput", "Decode", "DynamicProduct", "Element", "HostIsland", "HostOp",
    "Population", "PopulationInput", "ProductInputs", "ProductOutput", "Projection", "ProjectionInput", "RowSumInputs", "Scale",
    "SpikesOutput", "TrainInput", "TrainOutput", "ValueOutput",
]  # fmt: skip

MOST_STEPS = 2**16
MOST_HEADS = 2**20


class Element(Part):
    """What every element has."""

    name: Name = described("Unique name; of anything but a host island the name of its node in the compiler's graph.")
    module: str = described("Module of the model that it comes from; may be empty.", default="")
    block: str = described("Transformer block; empty outside of blocks.", default="")
    source: str = described("Line of the model's source; may be empty.", default="")


class PopulationInput(Part):
    """Input of a population."""

    current: Endpoint = described("Input current x.", "membrane units per step")


class SpikesOutput(Part):
    """Output of a population."""

    spikes: Port = described("Spikes s(t).", "spikes")


class Population(Element):
    """Neurons of one kind: per token of the sequence `size` neurons, each starting anew from v(0)."""

    model: Literal["if", "lif"] = described("Neuron model: integrate and fire, or leaky integrate and fire.")
    role: str = described("What it is for: `q`, `k`, `v`, `ssa`, `ffn`; may be empty.")
    size: int = described("Number of neurons for one token.", "neurons", ge=1, le=LARGEST)
    steps: int = described("T of this population.", "steps", ge=1, le=MOST_STEPS)
    threshold: Number = described("Firing threshold > 0, one number if all are equal, else one per neuron.", "membrane units")
    v0: Number | None = described(
        "Membrane potential before the first step, as a fraction of the threshold in [0, 1]; as `threshold`. Null if `start` says it.",
        "thresholds",
    )
    start: Integer | None = described(
        "Of the integer grade: membrane potential before the first step, 0 to the threshold; as `threshold`. Else null.", "membrane units",
        default=None,
    )
    tau: Number | None = described("Membrane time constant of `lif`, as `threshold`; null for `if`.", "steps", default=None)
    signed: bool = described("Ternary: a spike of -1 when the membrane is below 0 before the reset.")
    reset: Literal["soft", "hard"] = described("After a spike: `soft` subtracts threshold times spike, `hard` sets to 0.")
    input: Literal["constant", "timed"] = described("One current per token, held for all T steps, or one current per step.")
    membrane_bits: Width | None = described(
        "Of the integer grade: width of a two's complement register that holds the membrane, before and after the reset, for any token "
        "ids; proven. Null: not known, or floating point.", "bits", default=None,
    )
    inputs: PopulationInput = described("Inputs.")
    outputs: SpikesOutput = described("Outputs.")


class ProjectionInput(Part):
    """Input of a projection."""

    pre: Endpoint = described("Presynaptic values.", "spikes, spike counts, or analog units")


class CurrentOutput(Part):
    """Output of a projection."""

    current: Port = described("Postsynaptic current.", "membrane units per step")


class Projection(Element):
    """All synapses from one place to another: current = weight @ pre + bias, at every step if the input has steps."""

    kind: Literal["dense"] = described("Connectivity: every pre to every post.")
    synapse: Literal["spikes", "analog", "counts"] = described(
        "`spikes`: events at every step. `analog`: one vector of values per token, which gives a current held for all T steps. `counts`: "
        "one vector of spike counts per token, the sum of a train over its steps: adding a weight at each spike gives the same."
    )
    shape: list[int] = described("[post, pre], the shape of the weight.", "neurons", min_length=2, max_length=2)
    synapses: int = described("post times pre.", "synapses")
    weight: str = described("Tensor [post, pre].", "membrane units per spike or analog unit")
    bias: str | None = described(
        "Tensor [post], a constant current added at every step (`counts`: once), or null.", "membrane units per step"
    )
    weight_bits: Width | None = described(
        "Of the integer grade: bits of the largest weight, two's complement. Null: floating point.", "bits", default=None
    )
    accumulator_bits: Width | None = described(
        "Of the integer grade: width of a two's complement register that holds the sum, in any order, with the bias, for any token ids; "
        "proven. Null: not known, or floating point.", "bits", default=None,
    )
    inputs: ProjectionInput = described("Inputs.")
    outputs: CurrentOutput = described("Outputs.")


class ProductInputs(Part):
    """Inputs of a dynamic product."""

    query: Endpoint = described("Spikes Q, heads x head_size channels.", "spikes")
    key: Endpoint = described("Spikes K, kv_heads x head_size channels.", "spikes")
    value: Endpoint = described("Spikes V, kv_heads x value_size channels.", "spikes")


class ProductOutput(Part):
    """Output of a dynamic product."""

    counts: Port = described("Spike counts Y, heads x value_size channels; integers without a leak.", "coincidences")


PLAIN: Final = "M += outer(K, V); Y = Q M"
LEAKY: Final = "M = leak M + outer(K, V); Y = Q M"
LAZY: Final = "if r = 0 and i > 0: M = round(M renewal / 2^shift); M += growth[r] outer(K, V); Y = Q M"


class DynamicProduct(Element):
    """Causal spiking attention: plastic synapses M, per key head and step, which spikes write (Hebbian) and read."""

    rule: Literal[
        "M += outer(K, V); Y = Q M", "M = leak M + outer(K, V); Y = Q M",
        "if r = 0 and i > 0: M = round(M renewal / 2^shift); M += growth[r] outer(K, V); Y = Q M",
    ] = described(
        "For each token i = 0, 1 ... in order, at each step: first leak (or renew) and write, then read; a step sees only the M of the "
        "same step. r = i mod R, R the period of `growth`."
    )  # fmt: skip
    leak: Number | None = described(
        "What is left of M after a token, in (0, 1]: one number, or a tensor [kv_heads] (one per M) or [kv_heads D] (one per row of "
        "M, which is a channel of K). Null: everything, or `renewal` says it.", "1", default=None,
    )
    growth: Integer | None = described(
        "Of the third rule: weight with which a key is written, by r = i mod R: a tensor [kv_heads, R] or [1, R], R a power of two, or one "
        "number if all are equal (R = 1). Else null.", "1", default=None,
    )
    renewal: Integer | None = described(
        "Of the third rule: what is left of M after R tokens, times 2^shift: one number or a tensor [kv_heads]. Null: everything.",
        "2^-shift", default=None,
    )
    shift: int | None = described("Of the third rule: binary places of `renewal`. Else null.", "bits", default=None, ge=0, le=62)
    heads: int = described("Query heads; head h reads the M of key head h * kv_heads // heads.", "heads", ge=1, le=MOST_HEADS)
    kv_heads: int = described("Key and value heads, each with its own M.", "heads", ge=1, le=MOST_HEADS)
    head_size: int = described("D, channels of Q and K per head; head h holds channels h D to (h + 1) D - 1.", "channels", ge=1, le=LARGEST)
    value_size: int = described("Dv, channels of V and Y per head.", "channels", ge=1, le=LARGEST)
    steps: int = described("T.", "steps", ge=1, le=MOST_STEPS)
    state_shape: list[int] = described("[T, kv_heads, D, Dv], shape of M for one sequence; zeros before its first token.", "elements")
    max_state: int | None = described("Bound of |M| after `context` tokens; null if not limited.", "coincidences", ge=0)
    max_count: int | None = described("Bound of |Y| after `context` tokens; null if not limited.", "coincidences", ge=0)
    state_bits: Width | None = described(
        "Of the integer grade: width of a two's complement register for an element of M; proven. Null: not known, or floating point.",
        "bits", default=None,
    )
    count_bits: Width | None = described("Of the integer grade: the same for an element of Y.", "bits", default=None)
    inputs: ProductInputs = described("Inputs.")
    outputs: ProductOutput = described("Outputs.")


class TrainInput(Part):
    """Input of a scale or decode."""

    train: Endpoint = described("Spikes or currents.", "spikes, or membrane units per step")


class TrainOutput(Part):
    """Output of a scale."""

    train: Port = described("The scaled train.", "spikes x factor, or membrane units per step")


class RowSumInputs(Part):
    """Inputs of a row-sum scale."""

    train: Endpoint = described("Counts Y of spiking attention.", "coincidences")
    query: Endpoint = described("Spikes Q of the same attention.", "spikes")
    key: Endpoint = described("Spikes K of the same attention.", "spikes")


class Scale(Element):
    """A gain on a train, the same for all steps of a token; all but `rms` and `row-sum` are known at compile time."""

    kind: Literal["position", "table", "rms", "row-sum", "constant", "requantize"] = described(
        "`position`: divide by i + 1 for the token at position i = 0, 1 ...; `table`: multiply head h by `factor`[h, i]; `rms`: divide "
        "each head by sqrt(mean over its channels of (mean over the steps)^2 + eps); `row-sum`: divide each head by max(abs(z), 1) with "
        "z = mean over the steps of Q_i . (sum over j <= i of K_j); `constant`: multiply by `factor`; `requantize`: "
        "clamp(round(x `multiplier` / 2^`shift`), `low`, `high`) in integers."
    )
    factor: Number | None = described(
        "Of `constant`: a tensor broadcasts against [B, L, C] from the right. Of `table`: tensor [heads, context]. Else null.", "1"
    )
    heads: int | None = described(
        "Of `table`, `rms` and `row-sum`: heads, channels as of a dynamic product.", "heads", default=None, ge=1, le=MOST_HEADS
    )
    kv_heads: int | None = described("Of `row-sum`: key heads, as of a dynamic product.", "heads", default=None, ge=1, le=MOST_HEADS)
    eps: float | None = described("Of `rms`.", "squared train units", default=None, ge=0)
    multiplier: Integer | None = described(
        "Of `requantize`: one number, or a tensor [C], or [R, C] for the token at position i in row i mod R. Else null.", "2^-shift",
        default=None,
    )
    shift: int | None = described("Of `requantize`: binary places of `multiplier`. Else null.", "bits", default=None, ge=0, le=62)
    low: int | None = described("Of `requantize`: least result. Else null.", "steps of the result", default=None, ge=-(2**31), lt=2**31)
    high: int | None = described("Of `requantize`: largest result. Else null.", "steps of the result", default=None, ge=-(2**31), lt=2**31)
    inputs: TrainInput | RowSumInputs = described("Inputs; of a `row-sum` scale also queries and keys.")
    outputs: TrainOutput = described("Outputs.")


class ValueOutput(Part):
    """Output of a decode."""

    value: Port = described("The decoded value.", "analog units, or spikes")


class Decode(Element):
    """From a train to one value per token: value = sum over t of step_weights[t] train[t]."""

    code: Literal["rate", "count", "phase"] = described("Spike code of the train.")
    step_weights: list[int | float] = described("Weight of each step; 1/T each for the rate code, 1 for the count code.", "1")
    inputs: TrainInput = described("Inputs.")
    outputs: ValueOutput = described("Outputs.")


class HostOp(Part):
    """One op on analog values, integers or indices."""

    name: Name = described("Unique name of the op and of its result.")
    op: str = described("Operator with namespace and overload: `aten.layer_norm.default`, `ntc.attention.default`, `operator.getitem`.")
    module: str = described("Module of the model that it comes from; may be empty.", default="")
    source: str = described("Line of the model's source; may be empty.", default="")
    arguments: dict[str, Argument] = described("Arguments in the order of the operator's signature, defaults included.")


class HostIsland(Element):
    """A maximal connected group of host ops between two crossings; runs on the host (or an analog-capable core)."""

    ops: list[HostOp] = described("Ops in the order of execution.", min_length=1)
    inputs: dict[str, Endpoint] = described("Values from other elements, by the name that `arguments` use.")
    outputs: dict[str, Port] = described("Results that other elements use, by the name of their op.")


AnyElement = Population | Projection | DynamicProduct | Scale | Decode | HostIsland
