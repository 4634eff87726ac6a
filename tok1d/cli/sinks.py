"""Where encoded tokens go: a file for each image, one file of many images, or standard output."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from tok1d.cli.paths import Job

if TYPE_CHECKING:
    from tok1d.tokens import TokenSequence


class Sink(Protocol):
    """What takes the tokens of one image after the other."""

    def meta(self, job: Job) -> dict[str, Any] | None:
        """The JSON block that the record of this image will carry."""

    def put(self, job: Job, seq: TokenSequence) -> int:
        """Store one image; its bytes, 0 if they are not known yet."""

    def close(self) -> None:
        """All images are stored: make the output appear."""

    def abort(self) -> None:
        """Leave nothing unfinished behind."""


class Separate:
    """A file for each image."""

    def meta(self, job: Job) -> dict[str, Any] | None:
        """Nothing: the file has the name."""
        return None

    def put(self, job: Job, seq: TokenSequence) -> int:
        """Write one file, atomically; its size in bytes."""
        from tok1d.token_formats import write_tokens

        assert job.target is not None
        job.target.parent.mkdir(parents=True, exist_ok=True)
        return write_tokens(seq, job.target)

    def close(self) -> None:
        """Nothing is open."""

    abort = close


class Whole:
    """One file, or standard output, for all images, with their names where there are several.

    .tok records are streamed (to a temporary file that becomes the output at the end); the other formats are one table
    and are written at the end.
    """

    def __init__(self, target: str, kind: str, *, named: bool) -> None:
        self.target, self.kind, self.named = target, kind, named
        self.parts: list[TokenSequence] = []
        self.names: list[str] = []
        self.temporary: Path | None = None
        self.stream: BinaryIO | None = None
        if target == "-":
            self.stream = sys.stdout.buffer
        elif kind == "tok":
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            self.temporary = Path(target).with_name(f".tok1d-{os.getpid()}-{Path(target).name}")
            self.stream = open(self.temporary, "wb")  # noqa: SIM115  (close() and abort() close it)

    def meta(self, job: Job) -> dict[str, Any] | None:
        """The JSON block of the record."""
        return {"name": job.item.name} if self.named else None

    def put(self, job: Job, seq: TokenSequence) -> int:
        """Append one image."""
        if self.stream is None:
            self.parts.append(seq)
            self.names.append(job.item.name)
            return 0
        from tok1d import tokfile

        data = tokfile.pack(seq, self.meta(job))
        self.stream.write(data)
        if self.temporary is None:
            self.stream.flush()  # whoever reads the pipe gets each image when it is ready
        return len(data)

    def close(self) -> None:
        """Make the output appear; nothing appears if no image could be encoded."""
        if self.temporary is not None and self.stream is not None:
            empty = self.stream.tell() == 0
            self.stream.close()
            if empty:
                self.temporary.unlink()
            else:
                os.replace(self.temporary, self.target)
        elif self.parts:
            from tok1d.token_formats import write_tokens
            from tok1d.tokens import TokenSequence

            Path(self.target).parent.mkdir(parents=True, exist_ok=True)
            write_tokens(TokenSequence.stack(self.parts), self.target, self.names if self.named else None)

    def abort(self) -> None:
        """Leave nothing behind."""
        if self.temporary is not None and self.stream is not None:
            self.stream.close()
            self.temporary.unlink(missing_ok=True)
