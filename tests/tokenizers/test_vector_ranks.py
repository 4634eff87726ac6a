"""Vector quantizers on two ranks: losses, gradients and codebooks are those of one process with the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tok1d.tokenizers.part import Quantizer, build_part

PLACE = "tok1d.tokenizers.quantizers"
VQ = {"class": f"{PLACE}.vq.VQ", "vocab_size": 16, "dim": 4}
CASES = {
    "plain": VQ,
    "cosine": {**VQ, "l2": True},
    "moving_average": {**VQ, "ema": True, "ema_decay": 0.5},
    "restart": {**VQ, "ema": True, "ema_decay": 0.5, "dead_code_threshold": 0.9},
    "kmeans": {**VQ, "kmeans_iterations": 3, "ema": True, "ema_decay": 0.5},
    "clustering": {**VQ, "clustering": True, "l2": True, "ema_decay": 0.5},
    "simvq": {"class": f"{PLACE}.simvq.SimVQ", "vocab_size": 16, "dim": 4},
    "ibq": {"class": f"{PLACE}.ibq.IBQ", "vocab_size": 16, "dim": 4, "entropy_temperature": 0.1},
    "dual": {"class": f"{PLACE}.dual.DualVQ", "vocab_size": 16, "semantic_dim": 3, "pixel_dim": 1},
    "residual": {
        "class": f"{PLACE}.residual.ResidualVQ", "codes": 8, "dim": 4, "stages": 2, "ema": True, "ema_decay": 0.5,
        "kmeans_iterations": 2,
    },
    "growing": {
        "class": f"{PLACE}.growing_scale.GrowingScaleVQ", "vocab_size": 16, "dim": 4, "scales": [1, 3, 6], "phi": 0.5,
        "dead_code_threshold": 0.5,
    },
}
BATCH, LATENTS, STEPS = 4, 6, 3


def batch(quantizer: Quantizer, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and a mask by which the two halves of the batch keep different numbers of tokens; the second once none."""
    z = torch.randn(BATCH, LATENTS, quantizer.dim, generator=torch.Generator().manual_seed(step))
    lengths = torch.tensor([[6, 2, 1, 5], [4, 4, 0, 0], [1, 6, 6, 6]][step])
    return z, torch.arange(quantizer.tokens_made(LATENTS)) < lengths[:, None]


def train(config: dict, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """A few steps of gradient descent on this rank's share; gradients are averaged as data parallelism does."""
    torch.manual_seed(0)
    quantizer = build_part(copy.deepcopy(config), Quantizer).train()
    share, result = BATCH // ranks, {}
    for step in range(STEPS):
        z, mask = (x[rank * share : (rank + 1) * share] for x in batch(quantizer, step))
        z.requires_grad_()
        out = quantizer(z, mask)
        loss = sum(quantizer.loss_weights[name] * value for name, value in out.losses.items())
        (loss + 0 * out.q.sum()).backward()
        mean = torch.stack([value.detach() for value in out.losses.values()])
        if ranks > 1:
            dist.all_reduce(mean)
        for parameter in quantizer.parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if ranks > 1:
                dist.all_reduce(grad)
            with torch.no_grad():
                parameter.sub_(0.5 * grad / ranks)
            parameter.grad = None
        result |= {f"loss{step}": mean / ranks, f"ids{step}": out.ids, f"grad{step}": z.grad / ranks}
        result |= {f"stats{step}": torch.stack(list(out.stats.values()))}
    return {**result, **quantizer.state_dict()}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, config in CASES.items():
        result = {k: v.contiguous() for k, v in train(config, rank, 2).items()}
        save_file(result, f"{folder}/{name}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=2)
    return {name: [load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1)] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_batch(name, two_ranks):
    one = train(CASES[name], 0, 1)
    halves = two_ranks[name]
    for key, value in one.items():
        if key.startswith(("ids", "grad")):
            got = torch.cat([half[key] for half in halves])
        else:
            assert torch.equal(halves[0][key], halves[1][key]), f"{key} must be the same on both ranks"
            got = halves[0][key]
        torch.testing.assert_close(got, value, atol=1e-6, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert any((one[f"grad{step}"] != 0).any() for step in range(STEPS))
