"""What every tokenizer must pass; a tokenizer's test inherits TokenizerContract and gives a tiny configuration."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tok1d.errors import ImageError, ModelError, TokenError
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokens import TokenSequence

FOREIGN = [  # what a hostile config.json may name instead of a part
    "os.system",
    "builtins.eval",
    "torch.load",
    "torch.nn.Linear",
    "tok1d.hub.load",
    "tok1d.tokenizers.part.importlib.import_module",
    "tok1d.tokenizers.part.Part",
    "tok1d.tokenizers.part.Encoder",
    "tok1d.tokenizers.tokenizer.Path",
    "tok1d.tokenizers.lengths.FixedLength",
    "tok1d.tokenizers.encoders",
    "tok1d.tokenizers..encoders",
    "",
]


class TokenizerContract:
    """Set ``config`` (to_config data); override :meth:`make` to give weights that use many codes."""

    config: dict

    def make(self) -> Tokenizer1D:
        torch.manual_seed(0)
        return Tokenizer1D.from_config(self.config).eval().requires_grad_(False)

    @pytest.fixture
    def tokenizer(self) -> Tokenizer1D:
        return self.make()

    def images(self, tokenizer: Tokenizer1D, batch: int = 2) -> Tensor:
        return torch.rand(batch, 3, *tokenizer.image_size, generator=torch.Generator().manual_seed(1))

    # images and tokens -------------------------------------------------------------------------------------------

    def test_round_trip(self, tokenizer):
        images = self.images(tokenizer)
        seq = tokenizer.encode(images)
        assert isinstance(seq, TokenSequence) and seq.shape == (2, tokenizer.max_tokens)
        assert seq.lengths.tolist() == [tokenizer.max_tokens] * 2
        assert seq.vocab_size == tokenizer.vocab_size and seq.model_id == tokenizer.model_id
        assert seq.bits_per_image == [tokenizer.max_tokens * tokenizer.bits_per_token] * 2
        if seq.ids is not None:
            assert seq.ids.dtype == torch.int64 and seq.ids.min() >= 0 and seq.ids.max() < tokenizer.vocab_size
            assert len(seq.ids.unique()) > 2, "the tiny model should use several codes: override make()"
        pictures = tokenizer.decode(seq)
        assert pictures.shape == images.shape and pictures.dtype == torch.float32
        assert pictures.min() >= 0 and pictures.max() <= 1

    def test_determinism(self, tokenizer):
        images = self.images(tokenizer)
        one, two = tokenizer.encode(images), tokenizer.encode(images)
        assert torch.equal(one.data, two.data) and torch.equal(tokenizer.decode(one), tokenizer.decode(two))
        tokenizer.train()
        before = {k: v.clone() for k, v in tokenizer.state_dict().items()}
        assert torch.equal(tokenizer.encode(images).data, one.data), "encode must not depend on the mode"
        assert all(torch.equal(v, before[k]) for k, v in tokenizer.state_dict().items()), "encode must not train"

    def test_decode_equals_forward(self, tokenizer):
        images = self.images(tokenizer)
        out = tokenizer(images)
        pictures = tokenizer.decode(tokenizer.encode(images))
        torch.testing.assert_close(out.reconstruction.clamp(0, 1), pictures, atol=1e-5, rtol=1e-4)

    def test_batch_equals_single(self, tokenizer):
        images = self.images(tokenizer, 3)
        seq = tokenizer.encode(images)
        for i in range(3):
            alone = tokenizer.encode(images[i])
            assert torch.equal(alone.data, seq.data[i : i + 1])
            torch.testing.assert_close(tokenizer.decode(alone)[0], tokenizer.decode(seq)[i], atol=1e-5, rtol=1e-4)

    def test_decode_checks_its_input(self, tokenizer):
        with pytest.raises(TokenError, match=r"vocabulary|ids must be"):
            tokenizer.decode(torch.full((1, tokenizer.max_tokens), tokenizer.vocab_size))
        with pytest.raises(TokenError):
            tokenizer.decode(torch.zeros(1, tokenizer.max_tokens + 1, dtype=torch.int64))
        foreign = TokenSequence(torch.zeros(1, tokenizer.max_tokens, dtype=torch.int64), tokenizer.vocab_size, model_id=5)
        with pytest.raises(TokenError, match="0000000000000005"):
            tokenizer.decode(foreign)

    def test_encode_checks_its_input(self, tokenizer):
        height, width = tokenizer.image_size
        for images in (
            torch.full((1, 3, height, width), torch.nan),
            torch.full((1, 3, height, width), 255.0),
            torch.zeros(1, 1, height, width),
            torch.zeros(1, 3, height + 1, width),
        ):
            with pytest.raises(ImageError):
                tokenizer.encode(images)

    # how many tokens ---------------------------------------------------------------------------------------------

    def test_tokens(self, tokenizer):
        images, most = self.images(tokenizer), tokenizer.max_tokens
        seq = tokenizer.encode(images)
        for n in tokenizer.token_lengths:
            assert torch.equal(tokenizer.encode(images, tokens=n).data, seq.data[:, :n])
        for n in {0, -1, most + 1, *range(1, most + 1)} - set(tokenizer.token_lengths):
            with pytest.raises(TokenError, match=f"{tokenizer.name}.*{most}.*got tokens={n}"):
                tokenizer.encode(images, tokens=n)
        if not tokenizer.is_nested:
            assert tokenizer.token_lengths == [most]

    def test_prefix_equals_slice(self, tokenizer):
        if not tokenizer.is_nested:
            pytest.skip("makes one number of tokens")
        seq = tokenizer.encode(self.images(tokenizer))
        for n in {1, 2, tokenizer.max_tokens // 2, tokenizer.max_tokens}:
            assert torch.equal(tokenizer.decode(seq[:, :n]), tokenizer.decode(seq.data[:, :n]))

    def test_lengths_of_one_batch_do_not_mix(self, tokenizer):
        if not tokenizer.is_nested:
            pytest.skip("makes one number of tokens")
        most = tokenizer.max_tokens
        seq = tokenizer.encode(self.images(tokenizer, 3))
        mixed = TokenSequence.stack([seq[0, :1], seq[1, :most], seq[2, : most // 2]])
        together = tokenizer.decode(mixed)
        for i, n in enumerate((1, most, most // 2)):
            torch.testing.assert_close(together[i], tokenizer.decode(seq[i, :n])[0], atol=1e-5, rtol=1e-4)

    def test_masked_positions_do_not_matter(self, tokenizer):
        if not tokenizer.is_nested:
            pytest.skip("makes one number of tokens")
        q = tokenizer.quantizer.ids_to_codes(tokenizer.encode(self.images(tokenizer)).data)
        lengths = torch.tensor([1, tokenizer.max_tokens // 2])
        dropped = ~(torch.arange(tokenizer.max_tokens) < lengths[:, None])[..., None]
        pictures = [tokenizer.decode_latents(q.masked_fill(dropped, value), lengths) for value in (0, 1e4, torch.nan)]
        assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])
        assert not torch.equal(pictures[0], tokenizer.decode_latents(q))

    # training ----------------------------------------------------------------------------------------------------

    def test_gradients_reach_every_parameter(self, tokenizer):
        tokenizer.train().requires_grad_()
        images = self.images(tokenizer)
        out = tokenizer(images, torch.full((2,), tokenizer.max_tokens))
        assert set(out.losses) == set(tokenizer.quantizer.loss_weights)
        ((out.reconstruction - images).square().mean() + sum(out.losses.values())).backward()
        dead = [name for name, p in tokenizer.named_parameters() if p.grad is None or not (p.grad != 0).any()]
        assert not dead

    def test_training_lengths(self, tokenizer):
        tokenizer.train()
        torch.manual_seed(3)
        drawn = torch.cat([tokenizer(self.images(tokenizer, 4)).lengths for _ in range(4)])
        assert set(drawn.tolist()) <= set(tokenizer.token_lengths)
        assert (len(drawn.unique()) > 1) == tokenizer.is_nested

    # disk --------------------------------------------------------------------------------------------------------

    def test_save_and_load(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
        again = Tokenizer1D.from_pretrained(tmp_path)
        assert again.to_config() == tokenizer.to_config() and again.model_id == tokenizer.model_id
        for key, value in tokenizer.state_dict().items():
            if key in load_file(tmp_path / names[1]):
                assert torch.equal(value, again.state_dict()[key])
        seq = again.encode(self.images(tokenizer))
        assert torch.equal(seq.data, tokenizer.encode(self.images(tokenizer)).data)
        assert torch.equal(again.decode(seq), tokenizer.decode(seq))

    def test_save_in_half_precision(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path, dtype=torch.float16)
        again = Tokenizer1D.from_pretrained(tmp_path)
        assert all(p.dtype == torch.float32 for p in again.parameters())
        assert again.decode(again.encode(self.images(tokenizer))).isfinite().all()

    def test_model_id_names_the_weights(self, tokenizer):
        other = self.make()
        assert other.model_id == tokenizer.model_id and 0 < other.model_id < 2**64
        changed = self.make()
        next(changed.decoder.parameters()).data.mul_(1.01)
        assert changed.model_id != tokenizer.model_id

    def test_config_is_plain_data(self, tokenizer):
        config = json.loads(json.dumps(tokenizer.to_config()))
        again = Tokenizer1D.from_config(config)
        assert again.to_config() == config
        assert again.state_dict().keys() == tokenizer.state_dict().keys()

    def test_state_is_plain_tensors(self, tokenizer):
        assert all(type(v) is Tensor for v in tokenizer.state_dict().values())

    @pytest.mark.parametrize("part", ["encoder", "quantizer", "decoder", "lengths"])
    def test_hostile_config_is_refused(self, tokenizer, part):
        config = tokenizer.to_config()
        wrong = [{**config[part], "class": name} for name in FOREIGN if not (part == "lengths" and "Fixed" in name)]
        wrong += [{**config[part], "command": "id"}, {"class": config[part]["class"], "x": 1}, None, [], "os.system"]
        for entry in wrong:
            with pytest.raises(ModelError):
                Tokenizer1D.from_config({**config, part: entry})

    # precision ---------------------------------------------------------------------------------------------------

    def test_bfloat16(self, tokenizer):
        exact = tokenizer.decode(tokenizer.encode(self.images(tokenizer)))
        tokenizer.to(torch.bfloat16)
        seq = tokenizer.encode(self.images(tokenizer))
        if seq.ids is not None:
            assert seq.ids.min() >= 0 and seq.ids.max() < tokenizer.vocab_size
        pictures = tokenizer.decode(seq)
        assert pictures.dtype == torch.float32 and pictures.isfinite().all() and pictures.shape == exact.shape
