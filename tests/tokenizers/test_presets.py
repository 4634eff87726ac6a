"""The table of published models: every row is built on the meta device and compared with the figures of its specification."""

import math

import pytest
import torch

from tok1d.errors import ModelError
from tok1d.presets import PRESETS, Preset
from tok1d.tokenizers.official import NAMES, config_of, layout_named, recognise
from tok1d.tokenizers.official.write import published_config
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokens import bits_for_vocab

ROWS = [p for p in PRESETS if p.layout != "tok1d"]
# parameters under the first word of a published name, as the authors' files have them
SIDES = {
    "titok-l-32": {"encoder": 303_410_188, "decoder": 306_822_144, "pixel_quantize": 262_144, "pixel_decoder": 30_478_339},
    "titok-b-64": {"encoder": 85_904_652, "decoder": 88_070_656, "pixel_quantize": 262_144, "pixel_decoder": 30_478_339},
    "titok-s-128": {"encoder": 25_818_636, "decoder": 27_000_832, "pixel_quantize": 262_144, "pixel_decoder": 30_478_339},
    "titok-bl-64-vq8k": {"encoder": 85_944_640, "decoder": 303_498_068, "quantize": 8192 * 64},
    "titok-bl-128-vq8k": {"encoder": 85_993_792, "decoder": 303_563_604, "quantize": 8192 * 64},
    "titok-sl-256-vq8k": {"encoder": 25_910_848, "decoder": 303_694_676, "quantize": 8192 * 64},
    "titok-ll-32-vae": {"encoder": 303_430_688, "decoder": 303_416_148},
    "titok-bl-64-vae": {"encoder": 85_920_032, "decoder": 303_448_916},
    "titok-bl-128-vae": {"encoder": 85_969_184, "decoder": 303_514_452},
    "maskgit-vqgan": {"encoder": 23_775_104, "decoder": 30_478_339, "quantize": 262_144},
    "flextok-d12-d12": {"encoder": 85_380_000, "decoder": 172_450_000, "vae": 83_820_000},
    "flextok-d18-d18": {"encoder": 287_300_000, "decoder": 578_600_000, "vae": 83_800_000},
    "flextok-d18-d28": {"encoder": 287_300_000, "decoder": 2_169_700_000, "vae": 83_800_000},
    "flextok-d18-d28-dfn": {"encoder": 287_300_000, "decoder": 2_169_700_000, "vae": 83_800_000},
    "instella-bae": {"encoder": 119_860_000, "decoder": 307_010_000, "quantizer": 98_000, "to_pixel": 787_000},
}
# totals and tensors in the file, where they are given for the whole
TOTALS = {
    "titok-l-32": (641_054_735, 692), "titok-b-64": (204_814_095, 404), "titok-s-128": (83_674_639, 308),
    "titok-bl-64-vq8k": (390_016_148, 459), "titok-bl-128-vq8k": (390_179_988, 459), "titok-sl-256-vq8k": (330_260_884, 411),
    "titok-ll-32-vae": (606_879_604, 602), "titok-bl-64-vae": (389_418_100, 458), "titok-bl-128-vae": (389_581_940, 458),
    "tatitok-bl-32-vq": (390_800_532, 462), "tatitok-bl-64-vq": (390_882_452, 462), "tatitok-bl-128-vq": (391_046_292, 462),
    "tatitok-bl-32-vae": (390_202_484, 461), "tatitok-bl-64-vae": (390_284_404, 461), "tatitok-sl-128-vae": (330_275_188, 413),
    "one-d-piece-s-256": (83_871_247, 308), "maskgit-vqgan": (54_515_587, 79 + 88 + 1),
    "flextok-d12-d12": (341_700_000, 90 + 124 + 248), "flextok-d18-d18": (949_700_000, 132 + 178 + 248),
    "flextok-d18-d28": (2_540_900_000, 132 + 268 + 248), "flextok-d18-d28-dfn": (2_540_900_000, 132 + 268 + 248),
    "instella-bae": (427_800_000, 328),
}  # fmt: skip
# some published shapes, one that tells each kind
SHAPES = {
    "titok-l-32": {"latent_tokens": (32, 1024), "decoder.ffn.2.weight": (1024, 2048, 1, 1), "quantize.embedding.weight": (4096, 12)},
    "titok-bl-64-vq8k": {"encoder.conv_out.weight": (64, 768, 1, 1), "decoder.ffn.0.weight": (768, 1024, 1, 1)},
    "titok-bl-64-vae": {"encoder.conv_out.weight": (32, 768, 1, 1), "decoder.decoder_embed.weight": (1024, 16)},
    "tatitok-bl-128-vq": {"decoder.text_guidance_proj.weight": (1024, 768), "decoder.text_guidance_positional_embedding": (77, 1024)},
    "one-d-piece-l-256": {"latent_tokens": (256, 1024), "decoder.transformer.23.attn.in_proj_weight": (3072, 1024)},
    "maskgit-vqgan": {"quantize.embedding.weight": (1024, 256), "decoder.up.4.upsample_conv.weight": (512, 512, 3, 3)},
    "flextok-d18-d28": {
        "decoder.module_dict.dec_transformer.blocks.27.adaLN_modulation.1.weight": (21504, 1792),
        "decoder.module_dict.dec_transformer.blocks.0.mlp.fc2.weight": (1792, 4778),
        "encoder.module_dict.enc_posemb_module.posembs": (1, 1152, 16, 16),
    },
    "instella-bae": {"decoder.up_layers.0.conv.weight": (4096, 1024, 3, 3), "quantizer.embed": (64, 768)},
}


