"""Safetensors headers and indexes of shards, sound ones and mutants, of a random generator.

Mutations are those of the structure, of the JSON text, and of bytes; many leave a header sound.
Used by safetensors_mutations.py, and by the tests.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wavg.dtypes import DTYPES

PAYLOAD = random.Random(0).randbytes(1 << 14)  # where two tensors lie, their bytes differ
BITS = {entry.code: entry.bits for entry in DTYPES if entry.code}
METADATA = "__metadata__"

Pairs = list[tuple[str, Any]]


# --- sound headers --------------------------------------------------------------------------------

NAMES = ("weight", "bias", "running_mean", "lm_head", "ключ", "重み", "名前.0", "😀", "a b", "-0")
ODD_NAMES = ("", "\x7f", '"', "\\", "/", "\n", "é", "e\u0301", "\ufeff", "\0", "dtype", "x" * 300)
SHAPES = ((), (1,), (2,), (3, 4), (2, 3, 2), (8,), (0,), (0, 7), (1, 1, 1, 1), (16, 2), (5,))
TEXTS = ("pt", "", "3", '{"a": [1, 2]}', "日本", "a\\b", "😀", "x" * 100)


def sound(rng: random.Random) -> tuple[Pairs, int]:
    """Return a header that every parser has to accept, as pairs, and the bytes of its data."""
    count = rng.choice((0, 1, 1, 2, 2, 3, 4, 6, 6, 40))
    if rng.random() < 0.0002:
        count = 3_000  # for what takes time by the square
    names = [f"layers.{n}.{rng.choice(NAMES)}" for n in range(count)]
    if rng.random() < 0.2:
        names = list(dict.fromkeys(rng.choice(ODD_NAMES) for _ in range(count)))
    layout = [(rng.choice(list(BITS)), list(rng.choice(SHAPES))) for _ in names]
    for code, shape in layout:
        if math.prod(shape) * BITS[code] % 8:
            shape.append(8)
    start, entries = 0, []
    for name, (code, shape) in zip(names, layout, strict=True):
        end = start + math.prod(shape) * BITS[code] // 8
        entries.append((name, {"dtype": code, "shape": shape, "data_offsets": [start, end]}))
        start = end
    if rng.random() < 0.5:
        rng.shuffle(entries)  # their order is not that of the data
    if rng.random() < 0.4:
        table = {rng.choice(("format", "step", "ключ", "")): rng.choice(TEXTS) for _ in range(3)}
        entries.insert(rng.randrange(len(entries) + 1), (METADATA, table))
    return entries, start


# --- mutations of the structure -------------------------------------------------------------------

HUGE = (2**31, 2**32, 2**53, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**40)
ODD = (-1, -(2**63), 1.0, 0.5, 1e300, True, False, None, "1", "", [], [1], {}, {"a": 1}, "\ud800")
SHARED = ("F32", "I32", "U32", "F16", "BF16", "I16", "U8", "I8", "F8_E4M3", "BOOL", "F64", "C64")
UNKNOWN = ("F33", "f32", "", "C128", "F128", "U4", "float32", "F32 ", "BF16\0", "Ｆ32", "\ud800")


def pick(rng: random.Random, options: Sequence[Any]) -> Any:
    """Choose one; what is changed later is a copy of its own."""
    return copy.deepcopy(rng.choice(options))


def tensors(header: Pairs) -> list[dict]:
    return [
        entry
        for name, entry in header
        if name != METADATA and isinstance(entry, dict) and isinstance(entry.get("shape"), list)
    ]


def some_number(rng: random.Random, value: Any) -> Any:
    if rng.random() < 0.6 and type(value) is int:
        return value + rng.choice((-8, -4, -2, -1, 1, 1, 2, 4, 8))
    return pick(rng, (*HUGE, *ODD, 0, 1, 2, 3, 4))


def change_offset(rng: random.Random, header: Pairs, entry: dict) -> None:
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or not offsets or rng.random() < 0.05:
        entry["data_offsets"] = pick(rng, (*ODD, [0], [0, 0, 0], [0, 4], {"0": 0, "1": 4}))
    elif rng.random() < 0.2:
        offsets.reverse()
    elif rng.random() < 0.3 and all(type(value) is int for value in offsets):
        by = rng.choice((-8, -1, 1, 4, 8, 2**63, -(2**40)))
        entry["data_offsets"] = [value + by for value in offsets]
    else:
        where = rng.randrange(len(offsets))
        offsets[where] = some_number(rng, offsets[where])


def change_shape(rng: random.Random, header: Pairs, entry: dict) -> None:
    shape = entry["shape"]
    kind = rng.randrange(8)
    if kind == 0:
        entry["shape"] = pick(rng, (*ODD, [[1]], [None]))
    elif kind == 1:
        shape += [1] * rng.choice((1, 60, 62, 63, 64, 65, 66, 500))
    elif kind == 2:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((0, 2, *HUGE)))
    elif kind == 3 and shape:
        shape.pop(rng.randrange(len(shape)))
    elif kind == 4:
        rng.shuffle(shape)  # of the same size
    elif kind == 5 and all(type(value) is int for value in shape):
        entry["shape"] = [math.prod(shape)]
    elif shape:
        where = rng.randrange(len(shape))
        shape[where] = some_number(rng, shape[where])


def change_dtype(rng: random.Random, header: Pairs, entry: dict) -> None:
    code = entry.get("dtype")
    same = [other for other in BITS if BITS[other] == BITS.get(code if type(code) is str else "")]
    kind = rng.random()
    if kind < 0.5 and same:
        entry["dtype"] = rng.choice(same)
    elif kind < 0.7:
        entry["dtype"] = rng.choice(SHARED)
    elif kind < 0.8:
        entry["dtype"] = pick(rng, ({code if type(code) is str else "F32": None}, [code], *ODD))
    else:
        entry["dtype"] = rng.choice(UNKNOWN)


def change_fields(rng: random.Random, header: Pairs, entry: dict) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        entry[rng.choice(("more", "", "scale", "Dtype"))] = pick(rng, (*ODD, "x", [[[]]]))
    elif kind == 1:
        entry.pop(rng.choice(("dtype", "shape", "data_offsets")), None)
    elif kind == 2:
        old = rng.choice(("dtype", "shape", "data_offsets"))
        entry[rng.choice((old.upper(), f"{old} ", "offsets"))] = entry.pop(old, None)
    else:
        items = list(entry.items())
        rng.shuffle(items)
        entry.clear()
        entry.update(items)


def change_entries(rng: random.Random, header: Pairs, entry: dict) -> None:
    where = rng.randrange(len(header))
    name, value = header[where]
    kind = rng.randrange(8)
    if kind == 0:
        header.pop(where)
    elif kind == 1:
        header.insert(rng.randrange(len(header) + 1), (name, value))
    elif kind == 2:
        header.append((f"{name}~", value))
    elif kind == 3:
        header[where] = (rng.choice((*ODD_NAMES, METADATA, "\ud800", "a\udfffb")), value)
    elif kind == 4 and isinstance(value, dict):
        header[where] = (name, pick(rng, (list(value.values()), *ODD)))
    elif kind == 5:
        offsets = entry.get("data_offsets")
        place = rng.choice(offsets) if isinstance(offsets, list) and offsets else 0
        shape = rng.choice(([0], [0, 3], [0, 2**60], [2**40, 2**40, 0]))
        empty = {"dtype": rng.choice(SHARED), "shape": shape, "data_offsets": [place, place]}
        header.append(("empty", empty))
    elif kind == 6:
        other = rng.choice(tensors(header))
        first, second = entry.get("data_offsets"), other.get("data_offsets")
        entry["data_offsets"], other["data_offsets"] = second, first
    else:
        rng.shuffle(header)


def change_metadata(rng: random.Random, header: Pairs, entry: dict) -> None:
    found = next((value for name, value in header if name == METADATA), None)
    if isinstance(found, dict) and rng.random() < 0.7:
        key = rng.choice((*found, "new", "", "\ud800"))
        found[key] = pick(rng, (*TEXTS, *TEXTS, *ODD, 3, "\udc00 alone"))
    else:
        new = pick(rng, (None, {}, {"format": "pt"}, {"a": "b", "c": "d"}, [], "pt", 3, {"a": {}}))
        header.insert(rng.randrange(len(header) + 1), (METADATA, new))


STRUCTURE = (
    change_offset,
    change_shape,
    change_dtype,
    change_dtype,
    change_fields,
    change_entries,
    change_entries,
    change_metadata,
)


def change_structure(rng: random.Random, header: Pairs) -> None:
    entries = tensors(header)
    change = rng.choice(STRUCTURE) if entries else change_metadata
    change(rng, header, rng.choice(entries) if entries else {})


# --- the text, and mutations of it ----------------------------------------------------------------

SPACES = (("", ""), (" ", " "), ("\n", "\t"), (" \r\n", "  "))


def written(header: Pairs, rng: random.Random) -> str:
    """Write pairs, equal names included, as JSON in one of many ways."""
    between, after = rng.choice(SPACES)
    plain = rng.random() < 0.5
    show = functools.partial(
        json.dumps, separators=(f",{between}", f":{after}"), ensure_ascii=plain
    )
    pairs = [f"{show(name)}:{after}{show(value)}" for name, value in header]
    return "{" + f",{between}".join(pairs) + "}" + " " * rng.choice((0, 0, 1, 7, 64))


NUMBERS = (
    *("-0", "-0.0", "0.0", "1e0", "1E1", "01", "00", "+1", "1.", ".5", "1_0", "0x1", "1e400"),
    *("NaN", "Infinity", "-Infinity", "true", "null", "٣", "9" * 30, "9" * 5000, "1e-1", "-"),
    *('"4"', "[4]", "{}", "4 ", " 4", "\t4\n", "\xa04", "18446744073709551616"),
)
PIECES = (
    *('"', "\\", "{", "}", "[", "]", ",", ":", " ", "\n", "\0", "\x0b", "\xa0", "\ufeff", "\u2028"),
    *("/*x*/", "//x\n", "'", "\\u0041", "\\ud800", "\\udc00", "\\ud83d\\ude00", "\\x41", "\\/"),
    *("\\u00e", "\\U0041", "NaN", "null,", '"a":1,', '"a":{},', "[" * 200, '{"a":' * 150, "\x1f"),
)


def change_number(rng: random.Random, text: str) -> str:
    places = [match.span() for match in re.finditer(r"(?<=[\[,: ])-?\d{1,30}(?=[\],])", text)]
    if not places:
        return text
    start, end = rng.choice(places)
    number = text[start:end]
    new = str(int(number) + rng.choice((-4, -1, 1, 4))) if rng.random() < 0.3 else None
    return text[:start] + (new or rng.choice(NUMBERS)) + text[end:]


def change_piece(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text) + 1)
    if rng.random() < 0.5:  # a place where something begins or ends
        places = [match.start() for match in re.finditer(r"[\"\[\]{},:]", text)]
        place = rng.choice(places or [place]) + rng.randrange(2)
    cut = rng.choice((0, 0, 0, 1, 1, 2, 8))
    return text[:place] + rng.choice((*PIECES, "", " ", " ")) + text[place + cut :]


def change_escape(rng: random.Random, text: str) -> str:
    letters = [match.start() for match in re.finditer(r"(?<!\\)[a-zA-Z_0-9.]", text)]
    place = rng.choice(letters or [0])
    code = ord(text[place]) if text else 0
    new = rng.choice((f"\\u{code:04x}", f"\\u{code:04X}", f"\\u{code:04x}", f"\\{chr(code)}"))
    return text[:place] + new + text[place + 1 :]


def change_pair(rng: random.Random, text: str) -> str:
    pairs = re.findall(r'"[^"{}\[\]:,]*":\s*(?:"[^"]*"|\[[^\[\]]*\]|\{[^{}]*\})', text)
    if not pairs:
        return text
    pair = rng.choice(pairs)
    return text.replace(pair, f"{pair},{rng.choice((pair, rng.choice(pairs)))}", 1)


def change_space(rng: random.Random, text: str) -> str:
    places = [m.start() for m in re.finditer(r"[\[\]{},:]", re.sub(r'"[^"]*"', _blank, text))]
    place = rng.choice(places or [0]) + rng.randrange(2)
    return text[:place] + rng.choice((" ", "\n", "\t", "\r", "  ", " " * 50)) + text[place:]


def _blank(match: re.Match[str]) -> str:
    return "_" * len(match[0])


TEXT = (change_number, change_piece, change_escape, change_pair, change_space, change_space)


# --- bytes, and mutations of them -----------------------------------------------------------------


def change_bytes(rng: random.Random, raw: bytes) -> bytes:
    place = rng.randrange(len(raw) + 1)
    length = rng.choice((1, 1, 2, 4, 16, 64))
    kind = rng.randrange(6)
    if kind == 0 and place < len(raw):
        return raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :]
    if kind == 1:
        return raw[:place] + rng.randbytes(length) + raw[place + length :]
    if kind == 2:
        return raw[:place] + raw[place + length :]
    if kind == 3:
        return raw[:place] + raw[place : place + length] + raw[place:]
    if kind == 4:
        return raw[:place]
    source = rng.randrange(len(raw) + 1)
    return raw[:place] + raw[source : source + length] + raw[place + length :]


class Mutant(NamedTuple):
    """A header as it is in the file, the bytes of data that follow, and what was done to it."""

    raw: bytes
    data: bytes
    kind: str


def mutant(rng: random.Random) -> Mutant:
    header, size = sound(rng)
    kind = rng.choices(
        ("sound", "structure", "text", "bytes", "mixed", "size"), (15, 35, 25, 10, 10, 5)
    )[0]
    times = rng.choice((1, 1, 1, 2, 3))
    if kind in ("structure", "mixed"):
        for _ in range(times):
            change_structure(rng, header)
    text = written(header, rng)
    if kind in ("text", "mixed"):
        for _ in range(times):
            text = rng.choice(TEXT)(rng, text)
    raw = text.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        for _ in range(times):
            raw = change_bytes(rng, raw)
    if kind == "size":
        size = max(0, size + rng.choice((-8, -4, -1, 1, 4, 8, 100, -size)))
    return Mutant(raw, PAYLOAD[:size], kind)


def damaged(rng: random.Random, made: Mutant) -> bytes:
    """Return a file with damage outside its header as well."""
    content = len(made.raw).to_bytes(8, "little") + made.raw + made.data
    kind = rng.randrange(5)
    if kind == 0:
        by = rng.choice((-9, -8, -1, 1, 8, 9, 100, 2**40, 2**63))
        length = (len(made.raw) + by) % 2**64
        return length.to_bytes(8, "little") + content[8:]
    if kind == 1:
        return content[: rng.randrange(len(content) + 1)]
    if kind == 2:
        return rng.randbytes(8) + content[8:]
    if kind == 3:
        return content
    return change_bytes(rng, content)


# --- indexes of shards ----------------------------------------------------------------------------

SHARDS = {
    "model-00001-of-00003.safetensors": ("a", "b"),
    "model-00002-of-00003.safetensors": ("c", "ключ", "a.b"),
    "model-00003-of-00003.safetensors": ("d",),
    "other.safetensors": ("e", "a"),  # has a tensor of the first
    "leer.safetensors": (),
    "ключ.safetensors": ("f",),
}
UNSOUND = {"cut.safetensors": ("x",), "text.safetensors": ("y",)}
GOOD = tuple(SHARDS)[:3]
OUTSIDE = "outside.safetensors"
SHARD_NAMES = (
    *SHARDS,
    *UNSOUND,
    *("gone.safetensors", "folder.safetensors", f"../{OUTSIDE}", f"folder.safetensors/{OUTSIDE}"),
    *("model.safetensors.index.json", "config.json", "", ".", "..", ".hidden.safetensors", "a\\b"),
    *("C:a.safetensors", f"./{GOOD[0]}", f"{GOOD[0]}\0", f"{GOOD[0]} ", GOOD[0].upper(), "\ud800"),
    *("x" * 300 + ".safetensors", "/etc/passwd", "\ud800.safetensors", "pipe.safetensors"),
)
TENSOR_NAMES = ("a", "b", "c", "d", "e", "f", "x", "A", "", "a ", METADATA, "\ud800", "ключ")


def make_shards(folder: Path) -> Path:
    """Make a folder of tiny shards, some not sound; return the path of their index."""

    def shard(path: Path, names: tuple[str, ...], cut: int | None = None) -> None:
        header = {
            name: {"dtype": "U8", "shape": [4], "data_offsets": [4 * n, 4 * n + 4]}
            for n, name in enumerate(names)
        }
        raw = json.dumps(header).encode()
        path.write_bytes((len(raw).to_bytes(8, "little") + raw + bytes(4 * len(names)))[:cut])

    inside = folder / "run"
    (inside / "folder.safetensors").mkdir(parents=True)
    for name, names in SHARDS.items():
        shard(inside / name, names)
    shard(inside / "cut.safetensors", UNSOUND["cut.safetensors"], -1)
    (inside / "text.safetensors").write_text("no shard")
    shard(inside / ".hidden.safetensors", ("a",))
    shard(folder / OUTSIDE, ("a",))
    shard(inside / "folder.safetensors" / OUTSIDE, ("a",))
    os.mkfifo(inside / "pipe.safetensors")
    return inside / "model.safetensors.index.json"


def map_mutant(rng: random.Random) -> bytes:
    shards = rng.choice((GOOD, GOOD, GOOD[:1], GOOD[1:], (*GOOD[1:], "other.safetensors")))
    if rng.random() < 0.2:
        shards = (*shards, "ключ.safetensors")
    pairs: Pairs = [(tensor, name) for name in shards for tensor in SHARDS[name]]
    top: Pairs = [("metadata", {"total_size": 4 * len(pairs)})]
    if rng.random() < 0.3:
        rng.shuffle(pairs)
    kind = rng.choices(("sound", "structure", "text", "bytes"), (15, 50, 20, 15))[0]
    times = rng.choice((1, 1, 2, 3))
    for _ in range(times if kind == "structure" else 0):
        change_map(rng, pairs, top)
    items = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs]
    inner = "{" + rng.choice((",", ", ", ",\n")).join(items) + "}"
    if kind == "structure" and rng.random() < 0.08:
        inner = json.dumps(pick(rng, (*ODD, list(shards), GOOD[0])))
    outer = [f"{json.dumps(n)}: {json.dumps(v)}" for n, v in top]
    outer.insert(rng.randrange(len(outer) + 1), f'"weight_map": {inner}')
    text = "{" + ",\n".join(outer) + "}\n"
    for _ in range(times if kind == "text" else 0):
        text = rng.choice((change_piece, change_escape, change_pair, change_space))(rng, text)
    raw = text.encode("utf-8", "surrogatepass")
    for _ in range(times if kind == "bytes" else 0):
        raw = change_bytes(rng, raw)
    return raw


def change_map(rng: random.Random, pairs: Pairs, top: Pairs) -> None:
    where = rng.randrange(len(pairs)) if pairs else None
    kind = rng.randrange(8)
    if kind == 0 or where is None:
        name = rng.choice(tuple(SHARDS))
        pairs += [(tensor, name) for tensor in SHARDS[name]]
    elif kind == 1:
        pairs.pop(where)
    elif kind == 2:
        pairs[where] = (pairs[where][0], rng.choice(SHARD_NAMES))
    elif kind == 3:
        pairs[where] = (pairs[where][0], rng.choice(ODD))
    elif kind == 4:
        pairs[where] = (rng.choice(TENSOR_NAMES), pairs[where][1])
    elif kind == 5:
        pairs.append(pairs[where])
    elif kind == 6:
        gone = pairs[where][1]  # a shard with all of its tensors
        pairs[:] = [pair for pair in pairs if pair[1] != gone]
    else:
        top.append((rng.choice(("metadata", "more", "weight_map")), pick(rng, (*ODD, math.nan))))
