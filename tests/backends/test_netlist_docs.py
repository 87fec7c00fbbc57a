"""docs/netlist.md says what the schema says, and its example and snippet hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from netlist_cases import cached
from netlist_executor import Executor

import ntc
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_docs import field_tables, renew

PAGE = (Path(__file__).parents[2] / "docs" / "netlist.md").read_text(encoding="utf-8")


def code(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.S)[1]


def test_field_tables_are_up_to_date() -> None:
    assert renew(PAGE) == PAGE, "run python -m ntc_backends.netlist_schema"
    assert renew(PAGE.replace(field_tables(), "old\n")) == PAGE


def test_every_object_has_a_table() -> None:
    tables = field_tables()
    for name, definition in json.loads(schema.schema_text())["$defs"].items():
        assert ("properties" not in definition) or f"### {name}\n" in tables


def test_a_page_without_marks() -> None:
    with pytest.raises(ntc.ArtifactError, match="no part between"):
        renew("# Page\n")


def test_snippet() -> None:
    lines: list[tuple[object, ...]] = []
    text = code("python").replace('"DIR"', repr(str(cached("spikes", 1).folder)))
    exec(text, {"print": lambda *a: lines.append(a)})
    found = {str(line[0]): (line[1], line[3]) for line in lines}
    assert found["h_0_mlp_act_spikes"] == (128, 32 * 128)
    assert found["h_0_attn_attention_ssa_spikes"] == (32, 0)


def test_worked_example_of_integers() -> None:
    """The objects are valid, spikes, membranes and counts are those of the page, and so are the widths."""
    example = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.S)[1])
    for projection in example["projections"]:
        schema.Projection.model_validate(projection)
    schema.Population.model_validate(example["populations"][0])
    schema.Decode.model_validate(example["decodes"][0])
    executor = Executor.__new__(Executor)
    executor.events, executor.integer, executor.net = {}, True, {}
    executor.tensors = {
        "fc.weight": torch.tensor([[32, 0, 16], [127, 0, 127]], dtype=torch.int8), "proj.weight": torch.tensor([[1, 2], [3, -4], [-127, 5]], dtype=torch.int8),
        "fc.threshold": torch.tensor([2048, 2032]), "fc.start": torch.tensor([1024, 1016]),
    }  # fmt: skip
    fc, proj = example["projections"]
    current = executor.projections(fc, torch.tensor([[[16, 0, 32]]]))
    assert current.flatten().tolist() == [1024, 6096]
    spikes = executor.populations(example["populations"][0], current)
    assert spikes[:, 0, 0].T.tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
    counts = executor.decodes(example["decodes"][0], spikes)
    assert counts.flatten().tolist() == [2, 4]
    assert executor.projections(proj, counts).flatten().tolist() == [10, -10, -234]
    v, rows = torch.tensor([1024, 1016]), []
    for s in spikes[:, 0, 0]:
        u = v + current.flatten()
        v = u - s * executor.tensors["fc.threshold"]
        rows.append([*(f"{int(a)}" for pair in zip(u, s, v, strict=True) for a in pair)])
    table = PAGE.split("at each step:")[1].split("The counts are")[0].replace("1024 + 1024 = ", "")
    said = [re.findall(r"-?\d+", line)[1:] for line in table.splitlines() if re.match(r"\| \d", line)]
    assert said == rows



def test_worked_example() -> None:
    """The objects are valid, and the neurons fire as the page says."""
    example = json.loads(code("json"))
    schema.Projection.model_validate(example["projections"][0])
    population = example["populations"][0]
    schema.Population.model_validate(population)
    pre, weight = torch.tensor([1.0, 0.0, 2.0]).double(), torch.tensor([[0.25, 0.0, 0.125], [1.0, 0.0, 1.0]]).double()
    executor = Executor.__new__(Executor)
    executor.events = {}
    spikes = executor.populations(population, (weight @ pre)[None, None])
    assert spikes[:, 0, 0].T.tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
