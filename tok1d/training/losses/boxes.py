"""Losses inside given boxes: words as a text recogniser sees them, faces as a face recogniser does (InsightTok).

Words and faces are cut out of the reconstruction and the original by the evaluator's geometry, differentiably, and compared in the
features of the evaluator's networks. Paper: https://arxiv.org/abs/2605.14333. Boxes come with the batch, in pixels of the view:
``word_quads`` (n, 4, 2), clockwise from the upper left of the text, where the first pixel covers 0 to 1, ``word_image`` and ``word_text``;
``face_points`` (n, 5, 2), where the centre of the first pixel is 0, and ``face_image``.

Shapes: B images of H × W pixels, n boxes on this rank, T steps of a recogniser.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError, UsageError
from tok1d.eval.face_align import TEMPLATE, similarity_transform
from tok1d.eval.face_nets import SIDE, OnnxEmbedder, SFace
from tok1d.eval.ocr import HEIGHT, EasyOCR
from tok1d.eval.onnx_net import TorchGraph, fold, read_onnx
from tok1d.tokenizers.quantizers.common import sum_over_ranks, world
from tok1d.training.frozen import Frozen
from tok1d.training.losses.base import ImageLoss

GREY = (0.299, 0.587, 0.114)


class WordLoss(ImageLoss):
    """Words should look to a text recogniser as they did, or read as they should.

    ``features · (1 - cos)`` of the recogniser's visual and contextual sequences, mean over both and over the steps of a word, plus
    ``ctc`` times the CTC loss of the true text, per character, of words that the recogniser can write. Mean over the words of all ranks.

    Args:
        recogniser: EasyOCR's English one if None, from where the evaluator finds it.
        features, ctc: weights of the two, 0 for none.
        by_area: weigh each word by the share of the image that it covers, and take the mean over images, as InsightTok.
        min_height: lower words are left out, in pixels.
        max_words: more on a rank are drawn from by chance (torch's global generator, which tasks seed for every batch).

    Raises:
        MissingExtraError: easyocr is not installed.
        ModelError: its weights are not there.
    """

    whole_images = True

    def __init__(
        self, recogniser: EasyOCR | None = None, features: float = 1.0, ctc: float = 0.0, by_area: bool = False, min_height: float = 6.0,
        max_words: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(features, ctc) < 0 or features + ctc == 0 or max_words < 1:
            raise UsageError(f"WordLoss needs a weight above 0 and a word, got features={features}, ctc={ctc}, max_words={max_words}")
        recogniser = EasyOCR() if recogniser is None else recogniser
        self.frozen = Frozen(net=recogniser.model)
        for module in recogniser.model.modules():
            module.train(isinstance(module, nn.LSTM))  # cuDNN has no gradient of a recurrent net in eval mode; without dropout it is the same
        self.buckets, self.classes = recogniser.buckets, {c: i for i, c in enumerate(recogniser.alphabet.tolist()) if c}
        self.features, self.ctc, self.by_area = features, ctc, by_area
        self.min_height, self.max_words = min_height, max_words

    def forward(self, reconstruction: Tensor, target: Tensor, batch: dict[str, Any]) -> Tensor:
        """See :class:`ImageLoss`. 0 without words, with a graph all the same."""
        quads, index = _boxes("WordLoss", "word", "quads", reconstruction, batch)
        columns, rows = _sides(quads)
        chosen = _some(_clockwise(quads) & (rows >= self.min_height), self.max_words)
        quads, index, columns, rows = quads[chosen], index[chosen], columns[chosen], rows[chosen]
        texts = [batch["word_text"][i] for i in chosen.tolist()]
        net, losses = self.frozen.on(reconstruction.device)["net"], reconstruction.new_zeros(len(chosen))
        widths = _line_widths(columns, rows, self.buckets[-1])
        bucket = torch.bucketize(widths, torch.tensor(self.buckets, device=widths.device))
        grey = torch.tensor(GREY, device=reconstruction.device).view(1, 3, 1, 1)
        pictures = [(x * grey).sum(1, keepdim=True) for x in (reconstruction, target)]
        for b, width in enumerate(self.buckets):
            members = (bucket == b).nonzero().flatten()
            if len(members):
                grid = _word_grid(quads[members], widths[members], columns[members], rows[members], width, reconstruction)
                crops = [sample_boxes(x, grid, index[members], "border") * 2 - 1 for x in pictures]
                found = self._compare(net, *crops, widths[members] / width, [texts[i] for i in members.tolist()])
                losses = losses.index_put((members,), found)
        share = _area(quads) / (reconstruction.shape[2] * reconstruction.shape[3])
        return _mean(losses, share if self.by_area else None, reconstruction)

    def _compare(self, net: nn.Module, crop: Tensor, wanted: Tensor, part: Tensor, texts: list[str]) -> Tensor:
        """Crops (n, 1, 64, W) of both pictures, the part of the width that is word, and texts → losses (n,)."""
        with torch.no_grad():
            truth = _sequences(net, wanted)[:2] if self.features else ()
        *found, logits = _sequences(net, crop)
        losses, steps = crop.new_zeros(len(crop)), logits.shape[1]
        if self.features:
            inside = torch.arange(steps, device=part.device) < (part * steps).ceil().clamp(min=1)[:, None]
            far = [1 - F.cosine_similarity(a, b, dim=2) for a, b in zip(found, truth)]
            losses = losses + self.features * (torch.stack(far).mean(0) * inside).sum(1) / inside.sum(1)
        legible = [i for i, text in enumerate(texts) if text and all(c in self.classes for c in text)] if self.ctc else []
        if legible:
            lengths = torch.tensor([len(texts[i]) for i in legible])
            classes = torch.tensor([self.classes[c] for i in legible for c in texts[i]], device=crop.device)
            log_p = logits[legible].float().log_softmax(2).transpose(0, 1)
            spans = torch.full((len(legible),), steps)
            misread = F.ctc_loss(log_p, classes, spans, lengths, reduction="none", zero_infinity=True) / lengths.to(log_p)
            losses = losses.index_add(0, torch.tensor(legible, device=crop.device), self.ctc * misread)
        return losses


class FaceLoss(ImageLoss):
    """Faces should be the same persons: 1 − cosine between embeddings of a face in the reconstruction and in the original.

    Faces are aligned by five landmarks with the evaluator's alignment. Mean over the faces of all ranks.

    Args:
        embedder: SFace if None, from where the evaluator finds it.
        by_area: weigh each face by the share of the image that its aligned square covers, and take the mean over images, as InsightTok.
        min_size: faces whose landmarks are closer together than that are left out, in pixels.
        max_faces: more on a rank are drawn from by chance.

    Raises:
        MissingExtraError: onnx is not installed.
        ModelError: the embedder's weights are not there, or torch does not run its operators.
    """

    whole_images = True

    def __init__(self, embedder: OnnxEmbedder | None = None, by_area: bool = False, min_size: float = 8.0, max_faces: int = 128) -> None:
        super().__init__()
        if max_faces < 1:
            raise UsageError(f"FaceLoss needs at least one face, got max_faces={max_faces}")
        embedder = SFace() if embedder is None else embedder
        if not isinstance(embedder.graph, TorchGraph):
            raise ModelError(f"{embedder.id} runs in onnxruntime, which gives no gradient; take another embedder for training")
        self.frozen, self.path = Frozen(**{str(embedder.graph.device): embedder.graph}), embedder.path
        self.mean, self.std = embedder.mean, embedder.std
        self.by_area, self.min_size, self.max_faces = by_area, min_size, max_faces

    def forward(self, reconstruction: Tensor, target: Tensor, batch: dict[str, Any]) -> Tensor:
        """See :class:`ImageLoss`. 0 without faces, with a graph all the same."""
        points, index = _boxes("FaceLoss", "face", "points", reconstruction, batch)
        size = (points.amax(1) - points.amin(1)).amax(1)
        chosen = _some(points.isfinite().all(2).all(1) & (size >= max(self.min_size, 1e-3)), self.max_faces)
        if not len(chosen):
            return _mean(reconstruction.new_zeros(0), points.new_zeros(0) if self.by_area else None, reconstruction)
        grid, share = _face_grid(points[chosen], reconstruction)
        graph = self._graph(reconstruction.device)
        with torch.autocast(reconstruction.device.type, enabled=False):
            with torch.no_grad():
                wanted = self._embed(graph, sample_boxes(target.float(), grid, index[chosen], "zeros"))
            found = self._embed(graph, sample_boxes(reconstruction.float(), grid, index[chosen], "zeros"))
        return _mean(1 - F.cosine_similarity(found, wanted), share if self.by_area else None, reconstruction)

    def _embed(self, graph: TorchGraph, faces: Tensor) -> Tensor:
        return graph.differentiable((faces * 255 - self.mean) / self.std)

    def _graph(self, device: torch.device) -> TorchGraph:
        """The network on a device; a graph cannot be moved, so it is read again where it is not yet."""
        if str(device) not in self.frozen:
            self.frozen[str(device)] = TorchGraph(fold(read_onnx(self.path)), device)
        return self.frozen[str(device)]  # type: ignore[no-any-return]


def sample_boxes(images: Tensor, grid: Tensor, index: Tensor, padding: str) -> Tensor:
    """Bilinear samples of many boxes; no image is copied for its boxes, which lie one below the other in one grid an image.

    Args:
        images: float (B, C, H, W).
        grid: float (n, h, w, 2), (x, y) from -1 to 1 between the outer corners of the pixels.
        index: int64 (n,) image of each box.
        padding: outside of the image, as ``grid_sample`` has it.

    Returns:
        float (n, C, h, w).
    """
    order = index.argsort(stable=True)
    counts = torch.bincount(index, minlength=len(images))
    slot = torch.empty_like(index)
    slot[order] = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[index[order]]
    most, (height, width) = int(counts.max()), grid.shape[1:3]
    tall = grid.new_zeros(len(images), most, height, width, 2)
    tall[index, slot] = grid
    found = F.grid_sample(images, tall.flatten(1, 2), mode="bilinear", padding_mode=padding, align_corners=False)
    return found.unflatten(2, (most, height)).transpose(1, 2)[index, slot]


def _boxes(loss: str, kind: str, what: str, reconstruction: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Places (n, p, 2), float64, and images (n,) of a batch, on the device of the reconstruction."""
    names = (f"{kind}_{what}", f"{kind}_image", *(["word_text"] if kind == "word" else []))
    if any(name not in batch for name in names):
        has = ", ".join(batch) or "nothing"
        raise UsageError(f"{loss} needs {', '.join(names)} in every batch; this data has {has}. Train on data with {kind}s, or leave it out")
    if "image" in batch and batch["image"].shape[-2:] != reconstruction.shape[-2:]:
        whole, window = (tuple(x.shape[-2:]) for x in (batch["image"], reconstruction))
        raise UsageError(f"{loss} needs whole images of {whole}, got a window of {window}; set window: 0")
    device = reconstruction.device
    return batch[names[0]].to(device, torch.float64), batch[names[1]].to(device)


def _some(keep: Tensor, most: int) -> Tensor:
    """Places where ``keep`` (n,) is True, ascending; ``most`` of them by chance if there are more."""
    found = keep.nonzero().flatten()
    if len(found) <= most:
        return found
    return found[torch.randperm(len(found))[:most].sort().values.to(found.device)]


def _sides(quads: Tensor) -> tuple[Tensor, Tensor]:
    """Mean width and height of quadrilaterals (n, 4, 2) in whole pixels, as the evaluator's crops have them: float64 (n,) twice."""
    lengths = (quads.roll(-1, 1) - quads).norm(dim=2)
    return lengths[:, 0::2].mean(1).round().clamp(min=1), lengths[:, 1::2].mean(1).round().clamp(min=1)


def _clockwise(quads: Tensor) -> Tensor:
    """Bool (n,): finite, convex, and running clockwise; else a word would come out mirrored or folded."""
    sides = quads.roll(-1, 1) - quads
    after = sides.roll(-1, 1)
    return ((sides[..., 0] * after[..., 1] - sides[..., 1] * after[..., 0]) > 0).all(1) & quads.isfinite().all(2).all(1)


def _area(quads: Tensor) -> Tensor:
    """Shoelace formula: (n, 4, 2) → (n,)."""
    after = quads.roll(-1, 1)
    return (quads[..., 0] * after[..., 1] - after[..., 0] * quads[..., 1]).sum(1).abs() / 2


def _line_widths(columns: Tensor, rows: Tensor, widest: int) -> Tensor:
    """Widths, in whole pixels, of words at the recogniser's height; those higher than wide as EasyOCR's detour makes them."""
    flat, tall = (HEIGHT * columns / rows).floor(), (HEIGHT**2 / (HEIGHT * rows / columns).floor()).ceil()
    return torch.where(columns >= rows, flat, tall).clamp(1, widest)


def _word_grid(quads: Tensor, widths: Tensor, columns: Tensor, rows: Tensor, width: int, images: Tensor) -> Tensor:
    """Where the pixels of words at the recogniser's height come from, float (n, 64, width, 2); beyond a word its edge is repeated.

    The projective map of the unit square in closed form (Heckbert 1989, section 2.2.3).
    """
    p0, p1, p2, p3 = quads.unbind(1)
    a, b, s = p1 - p2, p3 - p2, p0 - p1 + p2 - p3
    cross = lambda x, y: x[:, 0] * y[:, 1] - x[:, 1] * y[:, 0]  # noqa: E731
    g, h = (cross(s, b) / cross(a, b))[:, None], (cross(a, s) / cross(a, b))[:, None]
    u = (torch.arange(width, device=quads.device) + 0.5) / widths[:, None]
    v = ((torch.arange(HEIGHT, device=quads.device) + 0.5) / HEIGHT).expand(len(quads), -1)
    half = [0.5 / n[:, None] for n in (columns, rows)]  # no pixel beyond the centre of the outermost one of the crop
    u, v = u.clamp(half[0], 1 - half[0])[:, None, :, None], v.clamp(half[1], 1 - half[1])[:, :, None, None]
    along, down, start = (x[:, None, None] for x in (p1 - p0 + g * p1, p3 - p0 + h * p3, p0))
    place = (along * u + down * v + start) / (g[:, None, None] * u + h[:, None, None] * v + 1)
    return (place * 2 / place.new_tensor([images.shape[3], images.shape[2]]) - 1).to(images.dtype)


def _face_grid(points: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Where the pixels of aligned faces come from, float (n, 112, 112, 2), and the share of the image that they cover, (n,)."""
    m = similarity_transform(points, points.new_tensor(TEMPLATE))
    turn = m[:, :, :2]
    back = turn.mT / turn[:, :, 0].square().sum(1)[:, None, None]  # its inverse
    line = torch.arange(SIDE, device=points.device, dtype=points.dtype)
    pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)  # (112, 112, 2) as (x, y)
    place = torch.einsum("nij,yxj->nyxi", back, pixels) - torch.einsum("nij,nj->ni", back, m[:, :, 2])[:, None, None]
    extent = points.new_tensor([images.shape[3], images.shape[2]])
    share = (SIDE**2 / turn[:, :, 0].square().sum(1) / extent.prod()).clamp(max=1)
    return ((place + 0.5) * 2 / extent - 1).to(images.dtype), share


def _sequences(net: nn.Module, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Crops (n, 1, 64, W) in [-1, 1] → visual (n, T, C), contextual (n, T, C) and logits (n, T, classes) of EasyOCR's network."""
    crops = crops.contiguous(memory_format=torch.channels_last)
    visual = net.AdaptiveAvgPool(net.FeatureExtraction(crops).permute(0, 3, 1, 2)).squeeze(3)
    contextual = net.SequenceModeling(visual)
    return visual.float(), contextual.float(), net.Prediction(contextual.contiguous())


def _mean(losses: Tensor, share: Tensor | None, reconstruction: Tensor) -> Tensor:
    """Mean over the boxes of all ranks; with shares of area, their weighted sum per image. Gradients averaged over ranks are then right."""
    nothing = reconstruction.sum() * 0  # so that a batch without boxes has a graph like any other
    if share is not None:
        return (losses * share.to(losses.dtype)).sum() / len(reconstruction) + nothing
    count = sum_over_ranks(torch.tensor(float(len(losses)), device=losses.device)) / world()[1]
    return losses.sum() / count.clamp(min=1 / world()[1]) + nothing
