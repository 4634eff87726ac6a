"""``tok fit``: LightningCLI with the defaults of this project.

Beside what a configuration says, every run has: checkpoints written atomically and read without running code, a
checkpoint when it is told to stop and after its last step, and no sampler but the data module's own.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tok1d.errors import TokError, UsageError
from tok1d.extras import require


def find_config(name: str) -> str:
    """A path as it is, or ``debug/titok_fsq`` → configs/debug/titok_fsq.yaml under the working folder or the repository.

    Raises:
        UsageError: no such file, with the nearest names.
    """
    import difflib

    if Path(name).is_file():
        return name
    homes = [Path("configs"), Path(__file__).resolve().parents[2] / "configs"]
    known: dict[str, str] = {}
    for home in homes:
        for path in sorted(home.rglob("*.yaml")):
            known.setdefault(path.relative_to(home).with_suffix("").as_posix(), str(path))
    for given in (name, name.removeprefix("configs/").removesuffix(".yaml")):
        if given in known:
            return known[given]
    close = difflib.get_close_matches(name, known, 3, 0.4) or list(known)
    raise UsageError(f"no configuration {name!r}; give a YAML file or one of configs/: {', '.join(close) or 'none here'}")


def fit(arguments: list[str]) -> int:
    """Run LightningCLI's ``fit`` with command-line arguments (``--config FILE`` …) and return the exit code.

    Raises:
        UsageError: unknown configuration or option, wrong value, missing checkpoint.
        MissingExtraError: lightning or jsonargparse is not installed.
    """
    require("lightning", "train")
    require("jsonargparse", "train")
    from tok1d.training.checkpoints import SaveOnStop

    saver = SaveOnStop()
    cli = _cli_class()
    with _quiet(), _no_denormals():
        try:
            cli(_with_paths(arguments), saver)
        except SystemExit as stop:  # --help and --print_config, and how Lightning ends interrupted runs
            if saver.stopped_by is not None:
                return 128 + saver.stopped_by
            return stop.code if isinstance(stop.code, int) else 0
        except ValueError as error:  # jsonargparse wraps what a constructor raised
            raise _own_error(error) or UsageError(_one_line(str(error))) from error
    return 0


def _own_error(error: BaseException | None) -> TokError | None:
    """The error of ours that another one was raised from."""
    while error is not None and not isinstance(error, TokError):
        error = error.__cause__ or error.__context__
    return error


def _with_paths(arguments: list[str]) -> list[str]:
    """The arguments with names of configurations replaced by their files; a missing checkpoint is noticed here."""
    found = list(arguments)
    for i, word in enumerate(found):
        flag, equals, value = word.partition("=")
        if flag not in ("-c", "--config", "--ckpt_path") or (not equals and i + 1 == len(found)):
            continue
        value = value if equals else found[i + 1]
        if flag == "--ckpt_path":
            if value not in ("last", "best", "null") and "://" not in value and not Path(value).is_file():
                raise UsageError(f"--ckpt_path {value}: no such checkpoint; give a .ckpt file, or 'last' for the newest of this run")
        elif equals:
            found[i] = f"{flag}={find_config(value)}"
        else:
            found[i + 1] = find_config(value)
    return found


def _cli_class() -> Any:
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningCLI

    from tok1d.training.checkpoints import SafeCheckpointIO, SaveOnStop
    from tok1d.training.tasks import TrainingTask

    class Run(LightningCLI):
        def __init__(self, arguments: list[str], saver: SaveOnStop) -> None:
            super().__init__(
                TrainingTask,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={"use_distributed_sampler": False, "callbacks": [saver]},
                parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
                args=["fit", *arguments],
            )

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}}

        def parse_arguments(self, parser: Any, args: Any) -> None:
            from jsonargparse import ArgumentError

            try:
                self.config = parser.parse_args(args)
            except ArgumentError as error:
                raise UsageError(_one_line(str(error))) from error

        def _parse_ckpt_path(self) -> None:
            """Lightning reads hyper-parameters from the checkpoint here; ours hold none, and are read once, safely, later."""

        def fit(self, **kwargs: Any) -> None:
            self.trainer.fit(**kwargs, weights_only=True)

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            if self._get(self.config_init, "trainer").get("enable_progress_bar") is None and not sys.stderr.isatty():
                kwargs.setdefault("enable_progress_bar", False)
            plugins = self._get(self.config_init, "trainer").get("plugins") or []
            plugins = plugins if isinstance(plugins, list) else [plugins]
            return super().instantiate_trainer(plugins=[*plugins, SafeCheckpointIO()], **kwargs)

    return Run


def _one_line(text: str) -> str:
    """The innermost complaint of jsonargparse and the key it is about; it explains every type it tried, over many lines."""
    keys = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    frame = ("Parser key", "Does not validate", "Subtypes:", "Errors:", "- Problem with", "Problem with", "Given value")
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith(frame) and "NoneType" not in line]
    deepest = max(lines, key=lambda line: len(line) - len(line.lstrip(" -")), default=text)
    return f"{keys}: {deepest.strip(' -')}"[:400] if keys else deepest.strip(" -")[:400]


@contextmanager
def _no_denormals() -> Iterator[None]:
    """Numbers too small for a normal float32 become zero; averages and moments that fade out make CPUs crawl otherwise."""
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says about choices that are meant: no loader processes for small sets, a folder that exists."""

    class Useful(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return "Tip:" not in record.getMessage()

    useful = Useful()
    noisy = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    noisy.addFilter(useful)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*args parameter is intended to run from within Python.*",
            ".*exists and is not empty.*",
            r".*module\(s\) in eval mode at the start of training.*",
            r".*isinstance\(treespec, LeafSpec\)",
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            noisy.removeFilter(useful)


