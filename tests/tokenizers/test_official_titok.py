"""The published TiTok family: recorded numbers, exact parameter and key counts, round trips."""

import pytest
import torch
from torch import Tensor

from tests.golden.read import Golden, read, tokens_last
from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.lengths import FixedLength, TailDrop
from tok1d.tokenizers.official.layout import export_state, load_state
from tok1d.tokenizers.official.maskgit_vqgan import soft_code
from tok1d.tokenizers.official.titok import LAYOUTS, legacy_config, maskgit_vqgan_config, tatitok_config, titok_config
from tok1d.tokenizers.official.titok_legacy import add_pixels
from tok1d.tokenizers.tokenizer import Tokenizer1D

BY_NAME = {layout.name: layout for layout in LAYOUTS}
CASES = {
    "titok_vq": "titok",
    "titok_vae": "titok",
    "titok_legacy_vq": "titok-legacy",
    "titok_legacy_stage1": "titok-legacy",
    "one_d_piece": "titok-legacy",
    "tatitok_vq": "tatitok",
    "maskgit_vqgan": "maskgit-vqgan",
}

S, B, L = (512, 8), (768, 12), (1024, 24)
VAE = {"vocab_size": 0, "dim": 16}
# configuration; parameters in all, and under the published "encoder." and "decoder."; tensors in a published file
VARIANTS = {
    "titok_l32": (legacy_config(encoder=L, decoder=L, tokens=32), 641_054_735, 303_410_188, 306_822_144, 692),
    "titok_b64": (legacy_config(encoder=B, decoder=B, tokens=64), 204_814_095, 85_904_652, 88_070_656, 404),
    "titok_s128": (legacy_config(encoder=S, decoder=S, tokens=128), 83_674_639, 25_818_636, 27_000_832, 308),
    "one_d_piece_s256": (legacy_config(encoder=S, decoder=S, tokens=256, nested=True), 83_871_247, None, None, 308),
    "titok_bl64_vq8k": (titok_config(encoder=B, decoder=L, tokens=64), 390_016_148, 85_944_640, 303_498_068, 459),
    "titok_bl128_vq8k": (titok_config(encoder=B, decoder=L, tokens=128), 390_179_988, 85_993_792, 303_563_604, 459),
    "titok_sl256_vq8k": (titok_config(encoder=S, decoder=L, tokens=256), 330_260_884, 25_910_848, 303_694_676, 411),
    "titok_ll32_vae": (titok_config(encoder=L, decoder=L, tokens=32, **VAE), 606_879_604, 303_430_688, 303_416_148, 602),
    "titok_bl64_vae": (titok_config(encoder=B, decoder=L, tokens=64, **VAE), 389_418_100, 85_920_032, 303_448_916, 458),
    "titok_bl128_vae": (titok_config(encoder=B, decoder=L, tokens=128, **VAE), 389_581_940, 85_969_184, 303_514_452, 458),
    "tatitok_bl32_vq": (tatitok_config(encoder=B, decoder=L, tokens=32), 390_800_532, None, None, 462),
    "tatitok_bl64_vq": (tatitok_config(encoder=B, decoder=L, tokens=64), 390_882_452, None, None, 462),
    "tatitok_bl128_vq": (tatitok_config(encoder=B, decoder=L, tokens=128), 391_046_292, None, None, 462),
    "tatitok_bl32_vae": (tatitok_config(encoder=B, decoder=L, tokens=32, **VAE), 390_202_484, None, None, 461),
    "tatitok_bl64_vae": (tatitok_config(encoder=B, decoder=L, tokens=64, **VAE), 390_284_404, None, None, 461),
    "tatitok_sl128_vae": (tatitok_config(encoder=S, decoder=L, tokens=128, **VAE), 330_275_188, None, None, 413),
    "maskgit_vqgan": (maskgit_vqgan_config(), 54_515_587, 23_775_104, 30_478_339, 79 + 88 + 1),
}


