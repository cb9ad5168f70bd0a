"""What came of comparisons, in words: what was compared, what not, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

__all__ = ["Findings", "joined", "shortened"]

_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Findings:
    """What one comparison says, or several together; the attributes are `Verification`'s."""

    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def joined(findings: Iterable[Findings]) -> Findings:
    """Return what several comparisons say, in their order.

    >>> joined([Findings(faults=("a",)), Findings(faults=("b",), notes=("c",))])
    Findings(checked=(), unchecked=(), faults=('a', 'b'), notes=('c',))
    """
    several = list(findings)
    names = [field.name for field in fields(Findings)]
    return Findings(*(tuple(text for f in several for text in getattr(f, n)) for n in names))


def shortened(text: str) -> str:
    """Return a text of a file, or its beginning, for a message.

    >>> shortened("short"), len(shortened("long" * 99))
    ('short', 60)
    """
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
