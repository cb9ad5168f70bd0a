"""What stands at a path that was named as an input, told apart from what may not be seen there.

`os.path.isfile` and its like say that there is nothing where the system does not let a user look; a
checkpoint would be passed over, or taken for lost.
"""

from __future__ import annotations

import errno
import os
import stat

from wavg.errors import InputError

__all__ = ["is_file", "is_folder", "look"]

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)  # the last on Windows


def look(path: str) -> os.stat_result | None:
    """Return what the system says of the file or folder at a path; None if there is none.

    Links are followed; one that leads to nothing is nothing.

    Raises
    ------
    PermissionError
        This user may not see whether there is one.
    InputError
        No file can have the name, or the system cannot say.
    """
    try:
        return os.stat(path)
    except PermissionError:
        raise
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise InputError(
            f"cannot read {path}: {error.strerror}", path=path, errno=error.errno
        ) from error
    except ValueError:  # it has a zero byte, or half a character
        raise InputError(
            f"cannot read {path!a}: no file can have this name", path=path, errno=errno.EINVAL
        ) from None


def is_file(path: str) -> bool:
    """Whether there is a regular file; errors are those of `look`."""
    status = look(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_folder(path: str) -> bool:
    """Whether there is a folder; errors are those of `look`."""
    status = look(path)
    return status is not None and stat.S_ISDIR(status.st_mode)