def load(case: str, golden: Golden | None = None, **published) -> Tokenizer1D:
    golden = golden or read(case)
    return load_state(BY_NAME[CASES[case]], golden.state, published or golden.meta["config"], case)


def channels_first(x: Tensor) -> Tensor:
    """Ours (B, L, C) → published (B, C, 1, L)."""
    return x.transpose(1, 2)[:, :, None]


def grid(x: Tensor) -> Tensor:
    """Ours (B, h · w, C) → published (B, C, h, w), square."""
    side = round(x.shape[1] ** 0.5)
    return x.transpose(1, 2).unflatten(2, (side, side))


# recorded numbers ------------------------------------------------------------------------------------------------


def check_encoder(golden: Golden, tokenizer: Tokenizer1D) -> Tensor:
    """z and ids are the recorded ones; returns the codes."""
    z = tokenizer.encode_latents(golden.inputs["images"])
    golden.check("z", channels_first(z))
    out = tokenizer.quantizer(z)
    golden.check("indices", out.ids[:, None])
    golden.check("indices", tokenizer.encode(golden.inputs["images"]).ids[:, None])
    if "quantised" in golden.outputs:
        golden.check("quantised", channels_first(out.q))
    if "codebook_loss" in golden.outputs:
        commitment = out.losses["commitment"] * tokenizer.quantizer.loss_weights["commitment"]
        golden.check("commitment_loss", commitment[None])
        golden.check("codebook_loss", out.losses["codebook"][None])
        if "quantizer_loss" in golden.outputs:
            golden.check("quantizer_loss", (commitment + out.losses["codebook"])[None])
    return tokenizer.quantizer.ids_to_codes(out.ids)


