"""Stage 1 and stage 2 of two-stage models: proxy codes made and cached, pictures of validations, what stays frozen."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tok1d
from tests.tokenizers import mix
from tests.training import tiny
from tok1d.cli.main import main
from tok1d.data.module import DrawnData
from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.decoders.grid import GridDecoder
from tok1d.tokenizers.decoders.vqgan import VQGANDecoder
from tok1d.tokenizers.encoders.vqgan import VQGANEncoder
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.official.titok_legacy import LegacyTiTokEncoder, ProxyCodeDecoder, add_pixels
from tok1d.tokenizers.quantizers.vq import VQ
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.losses.adversarial import Adversary
from tok1d.training.tasks import DecoderTask, ProxyCodeTask

VIT = {"width": 32, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 16}
CONV = {**mix.CONV, "multipliers": [1, 1, 1, 1], "image_size": 16, "shortcut": "output"}
PIXELS = {"proxy_codes": 20, "proxy_dim": 6, "pixel_width": 8, "pixel_multipliers": [1] * 4, "pixel_depth": 1, "pixel_groups": 2}


def vqgan() -> Tokenizer1D:
    torch.manual_seed(1)
    quantizer = VQ(20, 6)
    nn.init.normal_(quantizer.codebook, std=0.1)  # as wide as the latents, so that images have different codes
    return Tokenizer1D(VQGANEncoder(6, **CONV), quantizer, VQGANDecoder(6, **CONV), image_size=(16, 16), name="vqgan")


def titok(pixels: bool = False) -> Tokenizer1D:
    torch.manual_seed(2)
    decoder = ProxyCodeDecoder(4, 6, **VIT, **PIXELS, pixels=pixels)
    return Tokenizer1D(LegacyTiTokEncoder(4, 6, **VIT), VQ(16, 6, l2=True), decoder, TailDrop("uniform", per_sample=False), (16, 16), "titok")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of a teacher and of a stage-1 model."""
    base = tmp_path_factory.mktemp("stages")
    vqgan().save_pretrained(base / "vqgan")
    titok().save_pretrained(base / "stage1")
    return base


def batch(rows: int = 3) -> dict:
    data = DrawnData(images=rows, val_images=1, size=16)
    return {"image": torch.stack([data.train_set[i]["image"] for i in range(rows)]).float() / 255, "key": [str(i) for i in range(rows)]}


LENGTHS = torch.tensor([2, 2, 2])


# stage 1 ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_with_the_teachers_codes(place):
    task, draw = ProxyCodeTask(titok(), str(place / "vqgan")), torch.Generator()
    found, stats = task.losses_of(batch(), LENGTHS, draw)
    codes = vqgan().eval().encode(batch()["image"]).ids.clone()
    assert codes.shape == (3, 4) and len(codes.unique()) > 2
    model = task.tokenizer
    q = model.quantizer(model.encoder(batch()["image"])).q[:, :2]
    wanted = torch.stack([-F.log_softmax(model.decoder.logits(q[i : i + 1])[0], -1)[range(4), codes[i]] for i in range(3)])
    assert found["cross_entropy"].item() == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert set(found) == {"cross_entropy", "commitment", "codebook"} and 0 <= stats["accuracy"] <= 1
    cached, _ = task.losses_of({**batch(), "codes": codes}, LENGTHS, draw)
    other, _ = task.losses_of({**batch(), "codes": (codes + 1) % 20}, LENGTHS, draw)
    assert torch.equal(cached["cross_entropy"], found["cross_entropy"]) and not torch.equal(other["cross_entropy"], cached["cross_entropy"])
    with pytest.raises(ModelError, match=r"cached codes must be \(3, 4\).*got \(3, 9\)"):
        task.losses_of({**batch(), "codes": torch.zeros(3, 9)}, LENGTHS, draw)


