"""Mutants of the header of an array's file, ``.npy``: the text of a Python literal.

Used by zip_mutants.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from zip_records import some_number

DESCRS = (
    *("'<f4'", "'<f2'", "'<f8'", "'<i8'", "'|u1'", "'|b1'", "'<c8'", "'>f4'", "'=f4'", "'f4'"),
    *("'f'", "'float32'", "'<V2'", "'|V2'", "'|V4'", "'|O'", "'O'", "'<U2'", "'|S4'", "'<M8[s]'"),
    *("'<f16'", "'<g'", "'bfloat16'", "'<f3'", "''", "'f4,i4'", "'(2,)f4'", "'V'", "'<f4 '"),
    *("[('bfloat16', '<u2')]", "[('float8_e4m3fn', '|u1')]", "[('bfloat16', '<u4')]", "['<f4']"),
    *("[('a', '<f4')]", "[('bfloat16', '<u2', (2,))]", "[('', '|V2')]", "[('bfloat16', '>u2')]"),
    *("[('a', '<f4'), ('b', '<i2')]", "[(('t', 'bfloat16'), '<u2')]", "('<f4', (2,))", "[]", "()"),
    *("{'names': ['a'], 'formats': ['<f4']}", "None", "4", "b'<f4'", "True", "['f']"),
    *("',<f4'", "'<f4,'", "'(2'", "'f99'", "'a4'", "'c'", "'|c1'", "'?'", "'<f04'", "'(f4'"),
    *("'i'", "'l'", "'float8_e4m3fn'", "'<b1'", "'" + "9" * 30 + "'", "'$f4'", "'<f\u0664'"),
    *("[('bfloat16', 'u2')]", "[('int4', '|u1')]", "('<u2', 'bfloat16')", "u'<f4'", "'<' 'f4'"),
)  # fmt: skip
SHAPE_TEXTS = (
    *("()", "(1,)", "(2,)", "(4)", "4", "[4]", "(2, 2)", "(-1,)", "(-1, -1)", "(True,)", "(4L,)"),
    *("(0, -1)", "(0,)", "(9223372036854775807,)", "(9223372036854775808,)", "(1.0,)", "(None,)"),
    *("(0, 9223372036854775807)", "(4294967296, 4294967296)", "(2147483648, 2147483648, 0)"),
    *("(1_0,)", "(0x4,)", "(0b1,)", "(+1,)", "(--1,)", "(1+1j,)", "'4'", "((4,),)", "(1,)*4"),
    *("(2**62,)", "(99999999999999999999999999,)", "(" + "1," * 40 + ")", "(" + "1," * 70 + ")"),
    *("(18446744073709551616,)", "(1152921504606846976,)", "(4611686018427387904, 4)", "(,)"),
    *("(2, 2,)", "set()", "{1}", "(" + "9" * 5000 + ",)", "(False, 3)", "(-0,)", "(3 , 4)"),
)
PIECES = (
    *("{", "}", "(", ")", "[", "]", ",", ":", "'", '"', " ", "\n", "\\", "\0", "\t", "#", ";"),
    *("'more': 1, ", "'shape': (1,), ", "'descr': '<f4', ", "'fortran_order': True, ", "\\x41"),
    *("é", "\xa0", "\f", "\r", "L", "f'", "b'", "r'", "u'", "1", "-", "+", "not ", "lambda: "),
    *("...", "*", "**{}", "a", "__import__('os')", "(" * 150, "[" * 190, "-" * 900, "1+" * 900),
    *("{1:" * 90, "not " * 400, "True", "None", "0777", "1e5", "'''", "\\\n", "\ufeff", "'' "),
)
HEADER = re.compile(rb"\x93NUMPY([\x01-\x03])\0(..)", re.DOTALL)


class Npy(NamedTuple):
    """An array's file: its version, the text of its header, and its numbers."""

    version: int
    text: str
    data: bytes

    @classmethod
    def of(cls, content: bytes) -> Npy | None:
        if HEADER.match(content) is None:
            return None
        width = 2 if content[6] == 1 else 4
        length = int.from_bytes(content[8 : 8 + width], "little")
        text = content[8 + width : 8 + width + length]
        return cls(content[6], text.decode("latin1"), content[8 + width + length :])

    def content(self, rng: random.Random) -> bytes:
        text = self.text.encode("utf-8" if self.version == 3 else "latin1", "replace")
        length, version = len(text), self.version
        if rng.random() < 0.05:
            length = some_number(rng, length)
        if rng.random() < 0.05:
            version = rng.choice((0, 1, 2, 3, 4, 255))
        width = 2 if version == 1 else 4
        minor = 0 if rng.random() < 0.97 else rng.randrange(256)
        head = b"\x93NUMPY" + bytes([version, minor])
        return head + (length % (1 << 8 * width)).to_bytes(width, "little") + text + self.data