def test_recorded_vq():
    golden = read("titok_vq")
    tokenizer = load("titok_vq")
    golden.check("pixels", tokenizer.decode_latents(check_encoder(golden, tokenizer)))
    pictures = tokenizer.decode(tokenizer.encode(golden.inputs["images"]))
    torch.testing.assert_close(pictures, golden.outputs["pixels"].clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_recorded_vae():
    golden = read("titok_vae")
    tokenizer = load("titok_vae")
    posterior = tokenizer.quantizer.posterior(tokenizer.encode_latents(golden.inputs["images"]))
    golden.check("mean", channels_first(posterior.mean))
    golden.check("logvar", channels_first(posterior.logvar))
    golden.check("kl", posterior.kl())
    golden.check("pixels_from_mean", tokenizer(golden.inputs["images"]).reconstruction)
    golden.check("pixels_from_given", tokenizer.decode_latents(tokens_last(golden.inputs["given_latent"])))


def test_recorded_legacy_with_pixel_decoder():
    golden = read("titok_legacy_vq")
    tokenizer = load("titok_legacy_vq")
    codes = check_encoder(golden, tokenizer)
    golden.check("logits", grid(tokenizer.decoder.logits(codes)))
    golden.check("pixels", tokenizer.decode_latents(codes))


def test_recorded_legacy_stage_one():
    golden = read("titok_legacy_stage1")
    tokenizer = load("titok_legacy_stage1")
    codes = check_encoder(golden, tokenizer)
    golden.check("logits", grid(tokenizer.decoder.logits(codes)))
    with pytest.raises(ModelError, match=r"stage-1 weights.*maskgit-vqgan-imagenet-f16-256.bin.*add_pixels\(tokenizer, vqgan\)"):
        tokenizer.decode_latents(codes)


def test_recorded_text_guided():
    golden = read("tatitok_vq")
    tokenizer = load("tatitok_vq")
    codes = check_encoder(golden, tokenizer)
    text = golden.inputs["text_guidance"]
    golden.check("pixels", tokenizer.decode_latents(codes, text=text))
    seq = tokenizer.encode(golden.inputs["images"])
    torch.testing.assert_close(tokenizer.decode(seq, text=text), golden.outputs["pixels"].clamp(0, 1), atol=1e-4, rtol=1e-4)
    with pytest.raises(TokenError, match=r"needs the encoded text.*\(2, 77, 64\).*got none.*text_features"):
        tokenizer.decode(seq)


def test_recorded_one_d_piece():
    golden = read("one_d_piece")
    tokenizer = load("one_d_piece")
    codes = check_encoder(golden, tokenizer)
    prefixes = golden.meta["config"]["prefixes"]
    for k in prefixes:
        golden.check(f"pixels_{k}", tokenizer.decode_latents(codes[:, :k]))
    # different lengths in one batch: image 0 keeps 3 tokens, image 1 keeps 8
    together = tokenizer.decode_latents(codes[:, :8], torch.tensor([3, 8]))
    wanted = torch.stack([golden.outputs["pixels_3"][0], golden.outputs["pixels_8"][1]])
    torch.testing.assert_close(together, wanted, atol=3e-4, rtol=1e-4)
    seq = tokenizer.encode(golden.inputs["images"], tokens=3)
    torch.testing.assert_close(tokenizer.decode(seq), golden.outputs["pixels_3"].clamp(0, 1), atol=1e-3, rtol=1e-4)


def test_one_d_piece_draws_one_length_a_batch():
    lengths = load("one_d_piece").lengths
    assert isinstance(lengths, TailDrop) and lengths.allowed(3) == [1, 2, 3]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([lengths.sample(4, 16, generator) for _ in range(400)])
    assert (drawn == drawn[:, :1]).all() and drawn.unique().tolist() == list(range(1, 17))


def test_recorded_maskgit_vqgan():
    golden = read("maskgit_vqgan")
    tokenizer = load("maskgit_vqgan")
    z = tokenizer.encode_latents(golden.inputs["images"])
    golden.check("z", grid(z))
    out = tokenizer.quantizer(z)
    golden.check("indices", out.ids)
    golden.check("quantised", grid(out.q))
    golden.check("soft_code", soft_code(tokenizer.quantizer, z))
    golden.check("loss", (out.losses["commitment"] + 0.25 * out.losses["codebook"])[None])
    golden.check("pixels", tokenizer.decode_latents(out.q))
    codes = tokenizer.quantizer.ids_to_codes(golden.inputs["given_indices"])
    golden.check("pixels_of_given", tokenizer.decode_latents(codes))


# both directions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_export_is_the_inverse(case):
    golden, ignored = read(case), {"quantize.embed_prob"}
    layout = BY_NAME[CASES[case]]
    exported = export_state(layout, load(case, golden))
    assert exported.keys() == golden.state.keys() - ignored
    for key, value in exported.items():
        assert value.shape == golden.state[key].shape and torch.equal(value, golden.state[key].float()), key


@pytest.mark.parametrize("case", CASES)
def test_exactly_one_layout_recognises_it(case):
    shapes = {key: tuple(value.shape) for key, value in read(case).state.items()}
    assert [layout.name for layout in LAYOUTS if layout.recognises(shapes)] == [CASES[case]]


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("tatitok_vq", "titok_legacy_stage1")])
def test_our_folder_holds_the_same_model(case, tmp_path):
    golden = read(case)
    tokenizer = load(case, golden)
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer1D.from_pretrained(tmp_path)
    assert again.model_id == tokenizer.model_id
    images = golden.inputs["images"]
    assert torch.equal(again(images).reconstruction, tokenizer(images).reconstruction)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    """Parameters and keys of every release, on the meta device; its shapes alone tell the configuration."""
    config, total, in_encoder, in_decoder, keys = VARIANTS[name]
    layout = BY_NAME[config["name"]]
    with torch.device("meta"):
        tokenizer = Tokenizer1D.from_config(config)
    exported = export_state(layout, tokenizer)
    assert len(exported) == keys
    assert sum(v.numel() for v in exported.values()) == sum(p.numel() for p in tokenizer.parameters()) == total
    for side, count in (("encoder.", in_encoder), ("decoder.", in_decoder)):
        found = sum(v.numel() for k, v in exported.items() if k.startswith(side))
        assert count is None or found == count  # the published encoder does not own its latent tokens
    shapes = {key: tuple(value.shape) for key, value in exported.items()}
    assert [found.name for found in LAYOUTS if found.recognises(shapes)] == [layout.name]
    with torch.device("meta"):
        assert Tokenizer1D.from_config(layout.config(shapes, {}, config["name"])).to_config() == tokenizer.to_config()


