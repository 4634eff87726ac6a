"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from pathlib import Path

from tok1d.errors import TokError


def store(path: str | Path, data: bytes, *, overwrite: bool = True) -> int:
    """Write bytes to a file, or to standard output for ``-``, and return how many.

    Raises:
        TokError: the file exists and ``overwrite`` is False, or it cannot be written.
    """
    if str(path) == "-":
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError as error:
            raise TokError(f"standard output cannot be written: {cause(error)}") from error
        return len(data)
    if not overwrite and os.path.lexists(path):
        raise TokError(f"{path} exists already. Choose another name, or allow overwriting (-f, overwrite=True)")
    atomic_write(path, data)
    return len(data)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a file so that readers, and a crash, see the old content or the new, never a part.

    A link is followed; a device or pipe (``/dev/null``, ``/dev/stdout``) is written to directly.

    Raises:
        TokError: the file cannot be written; what was there before is untouched.
    """
    temporary = None
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            with open(path, "wb") as device:
                device.write(data)
            return
        target = Path(os.path.realpath(path))
        temporary = target.parent / f".tok1d-{secrets.token_hex(8)}.tmp"
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, ValueError)):
            raise TokError(f"{path} cannot be written: {cause(error)}") from error
        raise


def cause(error: Exception) -> str:
    """Why the operating system refused, in its words."""
    return getattr(error, "strerror", None) or str(error)
