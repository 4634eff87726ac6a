"""Training of decoders with losses of their own, of residual scales and of models with frozen modules inside."""

import pytest
import torch

from tests.training import tiny
from tok1d.data.module import DrawnData
from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.decoders.flow import RectifiedFlowDecoder
from tok1d.tokenizers.decoders.grid import GridDecoder
from tok1d.tokenizers.encoders.flextok import FlexTokEncoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.quantizers.fsq import FSQ
from tok1d.tokenizers.quantizers.growing_scale import GrowingScaleVQ
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.callbacks import reconstruction_grid
from tok1d.training.tasks import ReconstructionTask

VIT = {"width": 32, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 16}


def flow(**vae) -> Tokenizer1D:
    torch.manual_seed(0)
    decoder = RectifiedFlowDecoder(4, 3, **{**VIT, "patch_size": 2}, guidance=1.0, **vae)
    encoder = FlexTokEncoder(4, 3, **VIT, **vae) if vae else TiTokEncoder(4, 3, **VIT)
    return Tokenizer1D(encoder, FSQ([8, 8, 8]), decoder, TailDrop("powers_of_two"), (16, 16), "flow")


def scales() -> Tokenizer1D:
    torch.manual_seed(0)
    parts = TiTokEncoder(4, 6, **VIT), GrowingScaleVQ(20, 6, [1, 2, 4]), GridDecoder(4, 6, **VIT)
    return Tokenizer1D(*parts, TailDrop("uniform"), (16, 16), "scales")


def validated(task: ReconstructionTask, tmp_path) -> dict[str, float]:
    """What validation says after two steps."""
    options = {"limit_val_batches": 1.0, "val_check_interval": 2}
    done = tiny.Setup(tmp_path, task, DrawnData(images=8, val_images=3, size=16, batch_size=4), steps=2, options=options).run()
    return {k: v.item() for k, v in done.trainer.callback_metrics.items() if k.startswith("val/")}


def test_weights_of_the_decoder_apply_unless_given():
    assert ReconstructionTask(flow()).weights == {"flow": 1.0}, "and pictures are not compared"
    assert ReconstructionTask(flow(), weights={"flow": 2.0}).weights == {"flow": 2.0}
    with pytest.raises(UsageError, match="no loss has a weight"):
        ReconstructionTask(flow(), weights={"flow": 0.0})


def test_pixel_losses_do_not_go_with_it(tmp_path):
    with pytest.raises(ModelError, match=r"do not exist here: \['l1'\]; there are \['flow'\]"):
        tiny.Setup(tmp_path, ReconstructionTask(flow(), weights={"l1": 1.0})).run()


def test_it_learns_and_validation_samples_pictures(tmp_path):
    values = validated(ReconstructionTask(flow(), lr=1e-3, warmup_steps=1, val_steps=3), tmp_path)
    assert set(values) == {f"val/{name}_{k}" for name in ("psnr", "flow") for k in (1, 2, 4)}
    done = tiny.Setup(tmp_path / "long", ReconstructionTask(flow(), lr=3e-3, warmup_steps=1), steps=40, save_every=40).run()
    losses = done.record.losses
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8]), losses


def test_validation_takes_few_steps(tmp_path, monkeypatch):
    steps = []
    whole = RectifiedFlowDecoder.forward

    def counted(self, q, mask=None, **options):
        steps.append(options["steps"])
        return whole(self, q, mask, **options)

    monkeypatch.setattr(RectifiedFlowDecoder, "forward", counted)
    validated(ReconstructionTask(flow(), val_steps=3), tmp_path)
    assert set(steps) == {3} and ReconstructionTask(scales()).sampling() == {}


def test_resumed_training_is_uninterrupted_training(tmp_path):
    """Times and noise follow from the number of the batch."""
    make = lambda: ReconstructionTask(flow(), lr=1e-3)  # noqa: E731
    whole = tiny.Setup(tmp_path / "whole", make(), steps=4).run()
    with pytest.raises(RuntimeError, match="power cut"):
        tiny.Setup(tmp_path / "first", make(), steps=4, crash_at=3).run()
    rest = tiny.Setup(tmp_path / "rest", make(), steps=4).run(resume=tmp_path / "first/last.ckpt")
    assert rest.record.losses == whole.record.losses[-len(rest.record.losses) :] and rest.record.losses
    assert not tiny.differences(whole.checkpoint()["state_dict"], rest.checkpoint()["state_dict"])


def test_residual_scales_are_validated_by_prefixes_of_tokens(tmp_path):
    """A prefix of their tokens codes all latents, so cutting the latents would be wrong."""
    task = ReconstructionTask(scales(), val_tokens=[1, 3, 7])
    values = validated(task, tmp_path)
    data = DrawnData(images=8, val_images=3, size=16, batch_size=4)
    data.setup("fit")
    images = torch.stack([data.val_set[i]["image"] for i in range(3)]).float() / 255
    tokenizer = tiny.Done(task, None, None, None, tmp_path / "last.ckpt").checkpoint()
    model = scales()
    model.load_state_dict({k.removeprefix("tokenizer."): v for k, v in tokenizer["state_dict"].items()})
    for k in (1, 3, 7):
        pictures = model.eval().decode(model.encode(images, tokens=k))
        error = (pictures - images).square().flatten(1).mean(1)
        assert values[f"val/psnr_{k}"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    with torch.no_grad():
        grid = reconstruction_grid(model, images, (1, 3, 7))
    assert grid.shape == (3, 4 * 16, 3 * 16)
    torch.testing.assert_close(grid[:, 48:, :16], model.decode(model.encode(images[:1]))[0], atol=1e-5, rtol=1e-4)


def test_frozen_modules_stay_frozen(tmp_path):
    pytest.importorskip("diffusers", reason="needs tok1d[flow]")
    task = ReconstructionTask(flow(vae_channels=[32, 32], vae_layers=1, latent_channels=4))
    before = {k: v.clone() for k, v in task.tokenizer.state_dict().items()}
    tiny.Setup(tmp_path, task, steps=2).run()
    for name, p in task.tokenizer.named_parameters():
        assert p.requires_grad == ("vae." not in name), name
        assert torch.equal(p, before[name]) or p.requires_grad, name
    assert any(".vae." in name for name in before)
