"""What stands where a file was expected: the pointer of a Git clone, the page of a failed download.

It knows the first bytes of such, and no format.
"""

from __future__ import annotations

__all__ = ["stand_in"]


def stand_in(start: bytes) -> str | None:
    """Say by its first bytes what stands in a file's place, or None.

    >>> stand_in(b"<!DOCTYPE html><html>")
    'this is a web page; the download did not give the file itself'
    """
    text = start.lstrip().lower()
    if not start:
        return "the file is empty"
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git-LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html")):
        return "this is a web page; the download did not give the file itself"
    return None
