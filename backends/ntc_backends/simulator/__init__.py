"""Runs a netlist from its two files: numpy and scipy, no torch, no compiler.

>>> from ntc_backends.simulator import Simulator
>>> simulator = Simulator("build/demo")                # doctest: +SKIP
>>> logits = simulator.run([5, 9, 2])                  # doctest: +SKIP
>>> simulator.activity["spikes"]                       # doctest: +SKIP

What it computes is what docs/netlist.md says. ``ntc simulate`` is the same as a command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntc_backends.simulator.engine import Simulator as Simulator

__all__ = ["Simulator"]

if not TYPE_CHECKING:  # numpy and scipy are imported with the first use: `ntc --help` has none for them

    def __getattr__(name: str) -> object:
        if name != "Simulator":
            raise AttributeError(f"module 'ntc_backends.simulator' has no attribute {name!r}")
        from ntc_backends.simulator.engine import Simulator

        return Simulator
