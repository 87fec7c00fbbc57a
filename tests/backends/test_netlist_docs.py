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
