"""FlowTask: the loss by hand, cached latents, rows of the global batch, alignment, weights of a frozen VAE."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.training import tiny
from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.decoders.flow import RectifiedFlowDecoder
from tok1d.tokenizers.decoders.flow_sampler import seeded_noise
from tok1d.tokenizers.encoders.flextok import FlexTokEncoder
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.quantizers import common
from tok1d.tokenizers.quantizers.fsq import FSQ
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.losses.base import LatentLoss
from tok1d.training.tasks import FlowTask
from tok1d.training.vae import load_vae

VIT = {"width": 32, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 16}
VAE = {"vae_channels": [32, 32], "vae_layers": 1, "latent_channels": 4, "scaling_factor": 0.5}


def tokenizer(**vae) -> Tokenizer1D:
    torch.manual_seed(0)
    decoder = RectifiedFlowDecoder(4, 3, **VIT, guidance=1.0, null_prob=0.5, noise="mode", **vae)
    for layer in (decoder.net.head, decoder.net.final_modulation, *(block.modulation for block in decoder.net.blocks)):
        nn.init.normal_(layer.weight, std=0.1)  # a fresh one predicts zero, whatever it is told
    return Tokenizer1D(FlexTokEncoder(4, 3, **VIT, **vae), FSQ([8, 8, 8]), decoder, TailDrop("powers_of_two"), (16, 16), "flow")


def batch(rows: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.rand(rows, 3, 16, 16, generator=generator), "key": [str(i) for i in range(rows)]}


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LENGTHS = torch.tensor([1, 4, 2])


def test_the_loss_is_that_of_the_velocity():
    task, images = FlowTask(tokenizer()), batch()["image"]
    found, _ = task.losses_of(batch(), LENGTHS, draw())
    net, generator = task.tokenizer.decoder.net, draw()
    t = task.tokenizer.decoder.draw_times(3, generator)
    noise = seeded_noise(torch.randint(2**62, (3,), generator=generator).tolist(), (3, 16, 16))
    null = torch.rand(3, generator=generator) < 0.5
    clean, total = images * 2 - 1, 0.0
    q = task.tokenizer.quantizer(task.tokenizer.encoder(images)).q
    for i, k in enumerate(LENGTHS.tolist()):  # one by one, each with its own tokens alone
        x = t[i] * noise[i] + (1 - t[i]) * clean[i]
        v = net.flow(x[None], t[i : i + 1], q[i : i + 1, :k], None, null[i : i + 1]).velocity
        total += (v - (noise[i] - clean[i])).square().mean().item() / 3
    assert found["flow"].item() == pytest.approx(total, rel=1e-5) and null.any() and not null.all()
    found["flow"].backward()
    assert task.tokenizer.encoder.head.weight.grad.abs().sum() > 0


def test_cached_latents_are_those_of_the_images(tmp_path):
    pytest.importorskip("diffusers", reason="needs tok1d[flow]")
    task = FlowTask(tokenizer(**VAE))
    with torch.no_grad():
        latents = task.tokenizer.encoder.latents(batch()["image"])
    assert latents.shape == (3, 4, 8, 8)
    made, _ = task.losses_of(batch(), LENGTHS, draw())
    read, _ = task.losses_of({**batch(), "latents": latents}, LENGTHS, draw())
    assert torch.equal(made["flow"], read["flow"])
    rounded, _ = task.losses_of({**batch(), "latents": latents.half()}, LENGTHS, draw())
    assert rounded["flow"] != read["flow"] and torch.isclose(rounded["flow"], read["flow"], rtol=1e-2)
    with pytest.raises(ModelError, match=r"cached latents must be \(images, 4, 8, 8\), got \(3, 4, 4, 4\)"):
        task.losses_of({**batch(), "latents": latents[:, :, :4, :4]}, LENGTHS, draw())


def test_ranks_take_their_rows_of_the_global_batch(monkeypatch):
    task, whole = FlowTask(tokenizer()), batch(4)
    lengths = torch.tensor([1, 4, 2, 2])
    together = task.losses_of(whole, lengths, draw())[0]["flow"].item()
    parts = []
    for rank in range(2):
        monkeypatch.setattr(common, "world", lambda rank=rank: (rank, 2))
        rows = slice(2 * rank, 2 * rank + 2)
        parts.append(task.losses_of({"image": whole["image"][rows], "key": whole["key"][rows]}, lengths[rows], draw())[0]["flow"].item())
    assert sum(parts) / 2 == pytest.approx(together, rel=1e-5) and parts[0] != pytest.approx(parts[1], rel=1e-3)


class Align(LatentLoss):
    """A stand-in for an alignment head: reads the decoder's second block."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.seen = nn.Linear(32, 3), []

    def attach(self, tokenizer):
        tokenizer.decoder.net.blocks[1].register_forward_hook(lambda block, inputs, output: self.seen.append(output[0].x))

    def forward(self, z, q, mask, images, batch):
        states = self.seen.pop()[:, :16]  # the patches stand first
        wanted = F.avg_pool2d(images, 4).flatten(2).mT
        return 1 - F.cosine_similarity(self.head(states), wanted, dim=-1).mean()