def test_pixel_decoder_is_the_teacher_s():
    config = legacy_config(encoder=S, decoder=S, tokens=128)
    with torch.device("meta"):
        exported = export_state(BY_NAME["titok-legacy"], Tokenizer1D.from_config(config))
        teacher = export_state(BY_NAME["maskgit-vqgan"], Tokenizer1D.from_config(maskgit_vqgan_config()))
    pixel = {k.removeprefix("pixel_"): v.shape for k, v in exported.items() if k.startswith("pixel_")}
    assert pixel == {k: v.shape for k, v in teacher.items() if not k.startswith("encoder.")}


# what configurations say -----------------------------------------------------------------------------------------


def test_published_configuration_is_read():
    golden = read("titok_vq")
    assert not load("titok_vq", golden, none=True).quantizer.l2
    assert load("titok_vq", golden, model={"vq_model": {"use_l2_norm": True}}).quantizer.l2
    for odd in ({"model": 3}, {"model": {"vq_model": []}}, {"model": {"vq_model": {"use_l2_norm": "${x}"}}}):
        assert not load("titok_vq", golden, **odd).quantizer.l2
    legacy = read("titok_legacy_vq")
    assert load("titok_legacy_vq", legacy, none=True).quantizer.l2
    assert not load("titok_legacy_vq", legacy, model={"vq_model": {"use_l2_norm": False}}).quantizer.l2
    vqgan = read("maskgit_vqgan")
    assert load("maskgit_vqgan", vqgan, none=True).image_size == (256, 256)
    assert load("maskgit_vqgan", vqgan, dataset={"preprocessing": {"crop_size": 64}}).max_tokens == 16


def test_one_d_piece_is_told_from_titok():
    state, layout = read("one_d_piece").state, BY_NAME["titok-legacy"]
    assert isinstance(load_state(layout, state, {}, "titok").lengths, FixedLength)
    assert load_state(layout, state, {}, "turing-motors/One-D-Piece-S-256").is_nested
    assert load_state(layout, state, {"model": {"vq_model": {"strict_length_assertion": False}}}, "x").is_nested
    with torch.device("meta"):
        whole = export_state(layout, Tokenizer1D.from_config(legacy_config(encoder=(64, 1), decoder=(64, 1), tokens=256)))
    shapes = {key: tuple(value.shape) for key, value in whole.items()}
    assert layout.config(shapes, {}, "x")["lengths"]["class"].endswith("TailDrop")


# pictures of stage 1 ---------------------------------------------------------------------------------------------


def test_stage_one_makes_pictures_with_its_vqgan():
    stage1, vqgan = load("titok_legacy_stage1"), load("maskgit_vqgan")
    images = read("titok_legacy_stage1").inputs["images"]
    tokenizer = add_pixels(stage1, vqgan)
    ids = tokenizer.encode(images).ids
    proxies = stage1.decoder.logits(stage1.quantizer.ids_to_codes(ids)).argmax(-1)
    torch.testing.assert_close(tokenizer.decode(ids), vqgan.decode(proxies))
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())
    with pytest.raises(ModelError, match="before add_pixels"):
        export_state(BY_NAME["titok-legacy"], tokenizer)
    soft = add_pixels(stage1, vqgan, soft=True)
    exported = export_state(BY_NAME["titok-legacy"], soft)
    assert {k for k in exported if k.startswith("pixel_")} and load_state(BY_NAME["titok-legacy"], exported, {}, "x")
    with pytest.raises(ModelError, match="takes a two-stage TiTok and a MaskGIT-VQGAN"):
        add_pixels(vqgan, stage1)
    with pytest.raises(ModelError, match="another VQGAN trained it"):
        add_pixels(stage1, load("maskgit_vqgan", none=True))
