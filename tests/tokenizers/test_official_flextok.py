"""Published FlexTok: recorded numbers, exact counts of the published sizes, round trip, configurations, what is refused."""

import pytest
import torch

from tests.golden.read import read
from tok1d.errors import ModelError
from tok1d.tokenizers.official.flextok import FLEXTOK, flextok_config
from tok1d.tokenizers.official.flextok_config import MOST_CHARACTERS, settings
from tok1d.tokenizers.official.layout import export_state, load_state
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokenizers.vae import LatentEncoder

pytest.importorskip("diffusers", reason="the published tokenizer has a VAE of diffusers")

PLAIN = {"scaling_factor": 0.6, "max_timestep": 1.0}
# encoder and decoder depth; tensors and parameters of encoder and decoder as published, millions
PUBLISHED = {"d12_d12": (12, 12, 90, 124, 85.38, 172.45), "d18_d18": (18, 18, 132, 178, 287.3, 578.6), "d18_d28": (18, 28, 132, 268, 287.3, 2169.7)}


@pytest.fixture(scope="module")
def golden():
    return read("flextok")


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load_state(FLEXTOK, golden.state, PLAIN, "tiny")


def published_trees() -> dict:
    """Configuration trees with the names and arguments of the published ones, made up here."""
    m = "flextok.model."
    wrap = {"_target_": f"{m}utils.wrappers.SequentialModuleDictWrapper"}
    encoder = {
        "enc_channels_to_last": {"_target_": f"{m}utils.dict_ops.PerSampleOp", "per_sample_op": {"_target_": f"{m}utils.dict_ops.channels_first_to_last", "_partial_": True}},
        "enc_seq_packer": {"_target_": f"{m}preprocessors.flex_seq_packing.BlockWiseSequencePacker", "mask_mode": "causal_last"},
        "enc_transformer": {"_target_": f"{m}trunks.transformers.FlexTransformer", "dim": 128, "depth": 1, "head_dim": 64},
    }
    decoder = {
        "dec_nested_dropout": {"_target_": f"{m}preprocessors.token_dropout.MaskedNestedDropout", "dim": 64, "size_sampling_mode": "uniform_pow2"},
        "dec_latent_dropout": {"_target_": f"{m}preprocessors.nullcond.LearnedNullCond", "dim": 64, "dropout_prob": 0.2},
        "dec_time_embedder": {"_target_": f"{m}preprocessors.time_embedding.TimestepEmbedder", "dim": 64, "max_timestep": 1.0},
        "dec_transformer": {"_target_": f"{m}trunks.transformers.FlexTransformer", "dim": 64, "depth": 3, "intermediate_layers": [1], "rope_forward_read_key": None},
    }
    return {
        "vae": {"_target_": "flextok.vae_wrapper.StableDiffusionVAE", "latent_channels": 8, "scaling_factor": 0.6, "sample_posterior": True},
        "encoder": {**wrap, "module_dict": encoder},
        "decoder": {**wrap, "module_dict": decoder},
        "regularizer": {"_target_": "flextok.regularizers.quantize_fsq.FSQ", "levels": [8, 8, 8, 5, 5, 5]},
        "flow_matching_noise_module": {"_target_": "flextok.flow_matching.noise_modules.MinRFNoiseModule", "ln": False, "mode_scale": 0.25},
        "pipeline": {"_target_": "flextok.flow_matching.pipelines.MinRFPipeline", "_partial_": True},
    }


SAID = {
    "scaling_factor": 0.6, "levels": [8, 8, 8, 5, 5, 5], "max_timestep": 1.0, "lengths": "uniform_powers_of_two", "null_prob": 0.2,
    "noise": "mode", "mode_scale": 0.25, "encoder_head_dim": 64, "decoder_head_dim": 64,
}  # fmt: skip


