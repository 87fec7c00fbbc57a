"""How the rules make nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import building
from ntc.program import Program

__all__ = ["NAME", "constant", "making"]

NAME = "canonicalize"


@contextmanager
def making(program: Program, before: Node, stands_for: Iterable[Node]) -> Iterator[Callable[..., Node]]:
    """``ntc.meta.building`` whose nodes have their shapes at once, because the next rule asks for them."""
    with building(program.graph, before=before, stands_for=stands_for, by=NAME) as call:

        def make(target: Any, *args: Any, **options: Any) -> Node:
            node = call(target, *args, **options)
            program.infer(node)
            return node

        yield make


def constant(program: Program, name: str, value: Tensor) -> str:
    """Name of a constant of that value: the one that is there if two places share it, else a new one."""
    known = program.tensor_or_none(name)
    if known is not None and known.shape == value.shape and torch.equal(known, value):
        return name
    return program.add_tensor(name, value)
