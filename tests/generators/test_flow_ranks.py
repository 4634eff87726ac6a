"""Flows, block flows, FlowTok and bit diffusion on two processes: gradients and scales are those of one with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from tests.generators import tiny
from tok1d.generators.bits import BitDiffusion
from tok1d.generators.block_flow import BlockFlow
from tok1d.generators.condition import ClassCondition, Given
from tok1d.generators.flow import FlowGenerator
from tok1d.generators.flowtok import FlowTok
from tok1d.generators.space import TokenSpace

SPACE = TokenSpace(tokens=4, kind="latents", channels=3)
SIZES = {"width": 16, "depth": 1, "heads": 2, "hidden": 32}


class Words(ClassCondition):
    """A class as four tokens."""

    def attach(self, width, tokens=True, vector=False):
        super().attach(width, tokens, vector)
        self.places = 4

    def _given(self, label):
        return Given(torch.stack([self.table(label).roll(i, -1) for i in range(4)], dim=1))


def kinds() -> dict:
    return {
        "flow": lambda: FlowGenerator(SPACE, ClassCondition(5), **SIZES, prefix_share=0.5),
        "blocks": lambda: BlockFlow(SPACE, ClassCondition(5), [1, 3], **SIZES),
        "flowtok": lambda: FlowTok(SPACE, Words(5), **SIZES, source_width=16, source_depth=1, shuffled=0.5),
        "bits": lambda: BitDiffusion(TokenSpace(tokens=4, vocab_size=8), ClassCondition(5), **SIZES, prefix_share=0.5),
    }


def gradients(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Of one step of every kind on this rank's share, averaged as data parallelism does, and the scales."""
    found, share = {}, 8 // ranks
    for name, make in kinds().items():
        torch.manual_seed(0)
        model, draw = tiny.awake(make()).train(), torch.Generator().manual_seed(1)
        batch = {
            "latents": torch.randn(8, 4, 3, generator=draw) * 3 + 1,
            "ids": torch.randint(8, (8, 4), generator=draw),
            "label": torch.arange(8) % 5,
            "lengths": torch.tensor([1, 2, 3, 4, 4, 3, 4, 4]),  # of the halves together they differ
        }
        losses, _ = model.losses({key: x[rank * share : (rank + 1) * share] for key, x in batch.items()}, draw)
        sum(losses.values()).backward()
        for key, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if ranks > 1:
                dist.all_reduce(gradient)
            found[f"{name}.{key}"] = gradient / ranks
        found |= {f"{name}.{key}": x.clone() for key, x in model.named_buffers() if key in ("scale.mean", "scale.std")}
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = gradients(rank, 2)
    if rank == 0:
        save_file({key: x.contiguous() for key, x in found.items()}, f"{folder}/found.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("pair")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return load_file(folder / "found.safetensors")


def test_two_processes_are_one_with_the_whole_batch(pair):
    alone = gradients(0, 1)
    assert set(alone) == set(pair) and {key.partition(".")[0] for key in pair} == set(kinds())
    for key, x in alone.items():
        torch.testing.assert_close(pair[key], x, atol=1e-5 * float(x.abs().max().clamp(min=1)), rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert all(any(bool(x.any()) for key, x in alone.items() if key.startswith(name)) for name in kinds())
