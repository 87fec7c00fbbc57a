"""Puts the page together: everything that is shown, one template, one file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ntc.pages import part, render
from ntc_backends.inspect_page import records
from ntc_backends.inspect_page.activity import BINS, Fired
from ntc_backends.inspect_page.flow import flow_of
from ntc_backends.inspect_page.picture import RATE_STEPS, pictures
from ntc_backends.inspect_page.prompt import Prompt
from ntc_backends.inspect_page.subject import Subject

__all__ = ["MARK", "page"]

MARK = "<!-- made by ntc inspect -->"
"""In the second line of every page: a file with it may be written over."""


def page(subject: Subject, prompt: Prompt | None, fired: Mapping[str, Fired]) -> str:
    """The HTML text.

    Args:
        subject: What is inspected.
        prompt: The tokens that were run; None if nothing was.
        fired: What each population did; empty if nothing was run.
    """
    flow = flow_of(subject)
    rates = {name: found.rate for name, found in fired.items()}
    script = part("ntc_backends.inspect_page", "page.js")
    return render(
        "ntc_backends.inspect_page",
        mark=MARK,
        style=part("ntc_backends.inspect_page", "page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_data(subject, prompt, fired),
        subject=subject,
        name=str(subject.model["source"]).rstrip("/").rpartition("/")[2],
        recipe=subject.manifest.get("recipe"),
        prompt=prompt,
        fired=fired,
        shown=sum(len(f.rows) for f in fired.values()),
        neurons=sum(f.element.size for f in fired.values()),
        traced=any(f.traces for f in fired.values()),
        headline=records.headline(subject, flow, fired),
        sections=pictures(subject, flow, rates),
        has_stream=flow.has_stream,
        rate_steps=RATE_STEPS,
        populations=records.population_rows(subject, flow, fired),
        passes=records.pass_rows(subject),
        verified=records.verify_rows(subject),
        targets=subject.manifest.get("targets", {}),
        widths=records.width_rows(subject),
        commands=records.commands(subject, prompt),
    )


def _data(subject: Subject, prompt: Prompt | None, fired: Mapping[str, Fired]) -> dict[str, Any]:
    """What the script draws from."""
    blocks = {p.name: p.block for p in subject.populations}
    return {
        "tokens": list(prompt.texts) if prompt else [],
        "bins": BINS,
        "populations": [
            {
                "name": name, "block": blocks[name], "role": f.element.role, "size": f.element.size, "steps": f.element.steps,
                "reset": f.element.reset, "rows": len(f.rows), "plus": f.plus, "minus": f.minus, "rate": round(f.rate, 6),
                "histogram": f.histogram, "dead": f.dead, "saturated": f.saturated, "traces": [asdict(t) for t in f.traces],
            }
            for name, f in fired.items()
        ],
    }  # fmt: skip
