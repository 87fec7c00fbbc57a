"""Damage to the two files of a netlist, at random from a seed: of the structure of the JSON, and of the bytes of both."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["MUTATIONS", "mutate"]

STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, -(2**31), 2**63, 2**64, 10**30, -0.0, 0.5, -1.5, 1e300, 1e-300, "", "x", "B", "L", "0", "nan",
    "..", "../../../etc/passwd", "/etc/passwd", "C:\\x", "a:b", "netlist.json", ".", "\x00", "\ud800", "é" * 300, "a" * 5000, [], [[]], {}, {"tensor": "x"},
    {"value": "x"}, {"float": "nan"}, [1, 2, 3], [-1], [0], [2**40, 2**40], {"": ""},
]  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value but itself."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += [(*at, key), *_places(inner, (*at, key))]
    return found


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _pick(data: Any, rng: random.Random, kind: Callable[[Any], bool] = lambda value: True) -> tuple[Any, Any]:
    """The owner and key of a place whose value is of a kind; near the root as often as deep down."""
    places = [p for p in _places(data) if kind(_at(data, p))]
    depth = rng.choice(sorted({len(p) for p in places}))
    path = rng.choice([p for p in places if len(p) == depth])
    return _at(data, path[:-1]), path[-1]


def delete(data: Any, rng: random.Random) -> None:
    owner, key = _pick(data, rng)
    del owner[key]


def replace(data: Any, rng: random.Random) -> None:
    owner, key = _pick(data, rng)
    owner[key] = copy.deepcopy(rng.choice(STRANGE))


def replace_by_another(data: Any, rng: random.Random) -> None:
    """A value of the same file in the place of another."""
    owner, key = _pick(data, rng)
    other, its = _pick(data, rng)
    owner[key] = copy.deepcopy(other[its])


def swap_references(data: Any, rng: random.Random) -> None:
    """A string of the file for another: endpoints, names, tensors, hashes."""
    text = lambda value: isinstance(value, str)  # noqa: E731
    owner, key = _pick(data, rng, text)
    other, its = _pick(data, rng, text)
    owner[key], other[its] = other[its], owner[key]


def change_number(data: Any, rng: random.Random) -> None:
    owner, key = _pick(data, rng, lambda value: isinstance(value, int | float) and not isinstance(value, bool))
    old = owner[key]
    owner[key] = rng.choice([old + 1, old - 1, -old, old * 2, old * 10**9, old + 0.5, str(old), [old], bool(old)])


def duplicate(data: Any, rng: random.Random) -> None:
    """An element of a list twice, or an unknown key."""
    owner, key = _pick(data, rng, lambda value: isinstance(value, list | dict))
    inner = owner[key]
    if isinstance(inner, list) and inner:
        inner.insert(rng.randrange(len(inner) + 1), copy.deepcopy(rng.choice(inner)))
    elif isinstance(inner, dict) and inner:
        inner[rng.choice(["extra", "name", "é"])] = copy.deepcopy(rng.choice(list(inner.values())))


def shuffle(data: Any, rng: random.Random) -> None:
    owner, key = _pick(data, rng, lambda value: isinstance(value, list) and len(value) > 1)
    rng.shuffle(owner[key])


def rename_key(data: Any, rng: random.Random) -> None:
    owner, key = _pick(data, rng, lambda value: isinstance(value, dict) and bool(value))
    inner = owner[key]
    old = rng.choice(list(inner))
    inner[rng.choice([old + "x", "", "name", "tensor", "\x00"])] = inner.pop(old)


def bury(data: Any, rng: random.Random) -> None:
    """A value under many brackets."""
    owner, key = _pick(data, rng)
    for _ in range(rng.choice([3, 40, 300])):
        owner[key] = [owner[key]] if rng.random() < 0.5 else {"value": owner[key]}


def blob_name(data: Any, rng: random.Random) -> None:
    names = ["../netlist.safetensors", "/etc/passwd", "sub/netlist.safetensors", "netlist.json", "no.safetensors", "..", ".", "", "a\x00b", "~", "link", "fifo"]
    data["blob"]["file"] = rng.choice(names)


STRUCTURE = (delete, replace, replace_by_another, swap_references, change_number, duplicate, shuffle, rename_key, bury, blob_name)


def _flip(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 8])):
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(raw)), len(raw) - 1])]


def _grow(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + rng.choice([b"\x00", b"{", b'"', b"[" * 100_000, b"NaN", b"1e999", b"9" * 5000, raw[:50]]) + raw[at:]


def _header(raw: bytes, rng: random.Random) -> bytes:
    """A tensor file whose header says something else, or claims another length."""
    length = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.3:
        return rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little") + raw[8:]
    header = json.loads(raw[8 : 8 + length])
    rng.choice([delete, replace, change_number, replace_by_another, rename_key])(header, rng)
    text = json.dumps(header, ensure_ascii=True).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage a netlist in a folder; returns what was done.

    Half of the damaged tensor files come with a JSON whose sizes and hashes were made to fit: whoever changes one file can change both.
    """
    file, blob = folder / "netlist.json", folder / "netlist.safetensors"
    kind = rng.choice(["structure"] * 6 + ["json bytes"] * 2 + ["blob bytes", "header"])
    if kind == "structure":
        data, done = json.loads(file.read_text(encoding="utf-8")), []
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            how = rng.choice(STRUCTURE)
            try:
                how(data, rng)
            except (IndexError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # nothing of that kind is left
            done.append(how.__name__)
        try:
            file.write_text(json.dumps(data), encoding="utf-8")
        except RecursionError:
            return "nothing"  # too deep to be written
        return ", ".join(done)
    how = rng.choice([_flip, _cut, _grow]) if kind != "header" else _header
    target = file if kind == "json bytes" else blob
    try:
        raw = how(target.read_bytes(), rng)
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError):
        return "nothing"
    target.write_bytes(raw)
    if target == blob and rng.random() < 0.5:
        data = json.loads(file.read_text(encoding="utf-8"))
        data["blob"] |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        file.write_text(json.dumps(data), encoding="utf-8")
    return f"{how.__name__} of {target.name}"


MUTATIONS = tuple(f.__name__ for f in STRUCTURE)
