"""What every encoder, quantizer and decoder must pass; a part's test inherits one class and sets its attributes."""

import copy
import json

import pytest
import torch
from torch import Tensor

from tok1d.tokenizers.part import Decoder, Encoder, Part, Quantizer, build_part


def build(config: dict, kind: type[Part]) -> Part:
    """The part of a configuration with seeded random weights, in eval mode."""
    torch.manual_seed(0)
    return build_part(config, kind).eval()


def check_config(part: Part, kind: type[Part]) -> None:
    """A part is rebuilt from its configuration as JSON, with the same tensors by name and shape."""
    again = build_part(json.loads(json.dumps(part.to_config())), kind)
    assert again.to_config() == part.to_config()
    shapes = [{k: v.shape for k, v in p.state_dict().items()} for p in (part, again)]
    assert shapes[0] == shapes[1]


class EncoderContract:
    """Set ``config`` (to_config data) and ``image_size``."""

    config: dict
    image_size: tuple[int, int] = (32, 32)

    def images(self, batch: int = 2) -> Tensor:
        return torch.rand(batch, 3, *self.image_size, generator=torch.Generator().manual_seed(1))

    def test_config(self):
        check_config(build(self.config, Encoder), Encoder)

    def test_shape_and_determinism(self):
        encoder = build(self.config, Encoder)
        z = encoder(self.images())
        assert z.shape == (2, encoder.tokens, encoder.dim) and z.dtype == torch.float32 and z.isfinite().all()
        assert torch.equal(z, encoder(self.images()))

    def test_batch_equals_single(self):
        encoder, images = build(self.config, Encoder), self.images(3)
        alone = torch.cat([encoder(image[None]) for image in images])
        torch.testing.assert_close(encoder(images), alone, atol=1e-5, rtol=1e-4)

    def test_sees_the_whole_image(self):
        encoder, images = build(self.config, Encoder), self.images(1).requires_grad_()
        encoder(images).square().sum().backward()
        assert (images.grad != 0).float().mean() > 0.99


