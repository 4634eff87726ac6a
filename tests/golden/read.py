"""Recorded inputs, weights and outputs of published implementations: read them and compare with ours."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass
class Golden:
    """One recorded case: ``state`` under published keys, ``inputs`` and ``outputs`` by name, ``meta`` from the header."""

    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    meta: dict[str, Any]

    def check(self, name: str, ours: Tensor) -> None:
        """``ours`` equals the recorded output: integers exactly, floats within its own atol and rtol."""
        wanted, atol = self.outputs[name], self.meta["atol"]
        if not wanted.is_floating_point():
            assert ours.dtype == torch.int64 and torch.equal(ours, wanted.long()), name
            return
        atol = atol[name] if isinstance(atol, dict) else atol
        torch.testing.assert_close(ours, wanted, atol=atol, rtol=self.meta["rtol"], msg=lambda m: f"{name}: {m}")


def read(case: str) -> Golden:
    """Read ``tests/golden/<case>.safetensors``."""
    with safe_open(Path(__file__).with_name(f"{case}.safetensors"), "pt") as file:
        parts: dict[str, dict[str, Tensor]] = {"sd": {}, "in": {}, "out": {}}
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition(".")
            parts[kind][name] = file.get_tensor(key)
        return Golden(parts["sd"], parts["in"], parts["out"], json.loads(file.metadata()["golden"]))


def sub(golden: Golden, case: str) -> Golden:
    """One case of a file that holds several under ``<case>.<name>``."""
    cut = {
        kind: {k.removeprefix(f"{case}."): v for k, v in getattr(golden, kind).items() if k.startswith(f"{case}.")}
        for kind in ("inputs", "outputs")
    }
    return Golden({}, **cut, meta={**golden.meta, **golden.meta["cases"][case]})


def tokens_last(x: Tensor) -> Tensor:
    """Published (B, C, 1, L) → ours (B, L, C)."""
    return x[:, :, 0].transpose(1, 2)
