"""``tok fit``: LightningCLI with the defaults of this project."""

from __future__ import annotations

from pathlib import Path

from tok1d.errors import UsageError
from tok1d.extras import require


def find_config(name: str) -> str:
    """A path as it is, or ``debug/fsq`` → configs/debug/fsq.yaml under the working folder.

    Raises:
        UsageError: no such file, with the nearest names.
    """
    import difflib

    if Path(name).is_file():
        return name
    home = Path("configs")
    known = {str(p.relative_to(home).with_suffix("")): str(p) for p in sorted(home.rglob("*.yaml"))}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, 3, 0.4) or list(known)
    raise UsageError(f"no configuration {name!r}; give a YAML file or one of configs/: {', '.join(close) or 'none here'}")


def fit(arguments: list[str]) -> None:
    """Run LightningCLI's ``fit`` with command-line arguments (``--config FILE`` …)."""
    require("lightning", "train")
    require("jsonargparse", "train")
    from lightning.pytorch.cli import LightningCLI

    from tok1d.data.module import PhotoData
    from tok1d.training.tasks import ReconstructionTask

    arguments = list(arguments)
    for i, word in enumerate(arguments):
        if word in ("-c", "--config") and i + 1 < len(arguments):
            arguments[i + 1] = find_config(arguments[i + 1])
        elif word.startswith("--config="):
            arguments[i] = "--config=" + find_config(word.partition("=")[2])
    LightningCLI(
        ReconstructionTask,
        PhotoData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=["fit", *arguments],
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"fit": {"default_env": False}},
    )
