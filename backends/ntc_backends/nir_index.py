"""``nir/index.json``: which file holds which nodes of the program, how they connect, and how faithful each one is.

NIR has no words for time steps, codes, initial potentials or what stands between two files, and its documents forbid to rely on
metadata, so all of this is here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ntc.errors import ArtifactError

__all__ = [
    "FOLDER", "INDEX", "SCHEMA_VERSION", "Conventions", "FileEntry", "InputPort", "Measured", "NirIndex", "NodeEntry", "OutputPort",
    "PopulationEntry", "load_index",
]  # fmt: skip

FOLDER = "nir"
INDEX = f"{FOLDER}/index.json"
SCHEMA_VERSION = "1.0"

Count = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputPort(_Model):
    """The input of a file.

    Attributes:
        port: Name of the Input node.
        value: Node of the program whose value comes in.
        channels: Width of the Input node.
        held: True: one vector ``[C]`` per token, given at each of the T steps. False: a vector per step.
        start: How initial potentials get in. ``none``: they need nothing. ``channel``: the last channel is 1 at the first step and 0
            after. ``add``: ``start_current`` is added to the input of the first step.
        start_current: Of ``add``: one number for all channels, or one per channel.
    """

    port: str
    value: str
    channels: Count
    held: bool
    start: Literal["none", "channel", "add"]
    start_current: float | list[float] | None


class OutputPort(_Model):
    """An output of a file, a value per step.

    Attributes:
        port: Name of the Output node.
        value: Node of the program whose value this is.
        channels: Width.
        kind: Spikes or currents.
        code: How the steps decode: ``rate`` = mean, ``count`` = sum, ``phase`` = sum of 2**-(t+1) s(t).
        used_by: Nodes of the program that read it.
    """

    port: str
    value: str
    channels: Count
    kind: Literal["spikes", "current"]
    code: str
    used_by: list[str]


class PopulationEntry(_Model):
    """Neurons in a file, as the program has them.

    Attributes:
        name: Node of the program.
        model: ``if`` or ``lif``.
        form: ``loop``, ``node`` or ``pair``: docs/nir.md.
        size: Neurons.
        role: What for: ``q``, ``k``, ``v``, ``ssa``, ``ffn``.
        signed: Ternary spikes.
        reset: Of the program's neuron.
        threshold: One number if all are equal, else null: then it stands in the NIR nodes only.
        start: Initial potential; likewise.
        v0: Initial potential as a fraction of the threshold; likewise, and null for integers.
        arithmetic: ``integer``: spikes are the same on every executor. ``float``: see ``conventions.exact``.
        tau: Time constant in steps; likewise; null for ``if``.
        spikes: NIR node that carries its spikes.
    """

    name: str
    model: Literal["if", "lif"]
    form: Literal["loop", "node", "pair"]
    size: Count
    role: str
    signed: bool
    reset: Literal["soft", "hard"]
    threshold: float | None
    start: float | None
    v0: float | None
    arithmetic: Literal["float", "integer"]
    tau: float | None
    spikes: str


class Measured(_Model):
    """Spikes of a file against those of the program on the same inputs.

    Attributes:
        reading: ``definition`` = as the NIR version of the file defines its nodes; ``subtract`` = IF and LIF subtract their threshold.
        tokens: Tokens that were run.
        events: Spikes of the program's neurons.
        differing: Steps at which a neuron of the file fires and that of the program does not, or the other way round.
        by_rounding: Of populations that are exact, how many of them lie at a threshold, within what the order of floating-point sums
            can move; the rest of these would be a mistake, and the export fails.
        largest_error: Largest difference of an output that is a current, relative to the largest current.
    """

    reading: Literal["definition", "subtract"]
    tokens: Count
    events: Count
    differing: Count
    by_rounding: Count
    largest_error: float | None


class FileEntry(_Model):
    """One NIR file.

    Attributes:
        name: Node of the program that comes first in it.
        file: Its name, in the folder of the index.
        sha256: Of the file.
        bytes: Its size.
        block: Transformer block that it lies in.
        steps: T: a token is a run of so many steps, from empty state.
        dtype: Of its parameters.
        input: What comes in.
        outputs: What leaves.
        populations: Its neurons.
        measured: Comparison with the program, one per reading; empty if nothing was run.
    """

    name: str
    file: str
    sha256: str
    bytes: Count
    block: str
    steps: Count
    dtype: str
    input: InputPort
    outputs: list[OutputPort]
    populations: list[PopulationEntry]
    measured: list[Measured]


class NodeEntry(_Model):
    """One operation of the program; together they are the graph that connects the files.

    Attributes:
        name: Node of the program.
        op: Its operator.
        module: Module of the model that it comes from.
        reads: Nodes of the program whose values it reads.
        file: File that holds it, by name; null: it runs on the host.
        parts: NIR nodes that it became.
        fidelity: ``exact``, ``approximate`` or ``unsupported``.
        reason: Why.
    """

    name: str
    op: str
    module: str
    reads: list[str]
    file: str | None
    parts: list[str]
    fidelity: Literal["exact", "approximate", "unsupported"]
    reason: str


class Conventions(_Model):
    """What a reader has to know and NIR does not say.

    Attributes:
        dt: Length of a step, in units of NIR's time: r of an integrator and tau are per step.
        comparison: NIR's.
        program_comparison: The program's; thresholds are one floating-point step lower, which makes the two the same.
        reset: How soft resets are said.
        bias: When a bias acts.
        state: What integrators begin with, at each token.
        loop: When a value that comes back round a loop arrives.
        exact: What that word promises.
    """

    dt: float
    comparison: Literal[">"]
    program_comparison: Literal[">="]
    reset: Literal["explicit", "hard", "annotate"]
    bias: str
    state: str
    loop: str
    exact: str


class NirIndex(_Model):
    """The index of a folder of NIR files.

    Attributes:
        format: Always ``ntc-nir``.
        schema_version: Of this file.
        generator: ntc and its version.
        model: Name of the model.
        nir_version: Definitions that hold for the nodes, and oldest nir package that reads the files.
        steps: Largest T of the program.
        conventions: How to read the files.
        sources: Inputs of the program: token ids, and the state if it has one.
        results: Nodes with the logits, and the new state.
        files: The files.
        nodes: All operations of the program, in an order in which they can run.
    """

    format: Literal["ntc-nir"]
    schema_version: str
    generator: str
    model: str
    nir_version: str
    steps: Count
    conventions: Conventions
    sources: list[str]
    results: list[str]
    files: list[FileEntry]
    nodes: list[NodeEntry]

    def text(self) -> str:
        """The JSON text: fields in the order of the schema, no NaN."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load_index(folder: Path | str) -> NirIndex:
    """The index of a compiled folder.

    Raises:
        ArtifactError: If there is none, or it is damaged; says what is wrong.
    """
    path = Path(folder) / INDEX
    try:
        index = NirIndex.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}; ntc export DIR --emit nir writes it") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if index.schema_version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ArtifactError(f"{path} has schema version {index.schema_version}; this ntc reads {SCHEMA_VERSION}")
    return index