# recorded numbers ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_recorded_encoding(golden, tokenizer):
    images = (golden.inputs["images"] + 1) / 2
    golden.check("vae_latents", tokenizer.encoder.latents(images))
    z = tokenizer.encode_latents(images)
    golden.check("z", z)
    out = tokenizer.quantizer(z)
    golden.check("ids", out.ids)
    golden.check("quantised", out.q)
    golden.check("ids", tokenizer.encode(images).ids)
    assert torch.equal(tokenizer.encode(images, tokens=4).ids, golden.outputs["ids"][:, :4].long())


@torch.inference_mode()
def test_recorded_velocities(golden, tokenizer):
    q, x, t = golden.outputs["quantised"], golden.inputs["noised"], golden.inputs["t"]
    mask = torch.arange(16) < (1 + 3 * torch.arange(4))[:, None] % 16 + 1
    flow = tokenizer.decoder.net.flow(x, t, q, mask)
    golden.check("velocity_mixed_prefix", flow.velocity)
    golden.check("block1_activation", flow.activation.flatten(0, 1)[None])
    golden.check("velocity_null", tokenizer.decoder.velocity(x, t, q, mask, torch.ones(4, dtype=torch.bool)))


@torch.inference_mode()
@pytest.mark.parametrize("fast", [True, False])
def test_recorded_samples(golden, tokenizer, fast, monkeypatch):
    decoder, q = tokenizer.decoder, golden.outputs["quantised"]
    monkeypatch.setattr(decoder, "fast", fast)
    for k in (1, 4, 16):
        for name, guidance, normalised in (("g1", 1.0, False), ("g3", 3.0, False), ("g3_apg", 3.0, True)):
            latents = decoder.sample(golden.inputs["noise"], q[:, :k], steps=4, guidance=guidance, norm_guidance=normalised)
            golden.check(f"latents_k{k}_{name}", latents)
    latents = decoder.sample(golden.inputs["noise"], q, steps=4, guidance=1.0)
    golden.check("images_full_g1", decoder.vae(latents) * 2 - 1)


def test_our_position_tables_are_the_published_ones(golden):
    from tok1d.tokenizers.flextok_blocks import sine_table

    for side, name, width in (("encoder", "enc_posemb_module", 128), ("decoder", "dec_patches_posemb_module", 64)):
        theirs = golden.state[f"{side}.module_dict.{name}.posembs"][0]
        torch.testing.assert_close(sine_table(width, 4, 4), theirs, atol=1e-6, rtol=0)


def test_fast_pictures_through_the_vae(golden, tokenizer, monkeypatch):
    seq = tokenizer.encode((golden.inputs["images"] + 1) / 2)
    seeds = [1, 2, 3, 4]
    fast = tokenizer.decode(seq[:, :5], steps=3, guidance=3.0, seeds=seeds)
    monkeypatch.setattr(tokenizer.decoder, "fast", False)
    assert (fast - tokenizer.decode(seq[:, :5], steps=3, guidance=3.0, seeds=seeds)).abs().max() <= 1e-4
    alone = tokenizer.decode(seq[2:3, :5], steps=3, guidance=3.0, seeds=[3])
    torch.testing.assert_close(alone, fast[2:3], atol=1e-5, rtol=0)


def test_export_is_the_inverse(golden, tokenizer):
    exported = export_state(FLEXTOK, tokenizer)
    assert exported.keys() == golden.state.keys()
    for key, value in golden.state.items():
        assert torch.equal(exported[key], value.float()), key


def test_our_folder_holds_the_same_model(golden, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer1D.from_pretrained(tmp_path)
    ids = golden.outputs["ids"].long()[:1]
    assert again.model_id == tokenizer.model_id
    assert torch.equal(again.decode(ids, steps=2), tokenizer.decode(ids, steps=2))


def test_the_vae_stays_in_float32(golden, tokenizer):
    images = (golden.inputs["images"] + 1) / 2
    half = load_state(FLEXTOK, golden.state, PLAIN, "tiny").to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.encoder.latents(images), tokenizer.encoder.latents(images))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encoder.latents(images), half.encoder.latents(images))
    ids = golden.outputs["ids"].long()
    error = half.decode(ids, steps=2, guidance=1) - tokenizer.decode(ids, steps=2, guidance=1)
    assert 0 < error.abs().mean() < 0.05
    assert not any(p.requires_grad for p in LatentEncoder([32], 1, 4).parameters())