def test_alignment_trains_its_head_and_the_tokens(tmp_path):
    task = FlowTask(tokenizer(), losses={"alignment": Align()}, weights={"flow": 1.0, "alignment": 1.0}, lr=3e-3, warmup_steps=1)
    found, _ = task.losses_of(batch(), LENGTHS, draw())
    found["alignment"].backward()
    assert task.tokenizer.encoder.head.weight.grad.abs().sum() > 0 and task.losses["alignment"].head.weight.grad.abs().sum() > 0
    options = {"limit_val_batches": 1, "val_check_interval": 30}
    done = tiny.Setup(tmp_path, task, steps=30, save_every=30, options=options).run()
    losses = done.record.losses
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8]), losses
    assert {"val/psnr_4", "val/flow_1", "train/alignment"} <= done.trainer.callback_metrics.keys()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    make = lambda: FlowTask(tokenizer(), lr=1e-3)  # noqa: E731
    whole = tiny.Setup(tmp_path / "whole", make(), steps=4).run()
    with pytest.raises(RuntimeError, match="power cut"):
        tiny.Setup(tmp_path / "first", make(), steps=4, crash_at=3).run()
    rest = tiny.Setup(tmp_path / "rest", make(), steps=4).run(resume=tmp_path / "first/last.ckpt")
    assert rest.record.losses == whole.record.losses[-len(rest.record.losses) :] and rest.record.losses
    assert not tiny.differences(whole.checkpoint()["state_dict"], rest.checkpoint()["state_dict"])


# the frozen VAE ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers", reason="needs tok1d[flow]")
    torch.manual_seed(7)
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, scaling_factor=0.5,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return str(folder), model.eval()


@torch.no_grad()
def test_both_halves_of_a_published_vae(vae):
    folder, model = vae
    task, images = FlowTask(tokenizer(**VAE), vae=folder), batch()["image"]
    latents = model.encode(images * 2 - 1).latent_dist.mean * 0.5
    torch.testing.assert_close(task.latents(batch()), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(task.tokenizer.decoder.vae(latents), model.decode(latents / 0.5).sample / 2 + 0.5, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for name, p in task.named_parameters() if ".vae." in name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"works on pixels \(vae_channels: null\)"),
        ({**VAE, "latent_channels": 8}, r"quant_conv.*is .* there and .* in encoder\.vae.*layers_per_block|conv_out.*in encoder\.vae"),
        ({**VAE, "scaling_factor": 1.0}, r"multiplied by 0\.5, those of encoder\.vae by 1\.0: set scaling_factor: 0\.5"),
    ],
)
def test_another_vae_is_refused(vae, settings, said):
    with pytest.raises(ModelError, match=said):
        load_vae(tokenizer(**settings), vae[0])


def test_what_it_is_not_for():
    with pytest.raises(UsageError, match="FlowTask trains a RectifiedFlowDecoder, got GridDecoder"):
        FlowTask(tiny.fsq())
    with pytest.raises(ModelError, match="vae nowhere: cannot be loaded"):
        FlowTask(tokenizer(**VAE), vae="nowhere")
