"""Damage a file in one random way: its bytes, the header of a safetensors file, or a field of its JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 10**9, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "²", "\x1b[2J", "float32", "int8", "layers.0.q_proj", "a" * 2000, "(", "../x", "\ud800"),
    *([], [[]], [0], [[0, 0]], [[0.5, 0]], [["a", "b"]], [[0, 0], [0, 0]], {}, {"a": 1}, {"": {}}),
]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """Flip one to three bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_in_front(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit in the first 64 bytes, which hold a length and the first names."""
    changed = bytearray(data)
    changed[rng.randrange(min(64, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Cut off the end."""
    return data[: rng.randrange(len(data))]


def move_run(data: bytes, rng: random.Random) -> bytes:
    """Delete, repeat, zero or insert a run of bytes."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randint(1, 64))
    middle = [b"", 2 * data[start:end], bytes(end - start), data[start:end] + rng.randbytes(8)]
    return data[:start] + rng.choice(middle) + data[end:]


def nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths of all nodes of a JSON value below its root."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inner for found in [(*path, key), *nodes(part, (*path, key))]]


def edit_json(value: Any, rng: random.Random) -> Any:
    """Replace, delete, swap, rename or nest one node of a JSON value; the value is changed in place."""
    paths = nodes(value)
    first, second = _parent(value, path := rng.choice(paths)), _parent(value, other := rng.choice(paths))
    kind = rng.randrange(6)
    if kind == 0:
        del first[path[-1]]
    elif kind == 1:
        first[path[-1]], second[other[-1]] = _copy(second[other[-1]]), _copy(first[path[-1]])
    elif kind == 2 and isinstance(first, dict):
        first[str(rng.choice(JUNK))[:50]] = first.pop(path[-1])
    elif kind == 3:
        first[path[-1]] = [first[path[-1]]]
    else:
        first[path[-1]] = rng.choice([*JUNK, _bent(first[path[-1]], rng)])
    return value


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """Change a field of the header of a safetensors file, its metadata included."""
    header, body = split(data)
    return join(edit_json(header, rng), body)


def edit_manifest(key: str, seal: Callable[[dict, bytes], dict] | None = None):
    """Return a mutation of a field of the manifest in the metadata under `key`; `seal` makes a new checksum."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        header, body = split(data)
        manifest = edit_json(json.loads(header["__metadata__"][key]), rng)
        manifest = seal(manifest, data) if seal else manifest
        header["__metadata__"][key] = json.dumps(manifest)
        return join(header, body)

    return mutate


def edit_document(seal: Callable[[dict, bytes], dict] | None = None):
    """Return a mutation of a field of a JSON file; `seal` makes a new checksum."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        values = edit_json(json.loads(data), rng)
        return json.dumps(seal(values, data) if seal else values).encode()

    return mutate


def nest(data: bytes, rng: random.Random) -> bytes:
    """Insert thousands of brackets or digits."""
    place = rng.randrange(len(data))
    return data[:place] + rng.choice([b"[", b'{"a":', b"9"]) * rng.choice([5_000, 200_000]) + data[place:]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file and the bytes of its tensors."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any], body: bytes) -> bytes:
    """Inverse of `split`."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _parent(value: Any, path: tuple) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _bent(value: Any, rng: random.Random) -> Any:
    """Return a changed value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice([-1, 1, value, 2**31, 2**63])
    if isinstance(value, float):
        return rng.choice([-value, value * 1e6, int(value)])
    if isinstance(value, str):
        return value[:-1] if rng.random() < 0.5 else value + rng.choice(["x", ".", "\n", " > y"])
    if isinstance(value, list):
        return value[:-1] if value and rng.random() < 0.5 else value + value[-1:]
    return value
