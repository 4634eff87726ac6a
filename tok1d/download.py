"""Fetch the files of one model from the Hugging Face hub into its cache: only those that are needed, checked once.

Progress bars, resumed downloads, tokens and ``HF_HUB_OFFLINE`` are huggingface_hub's. It compares sizes; contents are
compared here, with the SHA-256 that the hub tells of large files and with the one our table may know.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path
from typing import Any

from tok1d.errors import ModelError
from tok1d.sources import CONFIG, INDEX, OUR_HEAD, OUR_WEIGHTS, STANDARD_WEIGHTS, SUFFIXES, HubName, only, shard_names

CARD = "README.md"


def fetch(
    source: HubName, *, ours: bool = True, sha256: str | None = None, progress: bool = True, cached: bool = False
) -> Path:
    """Fetch config.json, weights and card of a model, as far as they are not in the cache.

    Args:
        source: repository; with a file, that file (and, for a standard name, the config.json beside it).
        ours: whether it may be a model folder of ours.
        sha256: hexadecimal, of the weights.
        progress: whether bars are shown on a terminal.
        cached: take what was fetched before, ask nobody.

    Returns:
        The folder, or the file if one was asked for or is all there is.

    Raises:
        ModelError: no such repository, revision or file, no access, no connection, or contents that are not what the hub
            announced.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(f"{source}: models on the hub need the package huggingface_hub: pip install huggingface_hub") from error
    bars: Any = importlib.import_module("huggingface_hub.utils")
    silenced = not progress and not bars.are_progress_bars_disabled()
    if silenced:
        bars.disable_progress_bars()
    try:
        return _Fetch(huggingface_hub, source, sha256, cached).model(ours)
    finally:
        if silenced:
            bars.enable_progress_bars()


class _Fetch:
    """The requests for one model; after the first one that finds no hub, the cache alone is asked."""

    def __init__(self, client: Any, source: HubName, sha256: str | None, cached: bool) -> None:
        self.client, self.source, self.sha256 = client, source, sha256
        self.unreachable: Exception | None = FileNotFoundError("not fetched yet") if cached else None

    def model(self, ours: bool) -> Path:
        if self.source.file:
            path = self.file(self.source.file, weights=True)
            if path is None:
                raise self.nothing(f"there is no file {self.source.file}")
            folder, _, name = self.source.file.rpartition("/")
            if name in STANDARD_WEIGHTS:
                self.file(f"{folder}/{CONFIG}".lstrip("/"))
            return path
        for name in ((OUR_WEIGHTS,) if ours else ()) + STANDARD_WEIGHTS:
            path = self.file(name, weights=name != INDEX)
            if path is None:
                continue
            if name == INDEX:
                self.shards(path)
            config = self.file(CONFIG)
            if name == OUR_WEIGHTS and config is not None and b'"halting"' in config.read_bytes():
                self.file(OUR_HEAD)
            self.file(CARD)
            return path.parent
        single = self.only_weights()
        path = self.file(single, weights=True) if single else None
        if path is None:
            raise self.nothing("it holds no weights (*.safetensors or *.bin)")
        return path

    def file(self, name: str, *, weights: bool = False) -> Path | None:
        """One file, None if the repository (or, without connection, the cache) has none of that name."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        repo, revision = self.source.repo, self.source.revision
        before = self.client.try_to_load_from_cache(repo, name, revision=revision)
        try:
            found = self.client.hf_hub_download(repo, name, revision=revision, local_files_only=self.unreachable is not None)
        except LocalEntryNotFoundError as error:
            self.unreachable = self.unreachable or error
            return None
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub client raises its own, its HTTP library's and OS errors
            raise ModelError(trouble(self.source, error)) from error
        path = Path(found)
        cached = isinstance(before, str) and Path(before).resolve() == path.resolve()
        self.check(path, self.sha256 if weights else None, cached)
        return path

    def check(self, path: Path, wanted: str | None, cached: bool) -> None:
        """Compare contents that have just come, or that the cache does not name by the SHA-256 we know."""
        blob = path.resolve()
        announced = blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else None  # the hub's ETag of large files
        wanted = wanted or announced
        if wanted is None or (cached and wanted == announced):
            return
        with open(blob, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != wanted:
            path.unlink()
            blob.unlink(missing_ok=True)
            raise ModelError(
                f"{self.source}: {path.name} came with SHA-256 {found[:16]}…, expected {wanted[:16]}…; it was removed. Try again; "
                "if it stays so, the file on the hub was replaced: choose the revision that you trust, owner/name@revision"
            )

    def shards(self, index: Path) -> None:
        for name in sorted(set(shard_names(index).values())):
            if self.file(name, weights=False) is None:
                raise self.nothing(f"there is no file {name}, which {INDEX} names")

    def only_weights(self) -> str | None:
        """The one weights file of a repository without one of a standard name."""
        if self.unreachable is not None:
            return None
        try:
            names = self.client.HfApi().list_repo_files(self.source.repo, revision=self.source.revision)
        except Exception as error:
            raise ModelError(trouble(self.source, error)) from error
        loose = sorted(n for n in names if Path(n).suffix in SUFFIXES and "/" not in n)
        below = sorted(n for n in names if n.count("/") == 1 and n.endswith(f"/{STANDARD_WEIGHTS[0]}"))
        repo = self.source.repo
        found = only([f"{repo}:{n}" for n in loose] or [f"{repo}:{n}" for n in below], f"{repo} on the hub")
        return found.removeprefix(f"{repo}:") if found else None

    def nothing(self, what: str) -> ModelError:
        if self.unreachable is not None:
            return ModelError(trouble(self.source, self.unreachable))
        return ModelError(f"{self.source}: {what} on the hub" + (f" at {self.source.revision}" if self.source.revision else ""))


def trouble(source: HubName, error: Exception) -> str:
    """One helpful line about what the hub client raised."""
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return f"{source}: gated. Accept its conditions at https://huggingface.co/{source.repo}, then: hf auth login"
    if kind in ("RepositoryNotFoundError", "HFValidationError"):
        return f"{source}: the hub has no such repository, or it is private (then: hf auth login). Names: tok models"
    if kind == "RevisionNotFoundError":
        return f"{source}: the hub has no revision {source.revision!r} of it"
    cause = str(error).strip().splitlines()[0][:160] if str(error).strip() else kind
    return (
        f"{source}: not a local folder and the hub cannot be reached ({cause}). Offline, only models fetched before can be used; "
        "copy its folder here and give the path, or use a shipped one: tok models"
    )
