"""A tiny model folder, image folders, and a way to run ``tok`` in this process."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dct_model import picture, save_model
from tok1d.cli.main import main
from tok1d.image_io import write


@dataclass
class Result:
    code: int
    out: str
    err: str
    data: bytes = b""

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


class Pipe(io.TextIOWrapper):
    """A standard stream over bytes."""

    def __init__(self, data: bytes = b"", errors: str = "strict") -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", errors=errors, write_through=True)

    def bytes(self) -> bytes:
        return self.buffer.getvalue()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "dct")


@pytest.fixture(scope="session")
def fixed_model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "fixed", nested=False, name="dct-fixed")


@pytest.fixture
def tok(monkeypatch, model):
    """``tok("encode", path, …)`` → Result; the tiny model stands for the default one; ``stdin=`` bytes."""
    from tok1d import hub

    monkeypatch.setattr(hub, "_shipped", lambda name: model)

    def run(*args: object, stdin: bytes = b"") -> Result:
        out, err = Pipe(), Pipe(errors="backslashreplace")  # as Python sets them up
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", Pipe(stdin))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            code = main([str(a) for a in args])
        data = out.bytes()
        return Result(code, data.decode("utf-8", errors="replace"), err.bytes().decode(), data)

    return run


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    write(path, picture(1, 40, 56))
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """photos/{a,b}.png, photos/sub/c.jpg, photos/sub/deep/d.webp and what is to be left out."""
    folder = tmp_path / "photos"
    (folder / "sub" / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.jpg", "sub/deep/d.webp")):
        write(folder / name, picture(i, 20 + i, 30))
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"no")
    return folder
