"""Tables in JSON, in which no name may be there twice: one of the two would be lost unnoticed."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

__all__ = ["without_twins"]


def without_twins(
    bad: Callable[[str, str], Exception],
) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Return an ``object_pairs_hook``; `bad` makes an error of a reason and the name concerned.

    >>> import json
    >>> json.loads('{"a": 1, "a": 2}', object_pairs_hook=without_twins(KeyError))
    Traceback (most recent call last):
    KeyError: ("'a' appears twice in it", 'a')
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((name, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
            raise bad(f"{name!r} appears twice in it", name)
        return result

    return table