def published_shapes(preset: Preset) -> tuple[Tokenizer1D, dict[str, tuple[int, ...]]]:
    """The model on the meta device, and the shapes of the tensors its file holds."""
    config = config_of(preset)
    with torch.device("meta"):
        model = Tokenizer1D.from_config(config)
    state, shapes = model.state_dict(), {}
    for key, place in layout_named(preset.layout).places(config).items():
        ours = tuple(state[place.name].shape)
        shapes[key] = place.shape or (ours if place.rows is None else (place.rows[1] - place.rows[0], *ours[1:]))
    return model, shapes


@pytest.mark.parametrize("preset", ROWS, ids=lambda p: p.name)
def test_rows_agree_with_the_published_figures(preset):
    model, shapes = published_shapes(preset)
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    assert sum(sizes.values()) == preset.parameters == sum(v.numel() for v in model.state_dict().values())
    assert len(shapes) == preset.tensors
    if preset.name in TOTALS:
        total, tensors = TOTALS[preset.name]
        assert tensors == preset.tensors and rounded_alike(preset.parameters, total)
    for part, wanted in SIDES.get(preset.name, {}).items():
        assert rounded_alike(sum(n for key, n in sizes.items() if key.startswith(f"{part}.")), wanted), part
    for key, shape in SHAPES.get(preset.name, {}).items():
        assert shapes[key] == shape, key


def rounded_alike(found: int, printed: int) -> bool:
    """Whether a number printed with zeros at its end is this one rounded."""
    zeros = len(str(printed)) - len(str(printed).rstrip("0"))
    return found == printed or (zeros >= 3 and abs(found - printed) <= 10**zeros / 2)


@pytest.mark.parametrize("preset", ROWS, ids=lambda p: p.name)
def test_rows_describe_the_model_that_their_file_makes(preset):
    """What the table says, what the row's configuration builds, and what is inferred from the file's shapes are one."""
    model, shapes = published_shapes(preset)
    assert (model.max_tokens, model.bits_per_token, model.is_nested) == (preset.tokens, preset.bits_per_token, preset.nested)
    assert model.image_size == preset.image_size and model.is_discrete != preset.continuous and model.name == preset.name
    assert recognise(shapes).name == preset.layout
    told = {"scaling_factor": 1.0, "max_timestep": 1.0} if preset.layout == "flextok" else {}  # by its config.json
    inferred, wanted = layout_named(preset.layout).config(shapes, told, preset.name), config_of(preset)
    for key in told:
        assert inferred["decoder"][key] == 1.0
        for part in (*inferred.values(), *wanted.values()):
            if isinstance(part, dict):
                part.pop(key, None)
    assert inferred == wanted


def test_the_table_is_consistent():
    assert len({p.name for p in PRESETS}) == len(PRESETS) == 25
    assert {p.layout for p in ROWS} == set(NAMES)
    places = [where for p in PRESETS for where in (p.where, *p.also) if where != "package"]
    assert len(places) == len(set(places)) and all(where.startswith("hub:") and where.count("/") in (1, 2) for where in places)
    for p in PRESETS:
        assert p.research_only == (p.licence in ("apple-amlr", "RAIL-MS")) and p.bits_per_image == p.tokens * p.bits_per_token
        assert p.paper.startswith("https://arxiv.org/abs/") == p.code.startswith("https://github.com/") == (p.layout != "tok1d")
        assert all(0 < score < 10 for score in p.printed.values())
    with pytest.raises(ModelError, match="default is a model of tok1d"):
        config_of(PRESETS[0])
    assert bits_for_vocab(64_000) == 16 and next(p for p in PRESETS if p.name == "flextok-d18-d28").bits_per_image == 4096


def test_names_of_sizes_are_the_published_ones():
    for name, sides in (("titok-l-32", "large large"), ("titok-s-128", "small small"), ("titok-bl-64-vae", "base large")):
        with torch.device("meta"):
            model = Tokenizer1D.from_config(config_of(next(p for p in PRESETS if p.name == name)))
        vq_model = published_config(model, next(p.layout for p in PRESETS if p.name == name))["model"]["vq_model"]
        assert f"{vq_model['vit_enc_model_size']} {vq_model['vit_dec_model_size']}" == sides