class QuantizerContract:
    """Set ``config``; ``scale`` spreads the dummy latents over the codes."""

    config: dict
    scale: float = 1.0
    tokens: int = 6

    def latents(self, batch: int = 3, seed: int = 1) -> Tensor:
        dim = build(self.config, Quantizer).dim
        return torch.randn(batch, self.tokens, dim, generator=torch.Generator().manual_seed(seed)) * self.scale

    def mask(self, batch: int = 3) -> Tensor:
        return torch.arange(self.tokens) < torch.tensor([self.tokens, 1, 3])[:batch, None]

    def test_config(self):
        check_config(build(self.config, Quantizer), Quantizer)

    def test_output(self):
        quantizer, z = build(self.config, Quantizer), self.latents()
        out = quantizer(z)
        assert out.q.shape == (*z.shape[:2], quantizer.code_dim) and out.q.dtype == torch.float32
        assert set(out.losses) == set(quantizer.loss_weights)
        for value in (*out.losses.values(), *out.stats.values()):
            assert value.ndim == 0 and value.isfinite()
        assert not any(v.requires_grad for v in out.stats.values())
        if quantizer.vocab_size > 2**62:
            assert out.ids is None and out.bits.dtype == torch.uint8 and out.bits.max() <= 1
            assert out.bits.shape == (*z.shape[:2], quantizer.bits_per_token)
            assert len(out.bits.flatten(0, 1).unique(dim=0)) > 2, "the dummy latents should meet several codes: set scale"
        elif quantizer.vocab_size:
            assert out.bits is None and out.ids.dtype == torch.int64 and out.ids.shape == z.shape[:2]
            assert out.ids.min() >= 0 and out.ids.max() < quantizer.vocab_size
            assert len(out.ids.unique()) > 2, "the dummy latents should meet several codes: set scale"

    def test_ids_and_codes_are_inverse(self):
        quantizer = build(self.config, Quantizer)
        if not quantizer.vocab_size:
            pytest.skip("a continuous bottleneck has no ids")
        out = quantizer(self.latents())
        data = out.ids if out.bits is None else out.bits
        assert torch.equal(quantizer.ids_to_codes(data), out.q)
        again = quantizer.codes_to_ids(out.q)
        assert again.dtype == data.dtype and torch.equal(again, data)
        rng = torch.Generator().manual_seed(0)
        if out.bits is None:
            some = torch.randint(quantizer.vocab_size, (2, 4), generator=rng)
        else:
            some = torch.randint(2, (2, 4, out.bits.shape[-1]), generator=rng, dtype=torch.uint8)
        assert torch.equal(quantizer.codes_to_ids(quantizer.ids_to_codes(some)), some)

    def test_prefix_equals_slice(self):
        quantizer, z = build(self.config, Quantizer), self.latents()
        whole, part = quantizer(z), quantizer(z[:, :2])
        assert torch.equal(whole.q[:, :2], part.q)

    def test_masked_tokens_touch_nothing(self):
        """Two copies train a step on latents that differ in masked places only, nan among them: nothing differs."""
        results = []
        for filler in (0.0, torch.nan):
            torch.manual_seed(0)
            quantizer = build(self.config, Quantizer).train()
            z = self.latents().masked_fill(~self.mask()[..., None], filler).requires_grad_()
            torch.manual_seed(1)
            out = quantizer(z, self.mask())
            (out.q.sum() + sum(out.losses.values())).backward()
            results.append((out, z.grad, quantizer.state_dict()))
        (a, grad_a, state_a), (b, grad_b, state_b) = results
        for one, other in ((a.q, b.q), (grad_a, grad_b)):
            assert torch.equal(one, other) and (one[~self.mask()] == 0).all() and (one[self.mask()] != 0).any()
        if a.ids is not None:
            assert torch.equal(a.ids, b.ids) and (a.ids[~self.mask()] == 0).all()
        if a.bits is not None:
            assert torch.equal(a.bits, b.bits) and (a.bits[~self.mask()] == 0).all() and (a.bits[self.mask()] != 0).any()
        for one, other in ((a.losses, b.losses), (a.stats, b.stats), (state_a, state_b)):
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

    def test_masked_losses_are_those_of_the_kept_tokens(self):
        quantizer, z = build(self.config, Quantizer), self.latents(1)
        mask = torch.arange(self.tokens)[None] < 2
        masked, alone = quantizer(z, mask), quantizer(z[:, :2])
        assert torch.equal(masked.q[:, :2], alone.q)
        for one, other in ((masked.losses, alone.losses), (masked.stats, alone.stats)):
            for key in other:
                torch.testing.assert_close(one[key], other[key])

    def test_float32_inside_autocast(self):
        quantizer, z = build(self.config, Quantizer), self.latents()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = quantizer(z)
        assert inside.q.dtype == torch.float32 and torch.equal(inside.q, quantizer(z).q)

    def test_bfloat16_latents_lose_no_codes(self):
        """They are coded as the float32 numbers they are, and get finite gradients of their own type."""
        z = self.latents().bfloat16()
        torch.manual_seed(0)
        quantizer = build(self.config, Quantizer)
        short, long = quantizer(z), quantizer(z.float())
        assert short.q.dtype == torch.float32 and torch.equal(short.q, long.q)
        for one, other in ((short.ids, long.ids), (short.bits, long.bits)):
            assert (one is None and other is None) or torch.equal(one, other)
        out = quantizer.train()(z.requires_grad_())
        (out.q.square().sum() + sum(out.losses.values())).backward()
        assert z.grad.dtype == torch.bfloat16 and z.grad.isfinite().all() and (z.grad != 0).any()

    def test_resumed_training_is_uninterrupted_training(self):
        def train(quantizer: Quantizer, steps: range) -> None:
            for i in steps:
                torch.manual_seed(i)
                quantizer.train()(self.latents(seed=i).requires_grad_(), self.mask())

        whole = build(self.config, Quantizer)
        train(whole, range(6))
        first = build(self.config, Quantizer)
        train(first, range(3))
        second = build(self.config, Quantizer)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        train(second, range(3, 6))
        for key, value in whole.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), key

    def test_only_training_steps_learn(self):
        quantizer = build(self.config, Quantizer).train()
        before = copy.deepcopy(quantizer.state_dict())
        with torch.no_grad():
            quantizer(self.latents())
        quantizer.eval()(self.latents())
        assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


