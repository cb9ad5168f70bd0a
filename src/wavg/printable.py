"""Texts of others as a person is shown them: names of files and tensors, words of programs.

They may hold anything: line breaks that forge lines, codes that steer a terminal, half a character,
a megabyte. Errors, warnings and tables show them by this module; programs get them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["padded", "printable"]

_LONGEST = 2000  # a line of an error, with two paths as long as people have them
_LONGEST_CELL, _WIDEST = 400, 100


def printable(text: str, most: int = _LONGEST) -> str:
    r"""Return a text as one line, of about `most` characters, that cannot steer a terminal.

    >>> print(printable("w\x1b[2J\n"), printable("gewöhnlich"))
    w\x1b[2J\n gewöhnlich
    >>> printable("w" * 1_000_000, 60)
    'wwwwwwwwww...[1,000,000 characters]...wwwwwwwwww'
    """
    if len(text) > most:
        half = (most - 40) // 2
        text = f"{text[:half]}...[{len(text):,} characters]...{text[-half:]}"
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def padded(texts: Iterable[str]) -> list[str]:
    r"""Return texts as cells of a table's first column: printable, and of one width.

    The width is bounded: what is longer sticks out, and costs the other lines nothing.

    >>> padded(["name", "a\nb", "w"])
    ['name', 'a\\nb', 'w   ']
    """
    cells = [printable(text, _LONGEST_CELL) for text in texts]
    width = max((len(cell) for cell in cells if len(cell) <= _WIDEST), default=0)
    return [cell.ljust(width) for cell in cells]
