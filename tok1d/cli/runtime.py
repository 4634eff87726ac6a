"""What the verbs share at run time: messages, progress, reports, a bounded reader pool, and loading the model."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from tok1d.errors import TokError

if TYPE_CHECKING:
    import argparse

    from tok1d.tokenizers.tokenizer import Tokenizer1D

S = TypeVar("S")
T = TypeVar("T")

# What one bad input may raise without ending the run: our errors, and what torch or the disk say about this one input.
PER_INPUT = (TokError, RuntimeError, OSError, ValueError, MemoryError)


def say(message: str) -> None:
    """One line for the person, on standard error."""
    print(f"tok: {message}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; foreign errors are named by their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, TokError) else f"{type(error).__name__}: {text[:300]}"


def count(number: int, noun: str) -> str:
    """``1 token``, ``2,000 tokens``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


class Progress:
    """A bar on standard error, only when that is a terminal and there is more than one thing to do."""

    def __init__(self, total: int, unit: str, *, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.total, self.unit, self.done = total, unit, 0
        self.start, self.last = time.monotonic(), 0.0
        self.active = total > 1 and not quiet and self.stream.isatty()

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        now = time.monotonic()
        if self.active and (now - self.last > 0.1 or self.done == self.total):
            self.last = now
            rate = self.done / max(now - self.start, 1e-9)
            filled = 24 * self.done // self.total
            left = (self.total - self.done) / rate
            bar = "█" * filled + "·" * (24 - filled)
            self._draw(f"{bar} {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {left:.0f} s left")

    def clear(self) -> None:
        """Wipe the bar, before other text or at the end."""
        if self.active:
            self._draw("")

    def _draw(self, text: str) -> None:
        self.stream.write(f"\r\x1b[K{text}")
        self.stream.flush()


class Report:
    """Results to standard output (text, or one JSON object a line), failures to standard error at the end.

    Args:
        total: inputs of the run.
        unit: ``images`` …
        as_json: print the rows as JSON.
        quiet: no text results, no bar.
        debug: print the traceback of every failure at once.
        silent_stdout: standard output carries the data themselves.
    """

    def __init__(self, total: int, unit: str, *, as_json: bool, quiet: bool, debug: bool, silent_stdout: bool = False) -> None:
        self.as_json, self.quiet, self.debug, self.silent = as_json, quiet, debug, silent_stdout
        self.total = total
        self.failed: list[str] = []
        self.progress = Progress(total, unit, quiet=quiet)

    def ok(self, row: dict[str, Any], text: str) -> None:
        """One input went well."""
        self.show(row, text)
        self.progress.step()

    def show(self, row: dict[str, Any], text: str | None) -> None:
        """Print a result: the row as JSON, or the text."""
        if self.silent or (text is None and not self.as_json) or (self.quiet and not self.as_json):
            return
        self.progress.clear()
        print(json.dumps(row) if self.as_json else text, flush=True)  # ASCII: file names may be any bytes

    def fail(self, label: str, error: BaseException) -> None:
        """One input failed; the run goes on."""
        message = one_line(error)
        message = message if message.startswith(f"{label}:") else f"{label}: {message}"
        self.failed.append(message)
        if self.debug:
            self.progress.clear()
            traceback.print_exception(error)
        self.show({"input": label, "error": one_line(error)}, None)
        self.progress.step()

    def close(self) -> int:
        """List what failed; the exit code of the run."""
        self.progress.clear()
        if len(self.failed) == 1 and self.total == 1:
            say(self.failed[0])
        elif self.failed:
            say(f"{len(self.failed)} of {self.total} inputs failed:")
            for message in self.failed:
                print(f"  {message}", file=sys.stderr, flush=True)
        return 1 if self.failed else 0


def report_for(args: argparse.Namespace, total: int, unit: str, *, silent_stdout: bool = False) -> Report:
    """A Report by the flags of the command line."""
    return Report(total, unit, as_json=args.json, quiet=args.quiet, debug=args.debug, silent_stdout=silent_stdout)


def ordered(function: Callable[[S], T], items: Iterable[S], workers: int, ahead: int) -> Iterator[tuple[S, T | BaseException]]:
    """Map over a thread pool, in order, never more than ``ahead`` results waiting; an error is a result, not an end.

    The items are drawn by the calling thread, as room becomes free: memory does not grow with their number.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[S, Future[T]]] = deque()

        def take() -> tuple[S, T | BaseException]:
            item, future = waiting.popleft()
            try:
                return item, future.result()
            except PER_INPUT as error:
                return item, error

        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) >= max(1, ahead):
                    yield take()
            while waiting:
                yield take()
        finally:
            for _, future in waiting:
                future.cancel()


def together_or_alone(
    function: Callable[[Sequence[S]], Sequence[T]], batch: Sequence[S]
) -> Iterator[tuple[S, T | BaseException]]:
    """Run a batch; if it fails, each of its members alone, so that only the bad one fails."""
    try:
        yield from zip(batch, function(batch))
        return
    except PER_INPUT as error:
        if len(batch) == 1:
            yield batch[0], error
            return
    for member in batch:
        try:
            yield member, function([member])[0]
        except PER_INPUT as error:
            yield member, error


def load_model(args: argparse.Namespace) -> Tokenizer1D:
    """The model of ``--model --revision --accept-license --device --dtype``; imports torch."""
    from tok1d import hub

    # A wrong name is said before torch is imported.
    found = hub.find(args.model, revision=args.revision, accept_license=args.accept_license, progress=not args.quiet)
    import torch

    device = choose_device(args.device)
    dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)
    model = hub.load_found(found, device=device, dtype=dtype)
    if device == "cpu" and args.device == "auto" and not args.quiet:
        say("no CUDA: running on CPU")
    return model


def decode_options(model: Tokenizer1D, args: argparse.Namespace) -> dict[str, Any]:
    """What ``--steps --guidance --solver --seed --text`` ask of the decoder; text is encoded here, once.

    Raises:
        TokenError: the decoder has no such option.
    """
    given = {"steps": args.steps, "guidance": args.guidance, "solver": args.solver, "seeds": args.seed, "text": args.text}
    options = model._check_options(given)  # before anything is encoded or read
    if args.text is not None:
        from tok1d.tokenizers.official.clip_text import text_features

        options["text"] = text_features([args.text])
    return options


def for_rows(options: dict[str, Any], rows: int) -> dict[str, Any]:
    """The options of a batch of so many rows: one text for all of them."""
    return {**options, "text": options["text"].expand(rows, -1, -1)} if "text" in options else options


def choose_device(name: str) -> str:
    import torch

    have: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name == "auto":
        return next((d for d, there in have.items() if there()), "cpu")
    if name in have and not have[name]():
        raise TokError(f"--device {name}: this machine, or this build of PyTorch, has none; use --device cpu or auto")
    return name
