"""A tiny model learns a language of counting sequences, with classes and ends, in seconds; its samples obey it."""

import pytest
import torch

from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.condition import ClassCondition
from tok1d.generators.heads import Softmax, TokenHead
from tok1d.generators.heads_bits import Bits, MaskedBits
from tok1d.generators.heads_factors import SubCodes
from tok1d.generators.space import TokenSpace

SPACE = TokenSpace(tokens=8, vocab_size=8, nested=True)


def language(first: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of class c count up by c + 1, modulo 8, from any first token; they have 8 - 2c tokens."""
    return (first[:, None] + (label + 1)[:, None] * torch.arange(8)) % 8, 8 - 2 * label


def train(head: TokenHead, steps: int, **arguments) -> AutoregressiveGenerator:
    torch.manual_seed(0)
    model = AutoregressiveGenerator(SPACE, ClassCondition(3), width=32, depth=1, heads=2, hidden=64, head=head, token_drop=0.0, **arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        first, label = torch.randint(8, (32,), generator=draw), torch.randint(3, (32,), generator=draw)
        ids, lengths = language(first, label)
        batch = {"ids": ids, "label": label, **({"lengths": lengths} if model.stop is not None else {})}
        loss = sum(model.losses(batch, draw)[0].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("head", [Softmax(), SubCodes([2, 4], 1), Bits(), MaskedBits(3, 32, 2)], ids=lambda head: type(head).__name__)
def test_samples_obey_the_class(head):
    model = train(head, 70)
    label = torch.arange(48) % 3
    made = model.generate(48, label=label, seeds=0, temperature=0.5 if isinstance(head, MaskedBits) else 1.0)
    obeying = (made.ids == language(made.ids[:, 0], label)[0]).all(1)
    assert obeying.float().mean() > 0.75  # by chance: one in two million
    assert len(made.ids[:, 0].unique()) >= 6  # every beginning is as likely


def test_rows_end_where_their_class_does():
    model = train(Softmax(), 80, variable="stop")
    label = torch.arange(48) % 3
    made = model.generate(48, label=label, seeds=0)
    ids, lengths = language(made.ids[:, 0], label)
    right = (made.lengths == lengths) & ((made.ids == ids[:, : made.shape[1]]) | ~made.mask).all(1)
    assert right.float().mean() > 0.75


def test_guidance_sharpens_an_unsure_class():
    """Half of the labels in training are wrong: guidance asks for more of the class than was ever seen."""
    torch.manual_seed(0)
    model = AutoregressiveGenerator(SPACE, ClassCondition(2, drop=0.2), width=16, depth=1, heads=2, token_drop=0.0)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(40):
        label = torch.randint(2, (64,), generator=draw)
        shown = torch.where(torch.rand(64, generator=draw) < 0.5, torch.randint(2, (64,), generator=draw), label)
        ids = (shown[:, None] * 4 + torch.randint(4, (64, 8), generator=draw)) % 8
        optimizer.zero_grad()
        model.losses({"ids": ids, "label": label}, draw)[0]["token"].backward()
        optimizer.step()
    label = torch.arange(200) % 2
    share = [
        (model.eval().generate(200, label=label, guidance=g).ids[:, 0] // 4 == label).float().mean().item() for g in (0.0, 1.0, 4.0)
    ]
    assert 0.35 < share[0] < 0.65 and 0.62 < share[1] < 0.88 and share[2] > share[1] + 0.08
