"""Relations and alignment against loops over pairs; blocks read by hooks; and no pull towards raster order."""

from __future__ import annotations

import copy
import itertools
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError, UsageError
from tok1d.extras import ensure_torchvision_ops
from tok1d.tokenizers.decoders.flow import RectifiedFlowDecoder
from tok1d.tokenizers.decoders.grid import GridDecoder
from tok1d.tokenizers.encoders.flextok import FlexTokEncoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.quantizers.fsq import FSQ
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.losses.alignment import (
    BlockReader,
    FeatureAlignment,
    GridRelation,
    ImageRelation,
    code_relation,
    image_relation,
    steady_cosine,
)

ensure_torchvision_ops()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    timm, path = pytest.importorskip("timm"), tmp_path_factory.mktemp("net") / "test_vit.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return str(path)


def tiny(tokens: int = 4) -> Tokenizer1D:
    """A few tokens for 16 × 16 pixels, which the decoder paints on 2 × 2 places."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 16}
    return Tokenizer1D(TiTokEncoder(tokens, 3, **shape), FSQ([8, 8, 8]), GridDecoder(tokens, 3, **shape), None, (16, 16), "tiny")


def flow() -> Tokenizer1D:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"width": 16, "depth": 3, "heads": 2, "patch_size": 8, "image_size": 16}
    encoder = FlexTokEncoder(4, 3, **shape)
    return Tokenizer1D(encoder, FSQ([8, 8, 8]), RectifiedFlowDecoder(4, 3, null_prob=0, **shape), None, (16, 16), "flow")


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a.double() * b.double()).sum() / (a.double().norm() * b.double().norm()).clamp(min=1e-12))


def test_code_relation_is_the_cosine_over_tokens_that_both_kept() -> None:
    q, kept = torch.randn(4, 5, 3) + 1, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]).float()
    found = code_relation(q * kept[..., None], kept)
    mean = torch.stack([q[kept[:, n] > 0, n].mean(0) for n in range(5)])
    for a, b in itertools.product(range(4), repeat=2):
        both = int(min(kept[a].sum(), kept[b].sum()))
        assert found[a, b].item() == pytest.approx(cosine((q - mean)[a, :both].flatten(), (q - mean)[b, :both].flatten()), abs=1e-5)
    same = torch.ones(3, 5, 2, requires_grad=True)
    code_relation(same, torch.ones(3, 5)).sum().backward()
    assert same.grad.isfinite().all()


def plain_relation(q: Tensor, s: Tensor) -> Tensor:
    """The loss with nothing but cosines."""
    q = F.normalize((q - q.mean(0)).flatten(1), dim=1)
    others = ~torch.eye(len(q), dtype=torch.bool)
    return 1 - torch.corrcoef(torch.stack([(q @ q.T)[others], s[others]]))[0, 1]


def test_gradients_stay_bounded_as_codes_approach_each_other(weights: str) -> None:
    """The value is that of plain cosines throughout; their gradient grows as codes approach, ours ends."""
    loss, images = ImageRelation("test_vit", weights, 32, spread=0.5), torch.rand(6, 3, 20, 20)
    centre, offsets, s = torch.randn(1, 8, 4), torch.randn(6, 8, 4), image_relation(loss.frozen["teacher"].net.pooled(images))
    largest = []
    for distance in (3.0, 1.0, 0.1, 1e-2, 1e-3, 1e-5, 1e-8, 0.0):
        q = (centre + distance * offsets).requires_grad_(True)
        value, wanted = loss(q, q, None, images, {}), plain_relation(q, s)
        (ours,), (theirs,) = (torch.autograd.grad(v, q) for v in (value, wanted))
        largest.append(ours.norm().item())
        if distance >= 1e-2:
            torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)
        if distance >= 1:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
        if distance == 1e-3:
            assert theirs.norm() > 100 * largest[1], "plain cosines are what needs this"
            assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9
    assert max(largest) <= 5 * largest[1], "codes are 2 long at distance 1, and the gradient ends to grow at 0.5"
    assert max(largest[3:]) <= 1.01 * largest[2]


def test_equal_codes_cost_most_and_rounding_does_not_pay(weights: str) -> None:
    """The smaller the differences before rounding, the less codes say, and the more it costs; at any scale without rounding it costs the same."""
    loss, images, fsq = ImageRelation("test_vit", weights, 32), torch.rand(6, 3, 20, 20), FSQ([7] * 4)
    f = loss.frozen["teacher"].net.pooled(images)
    z = F.normalize((f - f.mean(0)) @ torch.randn(f.shape[1], 32), dim=1).view(6, 8, 4) * 4  # codes that know the teacher
    plain = [loss(z, scale * z, None, images, {}).item() for scale in (1.0, 0.1, 0.01)]
    rounded = [loss(z, fsq(scale * z).q, None, images, {}).item() for scale in (1.0, 0.2, 0.1, 0.0)]
    assert plain == pytest.approx([plain[0]] * 3, abs=1e-3) and plain[0] < 0.4
    assert rounded[0] < 0.4 and rounded[1] < rounded[2] + 0.1 and rounded[-1] == 1
    scale = torch.tensor(0.1, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(images, 0.3 + scale * z, None, images, {}), scale)
    assert abs(slope) < 1e-3


def test_gradients_of_short_states_are_bounded_and_others_plain(weights: str) -> None:
    a, b = torch.randn(7, 5), torch.randn(7, 5)
    for scale in (10.0, 1.0, 1e-3, 1e-9, 0.0):
        x, y = (scale * a).requires_grad_(True), b.clone().requires_grad_(True)
        found = steady_cosine((x * y).sum(1), x.square().sum(1), y.square().sum(1), 0.1)
        slopes = torch.autograd.grad(found.sum(), (x, y))
        assert all(slope.norm(dim=1).max() <= 10 for slope in slopes) and found.abs().max() <= 1 + 1e-6
        if scale >= 1:
            wanted = F.cosine_similarity(x, y, dim=1)
            torch.testing.assert_close(found, wanted)
            for slope, plain in zip(slopes, torch.autograd.grad(wanted.sum(), (x, y)), strict=True):
                torch.testing.assert_close(slope, plain)
    tokenizer, images = tiny(), torch.rand(2, 3, 16, 16)
    for loss in (GridRelation("test_vit", weights, 32), FeatureAlignment(32, "test_vit", weights, 32, "decoder.transformer", hidden=8)):
        loss.attach(tokenizer)
        for scale in (1.0, 1e-4, 1e-12):
            tokenizer(images)
            value = loss.reader.value = (scale * loss.reader.value).detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(loss(images, images, None, images, {}), value)
            assert slope.isfinite().all() and slope.norm(dim=-1).max() <= 2 / (0.01 * 32**0.5)


def test_image_relation_by_hand_and_with_too_small_a_batch(weights: str) -> None:
    loss, images = ImageRelation("test_vit", weights, 32), torch.rand(4, 3, 20, 20)
    q, mask = torch.randn(4, 4, 5, requires_grad=True), torch.tensor([[True] * 4, [True, True, False, False], [True] * 4, [True] * 4])
    kept = q * mask[..., None]
    f = loss.frozen["teacher"].net.pooled(images)
    torch.testing.assert_close(image_relation(f), F.cosine_similarity((f - f.mean(0))[:, None], (f - f.mean(0))[None], dim=2))
    r, s = (x.detach().tolist() for x in (code_relation(kept, mask.float()), image_relation(f)))
    pairs = [(r[a][b], s[a][b]) for a, b in itertools.combinations(range(4), 2)]
    value = loss(torch.zeros(4, 4, 2), kept, mask, images, {})
    assert value.item() == pytest.approx(1 - statistics.correlation(*zip(*pairs, strict=True)), abs=1e-5)
    value.backward()
    assert q.grad[0].abs().max() > 0 and q.grad[1, 2:].abs().max() == 0
    alone = loss(q[:2], q[:2], None, images[:2], {})
    alone.backward()
    assert alone == 0


def test_image_relation_knows_no_order_of_tokens(weights: str) -> None:
    """Any permutation of the tokens is as good: nothing pulls towards raster order. And codes can learn it."""
    loss, images = ImageRelation("test_vit", weights, 32), torch.rand(5, 3, 20, 20)
    q, order = torch.randn(5, 6, 3), torch.randperm(6)
    torch.testing.assert_close(loss(q, q, None, images, {}), loss(q, q[:, order], None, images, {}), atol=1e-6, rtol=1e-5)
    q.requires_grad_(True)
    values = []
    for _ in range(20):
        value = loss(q, q, None, images, {})
        (slope,) = torch.autograd.grad(value, q)
        values.append(value.item())
        with torch.no_grad():
            q -= 2 * slope / slope.norm() * q.norm() / 20
    assert values[-1] < 0.7 * values[0]


def test_grid_relation_compares_every_two_places(weights: str) -> None:
    tokenizer, images = tiny(), torch.rand(2, 3, 16, 16)
    loss = GridRelation("test_vit", weights, 32, margin=0.05)
    loss.attach(tokenizer)
    states: list[Tensor] = []
    tokenizer.decoder.transformer.register_forward_hook(lambda m, i, o: states.append(o))
    output = tokenizer(images)
    value = loss(torch.zeros(1), torch.zeros(1), None, images, {})
    teacher = loss.frozen["teacher"].net.layers(images, [-1], norm=True)[0]  # (2, 64, 2, 2), the decoder's grid
    assert states[0].shape == (2, 4, 32) and teacher.shape == (2, 64, 2, 2)
    total = 0.0
    for image, i, j in itertools.product(range(2), range(4), range(4)):
        f = teacher[image].flatten(1).T
        total += max(0.0, abs(cosine(states[0][image, i], states[0][image, j]) - cosine(f[i], f[j])) - 0.05)
    assert value.item() == pytest.approx(total / 32, abs=1e-5)
    value.backward()
    assert max(p.grad.abs().max() for p in tokenizer.encoder.parameters() if p.grad is not None) > 0
    assert output.reconstruction is not None
    with pytest.raises(ModelError, match="did not run in this step"):  # what was read is gone
        loss(torch.zeros(1), torch.zeros(1), None, images, {})


@pytest.mark.parametrize("block", ["decoder.transformer", "decoder.transformer.blocks.0", "decoder.smooth"])
def test_blocks_of_a_mask_token_decoder(block: str) -> None:
    tokenizer = tiny()
    reader, outputs = BlockReader(tokenizer, block), []
    tokenizer.get_submodule(block).register_forward_hook(lambda m, i, o: outputs.append(o))
    tokenizer(torch.rand(2, 3, 16, 16))
    states, grid = reader.take()
    wanted = {"decoder.transformer": lambda o: o, "decoder.transformer.blocks.0": lambda o: o[:, :4], "decoder.smooth": lambda o: o.flatten(2).mT}
    assert torch.equal(states, wanted[block](outputs[0]))  # the only block is the last, which returns places alone
    assert grid == ((16, 16) if block == "decoder.smooth" else (2, 2))
    with torch.no_grad():
        tokenizer(torch.rand(2, 3, 16, 16))
    assert reader.value is None


def test_an_inner_block_begins_with_the_class_token() -> None:
    tokenizer = tiny()
    reader = BlockReader(tokenizer, "decoder.transformer.norm_pre")
    states: list[Tensor] = []
    tokenizer.decoder.transformer.norm_pre.register_forward_hook(lambda m, i, o: states.append(o))
    tokenizer(torch.rand(2, 3, 16, 16))
    assert states[0].shape == (2, 1 + 4 + 4, 32) and torch.equal(reader.take()[0], states[0][:, 1:5])


def test_the_second_block_of_a_flow_is_what_the_decoder_exports(weights: str) -> None:
    tokenizer, images = flow(), torch.rand(2, 3, 16, 16)
    loss = FeatureAlignment(16, "test_vit", weights, 32, hidden=8)
    loss.attach(tokenizer)
    code = tokenizer.quantizer(tokenizer.encoder(images))
    with torch.no_grad():
        for p in tokenizer.decoder.parameters():  # adaLN-zero hides the codes at first
            p += 0.05 * torch.randn_like(p)
    exported = tokenizer.decoder.training_flow(code.q, None, images, torch.Generator().manual_seed(0)).activation[:, :4]
    value = loss(code.q, code.q, None, images, {})
    teacher = loss.frozen["teacher"].net.layers(images, [-1], norm=True)[0].flatten(2).mT
    torch.testing.assert_close(value, 1 - F.cosine_similarity(loss.head(exported), teacher, dim=-1).mean())
    value.backward()
    assert all(p.grad is not None for p in loss.head.parameters())
    assert max(p.grad.abs().max() for p in tokenizer.encoder.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in loss.frozen["teacher"].net.net.parameters())
    assert all(name.startswith("head.") for name in loss.state_dict())


def test_features_are_resized_to_the_decoders_grid(weights: str) -> None:
    loss, images = GridRelation("test_vit", weights, 96), torch.rand(2, 3, 16, 16)
    teacher = loss.frozen["teacher"]
    whole = teacher.net.layers(images, [-1], norm=True)[0]
    assert whole.shape[-2:] == (6, 6)
    found = teacher.places(images, (3, 2))
    torch.testing.assert_close(found, F.interpolate(whole, (3, 2), mode="bilinear", antialias=True).flatten(2).mT)


def test_the_head_learns_the_teacher(weights: str) -> None:
    tokenizer, images = tiny(), torch.rand(4, 3, 16, 16)
    loss = FeatureAlignment(32, "test_vit", weights, 32, "decoder.transformer", hidden=32)
    loss.attach(tokenizer)
    optimizer, values = torch.optim.Adam(loss.parameters(), lr=3e-2), []
    for _ in range(14):
        tokenizer(images)
        value = loss(torch.zeros(1), torch.zeros(1), None, images, {})
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.6 * values[0]


def test_a_copy_of_a_task_reads_its_own_copy(weights: str) -> None:
    """As an average of weights makes one, also in the middle of a step."""
    both = nn.ModuleDict({"tokenizer": tiny(), "loss": GridRelation("test_vit", weights, 32)})
    both["loss"].attach(both["tokenizer"])
    images = torch.rand(2, 3, 16, 16)
    both["tokenizer"](images)
    other = copy.deepcopy(both)
    assert other["loss"].reader is not both["loss"].reader and other["loss"].reader.value is None
    other["tokenizer"](images * 0.5)
    mine, theirs = both["loss"].reader.take()[0], other["loss"].reader.take()[0]
    assert not torch.equal(mine, theirs)
    assert other["loss"].frozen is both["loss"].frozen


def test_a_compiled_decoder_is_read_all_the_same() -> None:
    tokenizer, images = tiny(), torch.rand(2, 3, 16, 16)
    reader = BlockReader(tokenizer, "decoder.transformer")
    tokenizer(images)
    plain = reader.take()[0]
    tokenizer.decoder.compile(backend="eager")
    tokenizer(images)
    torch.testing.assert_close(reader.take()[0], plain)


def test_refusals(weights: str) -> None:
    tokenizer, images = tiny(), torch.rand(2, 3, 16, 16)
    loss = FeatureAlignment(7, "test_vit", weights, 32, "decoder.transformer", hidden=8)
    with pytest.raises(ModelError, match="call attach"):
        loss(images, images, None, images, {})
    loss.attach(tokenizer)
    tokenizer(images)
    with pytest.raises(UsageError, match="is 32 wide, the alignment head was built with width=7"):
        loss(images, images, None, images, {})
    with pytest.raises(UsageError, match=r"no module 'decoder.net.blocks.1'; it has decoder.transformer"):
        BlockReader(tokenizer, "decoder.net.blocks.1")
    tokenizer = tiny(3)
    reader = BlockReader(tokenizer, "decoder.embed")  # of latents, which have no places
    tokenizer(images)
    with pytest.raises(ModelError, match="does not hold the decoder's places"):
        reader.take()
    with pytest.raises(UsageError, match="difference of cosines"):
        GridRelation("test_vit", weights, 32, margin=2)
    with pytest.raises(UsageError, match="spread is a distance of codes above 0, got 0"):
        ImageRelation("test_vit", weights, 32, spread=0)
