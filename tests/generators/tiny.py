"""Tiny generators for tests, with every kind of head; zero layers are given values, so that nothing is uniform by accident."""

from __future__ import annotations

import torch

from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.condition import ClassCondition, Condition
from tok1d.generators.heads import Softmax, TokenHead
from tok1d.generators.heads_bits import Bits, MaskedBits
from tok1d.generators.heads_factors import Channels, SubCodes
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.quantizers.nested_vq import NestedVQ

IDS = TokenSpace(tokens=8, vocab_size=16, nested=True)
WIDE = TokenSpace(tokens=8, kind="bits", bits=66, nested=True)
BOOK = [0, 2, 2, 1, 1, 1, 0, 3]  # codebook of each of 8 tokens, in no order; there is a fifth that none uses

HEADS = {
    "softmax": (Softmax, (), IDS),
    "sub-codes": (SubCodes, ([2, 8], 1), IDS),
    "bits": (Bits, (), IDS),
    "wide bits": (Bits, (), WIDE),
    "masked bits": (MaskedBits, (3, 16, 1), IDS),
    "wide masked bits": (MaskedBits, (4, 16, 1), WIDE),
    "channels": (Channels, ([1, 3], 1, 16), IDS),
    "wide channels": (Channels, ([6] * 11, 1, 16), WIDE),
}


def head(name: str) -> tuple[TokenHead, TokenSpace]:
    kind, arguments, space = HEADS[name]
    return kind(*arguments), space


def awake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Parameters that start at zero become random."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * (0.5 if parameter.ndim == 1 else 0.3))
    return model


def ar(name: str = "softmax", condition: Condition | None = None, **arguments) -> AutoregressiveGenerator:
    """An awake autoregressive model in eval mode: 8 tokens, 3 classes."""
    torch.manual_seed(0)
    made, space = head(name)
    arguments = {"width": 32, "depth": 2, "heads": 2, **arguments}
    model = AutoregressiveGenerator(arguments.pop("space", space), condition or ClassCondition(3), head=made, **arguments)
    return awake(model).eval()


def nested(vocab: int = 16, dim: int = 3) -> NestedVQ:
    """A quantizer of 8 tokens whose codebooks are stretched differently."""
    draw = torch.Generator().manual_seed(3)
    made = NestedVQ(8, dim, vocab, books=5)
    with torch.no_grad():
        made.codebooks.copy_(torch.randn(made.codebooks.shape, generator=draw))
    made.book.copy_(torch.tensor(BOOK))
    made.scale.copy_(torch.rand(8, dim, generator=draw) + 0.01)
    return made


def tokens(space: TokenSpace, rows: int, length: int | None = None, seed: int = 0) -> torch.Tensor:
    """Random data of a space."""
    draw = torch.Generator().manual_seed(seed)
    most = space.vocab_size if space.kind == "ids" else 2
    return torch.randint(most, (rows, length or space.tokens, *space.shape), generator=draw).to(space.dtype)