def test_stage_1_learns_and_validates_through_the_teacher(tmp_path, place):
    task = ProxyCodeTask(titok(), str(place / "vqgan"), lr=3e-3, warmup_steps=1, val_tokens=[1, 4])
    options = {"limit_val_batches": 1.0, "val_check_interval": 30}
    data = DrawnData(images=8, val_images=3, size=16, batch_size=8)
    done = tiny.Setup(tmp_path, task, data, steps=30, save_every=30, options=options).run()
    losses = done.record.losses
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    saved = done.checkpoint()["state_dict"]
    assert all(k.startswith("tokenizer.") for k in saved) and len(saved) == len(task.tokenizer.state_dict()), "the teacher is not in it"
    assert main(["export", str(done.last), str(tmp_path / "model")]) == 0
    whole = add_pixels(tok1d.load(tmp_path / "model"), vqgan())  # the likeliest codes through the teacher's decoder
    images = torch.stack([data.val_set[i]["image"] for i in range(3)]).float() / 255
    metrics = done.trainer.callback_metrics
    for k in (1, 4):
        error = (whole.eval().decode(whole.encode(images, tokens=k)) - images).square().flatten(1).mean(1)
        assert metrics[f"val/psnr_{k}"].item() == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    assert metrics["val/cross_entropy_4"] > 0 and 0 <= metrics["val/accuracy_4"] <= 1


def test_what_stage_1_is_not_for(place):
    with pytest.raises(UsageError, match=r"ProxyCodeDecoder with pixels: false, got GridDecoder"):
        ProxyCodeTask(tiny.fsq(), str(place / "vqgan"))
    with pytest.raises(UsageError, match="got ProxyCodeDecoder with pixels: True"):
        ProxyCodeTask(titok(pixels=True), str(place / "vqgan"))
    with pytest.raises(ModelError, match=r"gives an image 4 codes below 16, the decoder names 4 \(one a patch\) below 20"):
        ProxyCodeTask(titok(), str(place / "stage1"))
    with pytest.raises(ModelError, match="teacher nowhere: cannot be loaded"):
        ProxyCodeTask(titok(), "nowhere")


# stage 2 ---------------------------------------------------------------------------------------------------------


def adversary() -> Adversary:
    torch.manual_seed(4)
    return Adversary(nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 1)), lecam=0.001)


def test_stage_2_starts_as_stage_1_with_the_teachers_decoder(place):
    task = DecoderTask(titok(pixels=True), str(place / "stage1"), str(place / "vqgan"), adversary=adversary(), weights={"l2": 1.0, "gan": 0.01})
    wanted = add_pixels(tok1d.load(place / "stage1"), vqgan(), soft=True).state_dict()
    found = task.tokenizer.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    trained = {name.split(".")[1] for name, p in task.named_parameters() if p.requires_grad}
    assert trained == {"decoder"} and task.weights == {"l2": 1.0, "gan": 0.01}


def test_stage_2_trains_the_decoder_alone(tmp_path, place):
    task = DecoderTask(titok(pixels=True), str(place / "stage1"), str(place / "vqgan"), adversary=adversary(), weights={"l2": 1.0, "gan": 0.01}, lr=3e-3, warmup_steps=1)
    before = {k: v.clone() for k, v in task.tokenizer.state_dict().items()}
    data = DrawnData(images=8, val_images=2, size=16, batch_size=8)
    options = {"limit_val_batches": 1.0, "val_check_interval": 6}
    done = tiny.Setup(tmp_path, task, data, steps=12, save_every=12, options=options).run()
    assert not task.tokenizer.quantizer.training and task.tokenizer.decoder.training, "after a validation, too"
    after = done.checkpoint()["current_model_state"]
    moved = {k.split(".")[0] for k, v in before.items() if not torch.equal(after[f"tokenizer.{k}"], v)}
    assert moved == {"decoder"} and any("proxy_codebook" in k for k in before)
    assert sum(done.record.losses[-4:]) < sum(done.record.losses[:4]) and done.trainer.global_step == 12


def test_a_decoder_of_another_kind_starts_untrained(place):
    encoder, quantizer = titok().encoder, titok().quantizer
    fresh = Tokenizer1D(encoder, quantizer, GridDecoder(4, 6, **VIT), TailDrop("uniform"), (16, 16))
    start = {k: v.clone() for k, v in fresh.decoder.state_dict().items()}
    with torch.no_grad():
        encoder.proj.weight.zero_()
    task = DecoderTask(fresh, str(place / "stage1"), adversary=adversary())
    assert torch.equal(task.tokenizer.encoder.proj.weight, titok().encoder.proj.weight)
    assert all(torch.equal(v, start[k]) for k, v in task.tokenizer.decoder.state_dict().items())
