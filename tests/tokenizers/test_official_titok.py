"""Published one-stage TiTok: recorded numbers, exact parameter and key counts, round trip, what is refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from tests.golden.read import read, tokens_last
from tok1d.errors import ModelError
from tok1d.tokenizers.official.titok import export_official, infer, load_official
from tok1d.tokenizers.tokenizer import Tokenizer1D

SIZES = {"S": (512, 8), "B": (768, 12), "L": (1024, 24)}
# encoder, decoder, tokens, codes (0: VAE), code width; totals, encoder and decoder parameters, keys of the published files
PUBLISHED = {
    "bl64_vq8k": ("B", "L", 64, 8192, 64, 390_016_148, 85_944_640, 303_498_068, 459),
    "bl128_vq8k": ("B", "L", 128, 8192, 64, 390_179_988, 85_993_792, 303_563_604, 459),
    "sl256_vq8k": ("S", "L", 256, 8192, 64, 330_260_884, 25_910_848, 303_694_676, 411),
    "ll32_vae_c16": ("L", "L", 32, 0, 16, 606_879_604, 303_430_688, 303_416_148, 602),
    "bl64_vae_c16": ("B", "L", 64, 0, 16, 389_418_100, 85_920_032, 303_448_916, 458),
    "bl128_vae_c16": ("B", "L", 128, 0, 16, 389_581_940, 85_969_184, 303_514_452, 458),
}


def test_recorded_vq():
    golden = read("titok_vq")
    tokenizer = load_official(golden.state)
    z = tokenizer.encode_latents(golden.inputs["images"])
    golden.check("z", z.transpose(1, 2)[:, :, None])
    out = tokenizer.quantizer(z)
    golden.check("indices", out.ids[:, None])
    golden.check("quantised", out.q.transpose(1, 2)[:, :, None])
    golden.check("commitment_loss", out.losses["commitment"][None] * tokenizer.quantizer.loss_weights["commitment"])
    golden.check("codebook_loss", out.losses["codebook"][None])
    golden.check("pixels", tokenizer.decode_latents(tokenizer.quantizer.ids_to_codes(out.ids)))
    seq = tokenizer.encode(golden.inputs["images"])
    golden.check("indices", seq.ids[:, None])
    torch.testing.assert_close(tokenizer.decode(seq), golden.outputs["pixels"].clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_recorded_vae():
    golden = read("titok_vae")
    tokenizer = load_official(golden.state)
    z = tokenizer.encode_latents(golden.inputs["images"])
    posterior = tokenizer.quantizer.posterior(z)
    golden.check("mean", posterior.mean.transpose(1, 2)[:, :, None])
    golden.check("logvar", posterior.logvar.transpose(1, 2)[:, :, None])
    golden.check("kl", posterior.kl())
    golden.check("pixels_from_mean", tokenizer(golden.inputs["images"]).reconstruction)
    golden.check("pixels_from_given", tokenizer.decode_latents(tokens_last(golden.inputs["given_latent"])))


@pytest.mark.parametrize("case", ["titok_vq", "titok_vae"])
def test_export_is_the_inverse(case):
    state = read(case).state
    exported = export_official(load_official(state))
    assert exported.keys() == state.keys()
    for key, value in state.items():
        assert exported[key].shape == value.shape and torch.equal(exported[key], value.float()), key


@pytest.mark.parametrize("case", ["titok_vq", "titok_vae"])
def test_our_folder_holds_the_same_model(case, tmp_path):
    golden = read(case)
    tokenizer = load_official(golden.state)
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer1D.from_pretrained(tmp_path)
    assert again.model_id == tokenizer.model_id
    images = golden.inputs["images"]
    assert torch.equal(again(images).reconstruction, tokenizer(images).reconstruction)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    """Built on the meta device, so that half a billion weights cost nothing."""
    encoder, decoder, tokens, codes, dim, total, in_encoder, in_decoder, keys = PUBLISHED[name]
    config = infer(read("titok_vq" if codes else "titok_vae").state)
    for side, size in (("encoder", encoder), ("decoder", decoder)):
        config[side] |= {"tokens": tokens, "width": SIZES[size][0], "depth": SIZES[size][1], "image_size": [256, 256]}
    config["image_size"] = [256, 256]
    config["decoder"]["dim"] = dim
    config["encoder"]["dim"] = config["quantizer"]["dim"] = dim if codes else 2 * dim
    if codes:
        config["quantizer"]["vocab_size"] = codes
    with torch.device("meta"):
        tokenizer = Tokenizer1D.from_config(config)
    exported = export_official(tokenizer)
    assert len(exported) == keys
    assert sum(v.numel() for v in exported.values()) == sum(p.numel() for p in tokenizer.parameters()) == total
    # the published encoder does not own its latent tokens
    assert sum(v.numel() for k, v in exported.items() if k.startswith("encoder.")) == in_encoder
    assert sum(v.numel() for k, v in exported.items() if k.startswith("decoder.")) == in_decoder
    inferred = Tokenizer1D.from_config  # what the weights say is what they were made with
    with torch.device("meta"):
        assert inferred(infer(exported)).to_config() == tokenizer.to_config()


def test_files_and_folders(tmp_path):
    golden = read("titok_vq")
    folder = tmp_path / "tokenizer_titok_tiny"
    folder.mkdir()
    save_file(golden.state, folder / "model.safetensors")
    tokenizer = load_official(folder)
    assert tokenizer.name == "tokenizer_titok_tiny" and not tokenizer.quantizer.l2 and not tokenizer.training
    assert load_official(folder / "model.safetensors", name="x").name == "x"
    (folder / "config.json").write_text(json.dumps({"model": {"vq_model": {"use_l2_norm": True}}}))
    assert load_official(folder).quantizer.l2 and not load_official(folder, l2=False).quantizer.l2
    for text in ("[]", '{"model": 3}', '{"model": {"vq_model": []}}'):
        (folder / "config.json").write_text(text)
        assert not load_official(folder).quantizer.l2
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_official(folder)


def test_prefix_of_data_parallel_training_is_dropped_and_usage_buffer_ignored():
    state = {f"module.{k}": v for k, v in read("titok_vq").state.items()}
    load_official({**state, "module.quantize.embed_prob": torch.zeros(64)})


def test_what_is_refused(tmp_path):
    state = read("titok_vq").state
    wrong = [
        ({**state, "decoder.ffn.2.weight": torch.zeros(1)}, "two-stage \\(legacy\\).*Supported now: one-stage"),
        ({**state, "decoder.text_guidance_proj.weight": torch.zeros(1)}, "TA-TiTok"),
        ({**state, "decoder.extra": torch.zeros(1)}, "unexpected \\['decoder.extra'\\]"),
        ({k: v for k, v in state.items() if k != "decoder.ln_post.bias"}, "missing \\['decoder.ln_post.bias'\\]"),
        ({k: v for k, v in state.items() if k != "latent_tokens"}, "'latent_tokens' is missing"),
        ({**state, "latent_tokens": torch.zeros(8)}, "2 dimensions"),
        ({**state, "encoder.ln_pre.weight": torch.zeros(3)}, "unexpected shape"),
        ({**state, "encoder.positional_embedding": torch.zeros(19, 64)}, "no square grid"),
        ({**state, "encoder.positional_embedding": torch.zeros(26, 64)}, "80 pixels, the decoder at 64"),
        ({}, "not a TiTok"),
    ]
    for source, message in wrong:
        with pytest.raises(ModelError, match=message):
            load_official(source)
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="pickled weights are not opened"):
        load_official(tmp_path / "model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_official(tmp_path)


def test_only_published_layouts_are_exported():
    config = load_official(read("titok_vq").state).to_config()
    fsq = copy.deepcopy(config)
    fsq["quantizer"] = {"class": "tok1d.tokenizers.quantizers.fsq.FSQ", "levels": [8] * 16}
    with pytest.raises(ModelError, match="TiTokEncoder × FSQ × GridDecoder"):
        export_official(Tokenizer1D.from_config(fsq))
    config["encoder"]["heads"] = 2
    with pytest.raises(ModelError, match="64 wide, these are 32 wide"):
        export_official(Tokenizer1D.from_config(config))
