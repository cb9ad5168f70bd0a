"""Adapters of PEFT: ``adapter_model.safetensors`` with an ``adapter_config.json`` beside it.

What the numbers mean is told by the configuration alone: half the rank's scale is half the update.
So adapters belong together only where the settings agree that their numbers stand for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from wavg.errors import CheckpointFormatError, StructureMismatchError
from wavg.places import is_file

__all__ = ["refuse_unlike"]

_CONFIG = "adapter_config.json"
_LARGEST = 10 << 20
_SETTINGS = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("target_modules", "target_parameters", "fan_in_fan_out"),
)


def refuse_unlike(paths: Sequence[str]) -> None:
    """Raise an error unless all of these are no adapters, or adapters with the same settings.

    Raises
    ------
    StructureMismatchError
        Ranks, scales or what they apply to differ from the newest's; every difference is listed.
    CheckpointFormatError
        A configuration cannot be understood.
    """
    settings = [_read(path) for path in paths]
    newest = settings[-1]
    differences = []
    for path, found in zip(paths[:-1], settings[:-1], strict=True):
        if (found is None) != (newest is None):
            differences.append(f"{path}: {'no' if found is None else 'an'} adapter with {_CONFIG}")
        elif found is not None and newest is not None:
            differences += [
                f"{path}: {name} is {_text(found[name])}; the newest's is {_text(newest[name])}"
                for name in _SETTINGS
                if found[name] != newest[name]
            ]
    if differences:
        count = f"{len(differences):,} difference{'s' * (len(differences) != 1)}"
        raise StructureMismatchError(
            f"{count} between the adapters and the newest, {paths[-1]}, whose mean would mean "
            "nothing:",
            differences=differences,
        )


def _read(path: str) -> dict[str, Any] | None:
    """Return an adapter's settings in a form that compares; None for what is no adapter."""
    folder, name = os.path.split(path)
    config = os.path.join(folder, _CONFIG)
    if not name.startswith("adapter_model.") or not is_file(config):
        return None
    try:
        with open(config, "rb") as file:
            raw = file.read(_LARGEST + 1)
        content = json.loads(raw[:_LARGEST].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad(config, f"it is not JSON ({error})") from None
    if not isinstance(content, dict) or len(raw) > _LARGEST:
        raise _bad(config, "it is not a table, or a very large one")
    return {setting: _plain(content.get(setting)) for setting in _SETTINGS}


def _plain(value: Any) -> Any:
    """Return a value so that none, an empty table and false are one, and lists have no order."""
    if isinstance(value, list):
        return sorted(value, key=str)
    return value or None


def _text(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def _bad(path: str, why: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path}: no sound configuration: {why}", path=path)