class WholeQuantizerContract(QuantizerContract):
    """Of quantizers all of whose tokens refine all latents: set ``tokens`` to the number of latents."""

    def made(self) -> int:
        return build(self.config, Quantizer).tokens_made(self.tokens)

    def mask(self, batch: int = 3) -> Tensor:
        return torch.arange(self.made()) < torch.tensor([self.made(), 0, 3])[:batch, None]

    def test_output(self):
        quantizer, z = build(self.config, Quantizer), self.latents()
        assert quantizer.whole
        out = quantizer(z)
        assert out.q.shape == z.shape and out.q.dtype == torch.float32 and set(out.losses) == set(quantizer.loss_weights)
        for value in (*out.losses.values(), *out.stats.values()):
            assert value.ndim == 0 and value.isfinite()
        assert not any(v.requires_grad for v in out.stats.values())
        assert out.ids.dtype == torch.int64 and out.ids.shape == (len(z), self.made())
        assert out.ids.min() >= 0 and out.ids.max() < quantizer.vocab_size and len(out.ids.unique()) > 2

    def test_ids_and_codes_are_inverse(self):
        """One way only: what codes are sums of cannot be told, but coding them again is coding them as latents."""
        quantizer = build(self.config, Quantizer)
        out = quantizer(self.latents())
        assert torch.equal(quantizer.ids_to_codes(out.ids), out.q)
        assert torch.equal(quantizer.codes_to_ids(out.q), quantizer(out.q).ids)

    def test_prefix_equals_slice(self):
        """Masked to n tokens, it gives the first n ids of all tokens, the codes of those n, and 0 for the other ids."""
        quantizer, z = build(self.config, Quantizer), self.latents()
        ids = quantizer(z).ids
        for n in range(1, self.made() + 1):
            out = quantizer(z, (torch.arange(self.made()) < n).expand(len(z), -1))
            assert torch.equal(out.ids[:, :n], ids[:, :n]) and (out.ids[:, n:] == 0).all()
            assert torch.equal(out.q, quantizer.ids_to_codes(ids[:, :n]))

    def test_masked_tokens_touch_nothing(self):
        """An image without any token may hold nan; its codes, gradients and ids are zero, and nobody else's differ."""
        results = []
        for filler in (0.0, torch.nan):
            torch.manual_seed(0)
            quantizer = build(self.config, Quantizer).train()
            z = self.latents().index_fill(0, torch.tensor([1]), filler).requires_grad_()
            torch.manual_seed(1)
            out = quantizer(z, self.mask())
            (out.q.sum() + sum(out.losses.values())).backward()
            results.append((out, z.grad, quantizer.state_dict()))
        (a, grad_a, state_a), (b, grad_b, state_b) = results
        for one, other in ((a.q, b.q), (grad_a, grad_b)):
            assert torch.equal(one, other) and (one[1] == 0).all() and (one[[0, 2]] != 0).any()
        assert torch.equal(a.ids, b.ids) and (a.ids[~self.mask()] == 0).all() and (a.ids[self.mask()] != 0).any()
        for one, other in ((a.losses, b.losses), (a.stats, b.stats), (state_a, state_b)):
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

    def test_masked_losses_are_those_of_the_kept_tokens(self):
        """Images without tokens count for nothing."""
        quantizer, z = build(self.config, Quantizer), self.latents(3)
        mask = torch.zeros(3, self.made(), dtype=torch.bool)
        mask[2] = True
        masked, alone = quantizer(z, mask), quantizer(z[2:])
        assert torch.equal(masked.ids[2:], alone.ids)
        torch.testing.assert_close(masked.q[2:], alone.q)  # convolutions of other batch sizes round differently
        for one, other in ((masked.losses, alone.losses), (masked.stats, alone.stats)):
            for key in other:
                torch.testing.assert_close(one[key], other[key])


class DecoderContract:
    """Set ``config`` and ``image_size``; ``tokens`` is the most the decoder takes, ``nested`` whether fewer decode."""

    config: dict
    image_size: tuple[int, int] = (32, 32)
    tokens: int = 4
    nested: bool = True

    def codes(self, batch: int = 2) -> Tensor:
        dim = build(self.config, Decoder).dim
        return torch.randn(batch, self.tokens, dim, generator=torch.Generator().manual_seed(1))

    def test_config(self):
        check_config(build(self.config, Decoder), Decoder)

    def test_shape_and_determinism(self):
        decoder = build(self.config, Decoder)
        for n in range(1, self.tokens + 1) if self.nested else [self.tokens]:
            image = decoder(self.codes()[:, :n])
            assert image.shape == (2, 3, *self.image_size) and image.isfinite().all()
            assert torch.equal(image, decoder(self.codes()[:, :n]))

    def test_batch_equals_single(self):
        decoder, q = build(self.config, Decoder), self.codes(3)
        alone = torch.cat([decoder(codes[None]) for codes in q])
        torch.testing.assert_close(decoder(q), alone, atol=1e-5, rtol=1e-4)

    def test_mask_equals_slice(self):
        if not self.nested:
            pytest.skip("takes all its tokens, always")
        decoder, q = build(self.config, Decoder), self.codes(self.tokens)
        lengths = torch.arange(1, self.tokens + 1)
        mask = torch.arange(self.tokens) < lengths[:, None]
        together = decoder(q.masked_fill(~mask[..., None], torch.nan), mask)
        for row, n in enumerate(lengths.tolist()):
            torch.testing.assert_close(together[row : row + 1], decoder(q[row : row + 1, :n]), atol=1e-5, rtol=1e-4)

    def test_every_given_token_matters(self):
        decoder, q = build(self.config, Decoder), self.codes(1).requires_grad_()
        decoder(q).square().sum().backward()
        assert (q.grad.abs().sum(-1) > 0).all()
