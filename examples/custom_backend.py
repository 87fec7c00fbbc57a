"""A back end of your own: how many cores of a chip a program fills, as JSON. Takes about half a minute.

The chip: 256 neurons per core, one threshold per core. An entry point in the group ``ntc.backends`` makes the name good for
``--emit``; the object below is all that it needs to point to.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

import ntc
from ntc.errors import BackendError
from ntc.meta import where
from ntc.ops import spec_of
from ntc.program import Program

HERE = Path(__file__).parent


class CoresBackend:
    """Lists the populations with the cores that they fill."""

    name = "cores"
    files = ("cores.json",)
    summary = "cores of a chip with 256 neurons per core, as JSON"

    def emit(self, program: Program, folder: Path, *, analog: Program | None, tokens: Tensor | None) -> dict[str, Any]:
        """Write ``cores.json``; refuse what the chip cannot do."""
        cores: dict[str, int] = {}
        for node in program.graph.nodes:
            spec = spec_of(node)
            if spec is None or spec.element != "population":
                continue
            theta = program.tensor(node.args[1])
            if bool((theta != theta[0]).any()):
                raise BackendError(f"a core has one threshold, and a population has {len(theta)} different ones: {where(node)}")
            cores[node.name] = math.ceil(node.meta["val"].shape[-1] / 256)
        (folder / self.files[0]).write_text(json.dumps(cores, indent=1) + "\n", encoding="utf-8")
        return {"populations": len(cores), "cores": sum(cores.values())}


def main(model: Path = HERE / "gpt2-books") -> None:
    """What the recipe makes fits the chip; with an output neuron behind its attention it does not."""
    for output in ("current", "spikes"):
        compiled = ntc.compile(model, settings=ntc.Settings({"output": output}))
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"output = {output}:", CoresBackend().emit(compiled.program, Path(folder), analog=None, tokens=None))
            except BackendError as error:
                print(f"output = {output}: does not fit:", error)


if __name__ == "__main__":
    main()
