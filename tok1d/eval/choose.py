"""Which measures a run takes: those asked for, or all that the data and the installed packages allow.

What was asked for and cannot be had is an error; what would merely have been nice is left out and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tok1d.errors import TokError, UsageError
from tok1d.eval.gallery import Gallery
from tok1d.eval.manifest import Manifest
from tok1d.eval.measures import Features, Measure, Perceptuals, Pixels
from tok1d.eval.protocol import Protocol

if TYPE_CHECKING:
    from tok1d.eval.features import FeatureNet

NAMES = ("pixels", "lpips_vgg", "lpips_alex", "dists", "codes", "features", "fid", "text", "faces")


@dataclass(frozen=True)
class Nets:
    """Where networks come from; defaults are those that work without a network connection.

    Attributes:
        device: where they run.
        feature_net: timm model for ``features``; EfficientNet-Lite0 if empty.
        feature_weights: its weights.
        fid_weights, fid_profile: of ``fid``.
        ocr: ``easyocr`` or ``doctr-parseq``; ocr_weights: its weights.
        face: ``sface``, or ``insightface`` with the path of its pack or ONNX file in ``face_weights``.
        accept_license: of face weights for research only.
        reference: statistics of the real side (``tok eval stats``).
    """

    device: str = "cpu"
    feature_net: str = ""
    feature_weights: Path | None = None
    fid_weights: Path | None = None
    fid_profile: str = "tf"
    ocr: str = "easyocr"
    ocr_weights: Path | None = None
    face: str = "sface"
    face_weights: Path | None = None
    accept_license: bool = False
    reference: Path | None = None


def choose(names: Sequence[str] | None, manifest: Manifest, protocol: Protocol, nets: Nets) -> tuple[list[Measure], dict[str, str]]:
    """Build measures.

    Args:
        names: of :data:`NAMES`; None takes all that make sense for the data.
        manifest: the data; text and faces need words and faces in it.
        protocol: for the size bins.
        nets: where networks come from.

    Returns:
        The measures, and why the ones left out were.

    Raises:
        UsageError: an unknown name, or text or faces asked of data without any.
        TokError: a network that was asked for cannot be had.
    """
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise UsageError(f"unknown measures {', '.join(unknown)}; there are {', '.join(NAMES)}")
    has = {"text": any(s.words for s in manifest.samples), "faces": any(s.faces for s in manifest.samples)}
    for name, there in has.items():
        if names is not None and name in names and not there:
            raise UsageError(f"--measures {name}: {manifest.name} has no {'words' if name == 'text' else 'faces'} annotated (tok eval import, tok eval annotate)")
    possible = [n for n in NAMES if has.get(n, True) and (n != "fid" or nets.fid_weights is not None)]
    wanted = possible if names is None else list(names)
    measures: list[Measure] = []
    skipped: dict[str, str] = {}
    for name in wanted:
        if name in ("lpips_vgg", "lpips_alex", "dists"):
            continue
        try:
            measures.append(_build(name, protocol, nets))
        except TokError as error:
            if names is not None:
                raise
            skipped[name] = str(error)
    perceptual = [n for n in wanted if n in ("lpips_vgg", "lpips_alex", "dists")]
    if perceptual:
        try:
            measures.append(Perceptuals(perceptual, nets.device))
        except TokError as error:
            if names is not None:
                raise
            skipped["perceptual"] = str(error)
    return [*measures, Gallery()], skipped


def _build(name: str, protocol: Protocol, nets: Nets) -> Measure:
    if name == "pixels":
        return Pixels()
    if name == "codes":
        from tok1d.eval.codebook import Codes

        return Codes()
    if name in ("features", "fid"):
        from tok1d.eval.stats import load_reference

        net = feature_net(name, nets)
        return Features(net, reference=load_reference(nets.reference, net.id, protocol) if nets.reference else None)
    from tok1d.eval.binned import Bins

    if name == "text":
        from tok1d.eval.ocr import EasyOCR, ParseqOCR
        from tok1d.eval.text_measure import Text

        if nets.ocr not in ("easyocr", "doctr-parseq"):
            raise UsageError(f"--ocr {nets.ocr}: recognisers are easyocr and doctr-parseq")
        recogniser = (EasyOCR if nets.ocr == "easyocr" else ParseqOCR)(nets.ocr_weights, nets.device)
        return Text(recogniser, Bins.named(protocol.text_bins))
    from tok1d.eval.face_nets import InsightFace, SFace
    from tok1d.eval.faces import Faces

    if nets.face not in ("sface", "insightface"):
        raise UsageError(f"--face {nets.face}: embedders are sface and insightface")
    if nets.face == "insightface":
        if nets.face_weights is None:
            raise UsageError("--face insightface needs --face-weights: a pack folder or the ONNX file of its recognition model")
        return Faces(InsightFace(nets.face_weights, accept_license=nets.accept_license), Bins.named(protocol.face_bins))
    return Faces(SFace(nets.face_weights), Bins.named(protocol.face_bins))


def feature_net(name: str, nets: Nets) -> FeatureNet:
    """The network of ``features`` or ``fid``."""
    from tok1d.eval.features import InceptionV3, TimmNet, efficientnet_lite0

    if name == "fid":
        if nets.fid_weights is None:
            raise UsageError("--measures fid needs --fid-weights: the Inception weights of torch-fidelity")
        return InceptionV3(nets.fid_weights, nets.fid_profile, nets.device)
    if nets.feature_net:
        return TimmNet(nets.feature_net, nets.feature_weights, nets.device)
    return efficientnet_lite0(nets.feature_weights, nets.device)