def test_posterior_samples(golden, tokenizer):
    images = (golden.inputs["images"] + 1) / 2
    config = tokenizer.to_config()
    config["encoder"]["posterior"] = "sample"
    sampling = Tokenizer1D.from_config(config)
    sampling.load_state_dict(tokenizer.state_dict())
    draws = [sampling.encoder.latents(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    many = torch.stack([sampling.encoder.latents(images[:1]) for _ in range(40)])
    spread = many.std(0).mean()
    assert (many.mean(0) - tokenizer.encoder.latents(images[:1])).abs().mean() < spread


def test_training_with_the_vae_reaches_the_encoder(golden):
    tok = load_state(FLEXTOK, golden.state, PLAIN, "tiny").train()
    for name, parameter in tok.named_parameters():
        parameter.requires_grad_(".vae." not in name)
    tok((golden.inputs["images"] + 1) / 2).losses["flow"].backward()
    assert (tok.encoder.registers.grad != 0).any() and tok.encoder.vae.quant_conv.weight.grad is None


# published sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_and_parameters_of_published_sizes(name):
    """Built on the meta device, so that two billion weights cost nothing."""
    enc_depth, dec_depth, enc_tensors, dec_tensors, enc_millions, dec_millions = PUBLISHED[name]
    config = flextok_config(enc_depth, dec_depth, **PLAIN)
    with torch.device("meta"):
        tok = Tokenizer1D.from_config(config)
    exported = export_state(FLEXTOK, tok)
    assert sum(v.numel() for v in exported.values()) == sum(v.numel() for v in tok.state_dict().values())
    for prefix, tensors, millions in (("encoder.", enc_tensors, enc_millions), ("decoder.", dec_tensors, dec_millions), ("vae.", 248, 83.8)):
        group = [v for k, v in exported.items() if k.startswith(prefix)]
        assert len(group) == tensors
        assert sum(v.numel() for v in group) / 1e6 == pytest.approx(millions, abs=0.05)
    shapes = {k: tuple(v.shape) for k, v in exported.items()}
    assert FLEXTOK.recognises(shapes)
    assert FLEXTOK.config(shapes, PLAIN, "flextok") == config
    if name == "d18_d28":
        assert shapes["decoder.module_dict.dec_transformer.blocks.27.mlp.fc3.weight"] == (4778, 1792)
        assert shapes["decoder.module_dict.dec_transformer.blocks.0.adaLN_modulation.1.weight"] == (21504, 1792)
        assert shapes["decoder.module_dict.dec_registers_posemb_module.posembs"] == (1, 1, 1792, 256)
        assert tok.decoder.guidance == 7.5 and tok.vocab_size == 64_000


# configurations --------------------------------------------------------------------------------------------------


def test_what_a_configuration_says():
    trees = published_trees()
    header = {key: str(value) for key, value in trees.items()} | {"_target_": "flextok.flextok_wrapper.FlexTok"}
    assert settings({"config": trees}) == settings(trees) == settings({"__metadata__": header}) == SAID
    assert settings({}) == settings({"golden": "x", "__metadata__": {"format": "pt"}}) == {}
    del trees["decoder"]["module_dict"]["dec_time_embedder"]["max_timestep"]
    trees["flow_matching_noise_module"] = {"_target_": "x.MinRFNoiseModule", "stratisfied": True}
    said = settings(trees)
    assert said["max_timestep"] == 1000.0 and said["noise"] == "logit_normal" and said["stratified"]


def test_a_configuration_reaches_the_parts(golden):
    header = {key: str(value) for key, value in published_trees().items()}
    config = load_state(FLEXTOK, golden.state, {"__metadata__": header}, "x").to_config()
    assert config["encoder"]["scaling_factor"] == config["decoder"]["scaling_factor"] == 0.6
    assert config["decoder"]["null_prob"] == 0.2 and config["decoder"]["noise"] == "mode" and config["decoder"]["max_timestep"] == 1.0
    assert config["lengths"]["distribution"] == "uniform_powers_of_two"


def test_guesses_are_said(golden):
    with pytest.warns(UserWarning, match=r"scaling_factor 1\.0 and max_timestep 1\.0, which is a guess"):
        load_state(FLEXTOK, golden.state, {}, "bare")


def test_a_hostile_configuration_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    hostile = [
        ({"vae": {"_target_": "os.system", "command": f"touch {marker}"}}, "'os.system', which is no part"),
        ({"decoder": {"module_dict": [{"deep": {"_target_": "builtins.eval", "_args_": [code]}}]}}, "'builtins.eval'"),
        ({"vae": {"_target_": ["os.system"]}}, "no part of FlexTok"),
        ({"__metadata__": {"vae": code}}, "no plain data"),
        ({"__metadata__": {"vae": "{'a': " + code + "}"}}, "no plain data"),
        ({"__metadata__": {"vae": "(" * 5000}}, "no plain data"),
        ({"__metadata__": {"vae": "{}" + " " * MOST_CHARACTERS}}, "at most 10,000"),
        ({"vae": {"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[{}]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}}, "nested deeper"),
        ({"encoder": {"_target_": "m.FlexTransformer", "qkv_bias": True}}, "qkv_bias=True"),
        ({"encoder": {"_target_": "m.BlockWiseSequencePacker", "mask_mode": "causal"}}, "mask_mode='causal'"),
        ({"decoder": {"_target_": "m.LearnedNullCond", "replace_with_single_token": True}}, "replace_with_single_token"),
        ({"decoder": {"_target_": "m.TimestepEmbedder", "max_timestep": "1"}}, "needs a number"),
        ({"decoder": {"_target_": "m.MaskedNestedDropout", "size_sampling_mode": "zipf"}}, "zipf"),
        ({"flow_matching_noise_module": {"_target_": "m.MinRFNoiseModule", "ln": 1}}, "true or false"),
    ]
    for published, message in hostile:
        with pytest.raises(ModelError, match=message):
            settings(published)
    assert not marker.exists()


def test_what_is_refused(golden, tokenizer):
    state = golden.state
    wrong = [
        ({**state, "decoder.extra": torch.zeros(1)}, PLAIN, "unexpected \\['decoder.extra'\\]"),
        ({k: v for k, v in state.items() if not k.endswith("nullcond")}, PLAIN, "missing .*nullcond"),
        (state, {**PLAIN, "levels": [8, 8]}, "6 numbers a token"),
        (state, {**PLAIN, "decoder_head_dim": 48}, "48 wide"),
        ({**state, "encoder.module_dict.enc_register_module.registers": torch.zeros(16)}, PLAIN, "2 dimensions"),
    ]
    for tensors, published, message in wrong:
        with pytest.raises(ModelError, match=message):
            load_state(FLEXTOK, tensors, published, "x")
    with pytest.raises(ModelError, match="no setting 'colour'"):
        flextok_config(colour=3)
    config = tokenizer.to_config()
    for part, key, value, message in (
        ("decoder", "heads", 2, "64 wide"),
        ("decoder", "vae_encoder", True, "one VAE"),
        ("decoder", "scaling_factor", 0.5, "same scaling_factor"),
    ):
        changed = {**config, part: {**config[part], key: value}}
        with pytest.raises(ModelError, match=message):
            export_state(FLEXTOK, Tokenizer1D.from_config(changed))
