"""Run a streaming program: a sequence in pieces, with the state kept in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import ConfigError, DataError
from ntc.program import Program, check_ids, interpret

__all__ = ["Stream"]


class Stream:
    """Sequences in progress: give it the next tokens of each, and it returns their logits.

    >>> stream = Stream(program)                    # doctest: +SKIP
    >>> logits = stream(prompt)[:, -1]              # doctest: +SKIP
    >>> logits = stream(next_token)[:, -1]          # doctest: +SKIP

    Args:
        program: A streaming program (pass ``to-streaming``).
        batch: B, number of sequences; all are as long as each other.
        state: Where to go on, by default at the beginning; in the order of ``program.state`` or by name.

    Attributes:
        program: The program.
        state: Tensors in the order of ``program.state``. Nobody writes into them, so they may be kept.
        position: Tokens so far.

    Raises:
        ConfigError: If the program keeps no state.
        DataError: If the state is not one of that program and batch.
    """

    def __init__(self, program: Program, batch: int = 1, state: Sequence[Tensor] | Mapping[str, Tensor] | None = None) -> None:
        if not program.state:
            raise ConfigError(f"the program of {program.info.source} keeps no state: run the pass to-streaming on it")
        self.program, self.batch = program, batch
        parts = program.state
        self.position = 0
        if state is None:
            self.state = tuple(part.initial(batch) for part in parts)
            return
        given = state if isinstance(state, Mapping) else dict(zip((part.name for part in parts), state, strict=False))
        if missing := [part.name for part in parts if part.name not in given]:
            raise DataError(f"the state lacks {missing[0]}; it has {', '.join(part.name for part in parts)}")
        self.position = int(given[parts[0].name])
        for part in parts:
            part.check(given[part.name], batch, self.position)
        self.state = tuple(given[part.name] for part in parts)

    def __call__(self, input_ids: Tensor, visit: Callable[[Node, tuple[Any, ...], Any], Any | None] | None = None) -> Tensor:
        """Logits ``[B, L, V]`` of the next L tokens ``[B, L]`` of each sequence; the state moves on.

        With ``visit`` the graph is run node by node (see ``ntc.program.interpret``), which takes longer.

        Raises:
            DataError: If the ids are none of the model's, or go beyond its context; the state is then as before.
        """
        check_ids(input_ids, self.program.info)
        if len(input_ids) != self.batch:
            raise DataError(f"the state is that of {self.batch} sequence(s), and tokens of {len(input_ids)} were given")
        length, context = input_ids.shape[1], self.program.info.context
        if context and self.position + length > context:
            raise DataError(f"{length} token(s) after the first {self.position} are more than the model's context of {context}")
        with torch.no_grad():
            logits, self.state = self._run(input_ids, visit)
        self.position += length
        return logits

    def _run(
        self, input_ids: Tensor, visit: Callable[[Node, tuple[Any, ...], Any], Any | None] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if visit is None:
            logits, *state = self.program.module(input_ids, *self.state)
            return logits, tuple(state)
        parts = self.program.results[1:]
        found: dict[Node, Tensor] = {}

        def watch(node: Node, args: tuple[Any, ...], value: Any) -> Any | None:
            other = visit(node, args, value)
            if node in parts:
                found[node] = value if other is None else other
            return other

        logits = interpret(self.program, input_ids, watch, state=self.state)
        return logits, tuple(found[node] for node in parts)

    def fork(self) -> Stream:
        """A second continuation of the same tokens; no tensor is copied."""
        return Stream(self.program, self.batch, self.state)

    def named(self) -> dict[str, Tensor]:
        """The state by name."""
        return {part.name: value for part, value in zip(self.program.state, self.state, strict=True)}
