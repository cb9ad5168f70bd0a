"""Who may use a file that takes the place of another: what is kept of mode, owner and access list.

Whoever could not read what stood there cannot read what comes in its place.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Access", "access_of", "give"]

# Access lists beyond the mode (POSIX ACLs): a file's own, and what a folder gives to new files.
_OWN, _GIVEN = "system.posix_acl_access", "system.posix_acl_default"
_LISTS = (_OWN, _GIVEN) if hasattr(os, "getxattr") else ()


class Access(NamedTuple):
    """Mode, owner, group and access lists of a file or folder."""

    mode: int
    owner: int
    group: int
    lists: Mapping[str, bytes]

    def private(self) -> Access:
        """Return the same for what is still in the making: for its owner, who may do all."""
        return self._replace(mode=self.mode & ~0o077 | 0o700)

    def unlisted(self) -> Access:
        """Return the same without its own list, which speaks of a group that is not kept."""
        return self._replace(lists={n: data for n, data in self.lists.items() if n != _OWN})


def access_of(path: str) -> Access | None:
    """Return who may use what stands at a path; None if nothing does."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode):
        mode &= 0o777  # a program of another owner does not become one of ours
    return Access(mode, status.st_uid, status.st_gid, _lists_of(path))


def give(path: str, descriptor: int, access: Access) -> None:
    """Give a file or folder, open or not (-1), that access, or less where the system refuses.

    The owner can be kept by root, the group by its members. Where it is another group, or a list is
    lost, group and others get what both had before. They get nothing if there was a list of the
    file's own, for that may have kept somebody out whom the mode lets in.
    """
    target = descriptor if descriptor >= 0 and os.chmod in os.supports_fd else path
    mode = access.mode
    owned = _owned(target, access)
    listed = _listed(target, access if owned else access.unlisted())
    if not (owned and listed):
        both = 0 if _OWN in access.lists else mode >> 3 & mode & 0o007
        mode = mode & ~0o077 | both << 3 | both
    if stat.S_IMODE(os.stat(target).st_mode) != mode:  # not all file systems have modes to change
        os.chmod(target, mode)


def _owned(target: str | int, access: Access) -> bool:
    """Have owner and group as they were; whether the group is."""
    now = os.stat(target)
    if not hasattr(os, "chown") or (now.st_uid, now.st_gid) == (access.owner, access.group):
        return True
    for owner in (access.owner, -1):
        with contextlib.suppress(OSError):
            os.chown(target, owner, access.group)
            return True
    return now.st_gid == access.group


def _listed(target: str | int, access: Access) -> bool:
    """Have access lists as they were, or none; whether they are."""
    for name in _LISTS:
        if name not in access.lists:  # the folder may have given one
            with contextlib.suppress(OSError):
                os.removexattr(target, name)
    with contextlib.suppress(OSError):
        for name, data in access.lists.items():
            os.setxattr(target, name, data)
    return _lists_of(target) == access.lists


def _lists_of(target: str | int) -> dict[str, bytes]:
    lists = {}
    for name in _LISTS:
        with contextlib.suppress(OSError):  # none, or no such thing here
            lists[name] = os.getxattr(target, name)
    return lists