def change_header(rng: random.Random, npy: Npy) -> Npy:
    """Change the text of a header, or how many bytes follow it."""
    kind, text = rng.randrange(12), npy.text
    if kind in (0, 1):
        text = re.sub(r"'descr':\s*(\[.*?\]|'[^']*')", _put(f"'descr': {rng.choice(DESCRS)}"), text)
    elif kind in (2, 3):
        text = re.sub(r"'shape':\s*\([^)]*\)", _put(f"'shape': {rng.choice(SHAPE_TEXTS)}"), text)
    elif kind == 4:
        order = rng.choice(("True", "False", "1", "0", "None", "'True'", "not 1", "true"))
        text = re.sub(r"'fortran_order':\s*\w+", _put(f"'fortran_order': {order}"), text)
    elif kind == 5:  # the numbers of the shape
        numbers = [match.span() for match in re.finditer(r"(?<=[( ])\d{1,30}(?=[,)])", text)]
        if numbers:
            start, end = rng.choice(numbers)
            new = rng.choice((str(int(text[start:end]) + rng.choice((-1, 1))), "0", "-1", "1L",
                              "1" + "0" * 18, f"{text[start:end]}L", "00", "True"))  # fmt: skip
            text = text[:start] + new + text[end:]
    elif kind in (6, 7):
        place = rng.randrange(len(text) + 1)
        if rng.random() < 0.6:
            places = [match.start() for match in re.finditer(r"[{}(),:'\[\]]", text)]
            place = rng.choice(places or [place]) + rng.randrange(2)
        cut = rng.choice((0, 0, 0, 1, 1, 2, 8))
        text = text[:place] + rng.choice((*PIECES, "", " ")) + text[place + cut :]
    elif kind == 8:
        pairs = re.findall(r"'\w+':\s*(?:\[.*?\]|\([^)]*\)|'[^']*'|\w+)", text)
        rng.shuffle(pairs)
        again = pairs[: rng.choice((0, 0, 1))]
        pairs = pairs[: rng.choice((1, 2, 3, 3, 3))] + again
        text = "{" + ", ".join(pairs) + rng.choice(("", ",", ", ")) + "}\n"
    elif kind == 9:
        text = rng.choice((text.strip(), text + " " * rng.choice((1, 63, 12_000, 70_000)),
                           " " + text, "\n" + text, text.rstrip() + ";", f"({text})",
                           text.replace("'", '"'), text.rstrip() + "\n\n# a comment"))  # fmt: skip
    elif kind == 10:
        by = rng.choice((1, 2, 4, 8, 100))
        data = npy.data + rng.randbytes(by) if rng.random() < 0.5 else npy.data[:-by]
        return npy._replace(data=data)
    else:
        return npy._replace(version=rng.choice((1, 2, 3)))
    return npy._replace(text=text)


def _put(new: str) -> Callable[[re.Match], str]:
    return lambda match: new
