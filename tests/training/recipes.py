"""Shrink a recipe: an overlay that makes its parts, teachers and networks tiny, consistently; everything else stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.tokenizers import mix
from tok1d.tokenizers.tokenizer import Tokenizer1D

ROOT = Path(__file__).parents[2] / "configs"
TOKENIZER = "tok1d.tokenizers.tokenizer.Tokenizer1D"
VAE = {"vae_channels": [32] * 4, "vae_layers": 1}  # 8 pixels of a side become one, as published
NESTED = mix.Mix("SpectralEncoder", "NestedVQ", "SpectralDecoder", "TailDrop uniform")
PIXELS = {"pixel_width": 8, "pixel_multipliers": [1] * 5, "pixel_depth": 1, "pixel_groups": 2}
TINY: dict[str, dict[str, Any]] = {
    **mix.ENCODERS,
    **mix.DECODERS,
    "LegacyTiTokEncoder": mix.VIT,
    "ProxyCodeDecoder": {**mix.VIT, **PIXELS},
    "InstellaEncoder": mix.ENCODERS["BinaryEncoder"],
    "InstellaDecoder": mix.DECODERS["BinaryDecoder"],
    "TextGridDecoder": {**mix.VIT, "text_tokens": 10, "text_dim": 16},
    "FlexTokEncoder": mix.FLOW,
    "RectifiedFlowDecoder": {**mix.FLOW, "depth": 2, "steps": 2},
}
DISCRIMINATORS = {"TiTokDiscriminator": {"width": 32, "stages": 2, "grid": 2}, "PatchDiscriminator": {"width": 8, "layers": 2}}


def read(name: str) -> dict[str, Any]:
    """``tokenizer/NAME`` → what its file says."""
    return yaml.safe_load((ROOT / f"{name}.yaml").read_text())


def names() -> list[str]:
    """Every recipe."""
    return sorted(path.stem for path in (ROOT / "tokenizer").glob("*.yaml"))


def parts_of(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe["model"]["init_args"]["tokenizer"]["init_args"]


def config(parts: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Tokenizer1D in a recipe → ``Tokenizer1D.from_config`` data."""
    slots = {slot: {"class": p["class_path"], **p.get("init_args", {})} for slot, p in parts.items() if isinstance(p, dict)}
    return {"_class_name": "Tokenizer1D", "name": "tiny", "image_size": parts.get("image_size", [256, 256]), **slots}


def shrunk_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """The same parts at tiny size; widths of codes, vocabularies and length rules are as published."""
    tiny: dict[str, Any] = {"image_size": [mix.IMAGE, mix.IMAGE]}
    for slot in ("encoder", "decoder"):
        path, given = parts[slot]["class_path"], parts[slot].get("init_args", {})
        small = dict(TINY[path.rpartition(".")[2]])
        if given.get("vae_channels"):
            small |= VAE
        tiny[slot] = {"class_path": path, "init_args": {**given, **small}}
    quantizer = {"class_path": parts["quantizer"]["class_path"], "init_args": dict(parts["quantizer"].get("init_args", {}))}
    if "tokens" in quantizer["init_args"]:
        quantizer["init_args"] |= {"tokens": mix.LATENTS, "vocab_size": 16, "books": 2}
    lengths = {"class_path": parts["lengths"]["class_path"], "init_args": parts["lengths"].get("init_args", {})}
    return {**tiny, "quantizer": quantizer, "lengths": lengths}


def build(parts: dict[str, Any], **slots: dict[str, Any]) -> Tokenizer1D:
    """The tokenizer of (shrunk) parts, with other configurations in some slots."""
    torch.manual_seed(0)
    return Tokenizer1D.from_config(config(parts) | slots)


def save_teachers(folder: Path) -> None:
    """Stand-ins for what recipes load from elsewhere, tiny and random: a VQGAN, a VAE, and a text tower."""
    sizes = {**mix.CONV, "dim": 256, "shortcut": "output"}
    vqgan = {
        "_class_name": "Tokenizer1D", "name": "vqgan", "image_size": [mix.IMAGE, mix.IMAGE],
        "encoder": {"class": "tok1d.tokenizers.encoders.vqgan.VQGANEncoder", **sizes},
        "quantizer": {"class": "tok1d.tokenizers.quantizers.vq.VQ", "vocab_size": 1024, "dim": 256},
        "decoder": {"class": "tok1d.tokenizers.decoders.vqgan.VQGANDecoder", **sizes},
        "lengths": {"class": "tok1d.tokenizers.lengths.FixedLength"},
    }  # fmt: skip
    Tokenizer1D.from_config(vqgan).save_pretrained(folder / "vqgan")


def save_vae(folder: Path) -> None:
    """An AutoencoderKL in diffusers' layout."""
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    AutoencoderKL(block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=16, scaling_factor=1.0, **kinds).save_pretrained(folder / "vae")


def save_clip(folder: Path) -> None:
    """A CLIP text tower of 10 places, and its pieces."""
    import transformers

    (folder / "clip").mkdir()
    pieces = ["!</w>", "a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "clip/vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "clip/merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(folder / "clip").save_pretrained(folder / "clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 10}
    tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=len(pieces), bos_token_id=5, eos_token_id=6, pad_token_id=6, **sizes))
    tower.save_pretrained(folder / "clip")


def save_network(folder: Path) -> None:
    """Weights of a tiny timm network for feature losses."""
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), folder / "network.safetensors")


def shrunk(name: str, teachers: Path, photos: Path) -> dict[str, Any]:
    """The overlay of a recipe.

    Args:
        name: of the recipe.
        teachers: folder of the stand-ins; where this recipe starts from is saved there.
        photos: folder of images with captions, or for streams the shard ``photos.tar`` beside it.
    """
    recipe = read(f"tokenizer/{name}")
    model = recipe["model"]["init_args"]
    if isinstance(model["tokenizer"], str):  # a finished model by its name, which has parts of its own
        Tokenizer1D.from_config(mix.config(NESTED)).save_pretrained(teachers / "start")
        parts, settings = {}, {"tokenizer": str(teachers / "start"), "val_tokens": None}
    else:
        parts = shrunk_parts(parts_of(recipe))
        settings = {"tokenizer": {"class_path": TOKENIZER, "init_args": parts}, "val_tokens": None}
    if "teacher" in model:
        settings["teacher"] = str(teachers / "vqgan")
    if "vae" in model:
        settings["vae"] = str(teachers / "vae")
    if recipe["model"]["class_path"].endswith("TextTask"):
        settings["text_model"] = str(teachers / "clip")
    if "init_from" in model:
        settings["init_from"] = start(recipe, parts, teachers) if "stage" in name or "Task" in recipe["model"]["class_path"] else None
    if model.get("window"):
        settings["window"] = 16
    if "adversary" in model:
        path = model["adversary"]["init_args"]["discriminator"]["class_path"]
        small = {"class_path": path, "init_args": DISCRIMINATORS[path.rpartition(".")[2]]}
        settings["adversary"] = {"class_path": model["adversary"]["class_path"], "init_args": {"discriminator": small, "start": 0}}
    network = {"model": "test_resnet", "weights": str(teachers / "network.safetensors"), "size": mix.IMAGE}
    losses = {loss: {"class_path": at["class_path"], "init_args": {**at["init_args"], **network}} for loss, at in model.get("losses", {}).items()}
    if "alignment" in losses:
        losses["alignment"]["init_args"] |= {"width": 32, "hidden": 16}
    if "lpips_vgg" in model.get("weights", {}):
        losses["lpips_vgg"] = {"class_path": "tok1d.training.losses.features.FeatureLoss", "init_args": network}
    if losses:
        settings["losses"] = losses
    data = recipe["data"]["class_path"]
    train = str(photos.parent / "photos.tar") if data.endswith("StreamData") else str(photos)
    few = {"train": [train], "val": [str(photos)], "size": mix.IMAGE, "batch_size": 2, "val_batch_size": 2, "val_images": 2, "workers": 0}
    return {
        "trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true"},
        "model": {"class_path": recipe["model"]["class_path"], "init_args": settings},
        "data": {"class_path": data, "init_args": few},
    }


def start(recipe: dict[str, Any], parts: dict[str, Any], teachers: Path) -> str | None:
    """Save what a shrunk recipe starts from and say where; None where it may start from nothing."""
    kind, folder = recipe["model"]["class_path"].rpartition(".")[2], teachers / "start"
    plain = config(parts)
    if kind == "DecoderTask" and "teacher" in recipe["model"]["init_args"]:
        build(parts, decoder={**plain["decoder"], "pixels": False}).save_pretrained(folder)
    elif kind == "DecoderTask":
        build(parts, decoder={"class": "tok1d.tokenizers.decoders.vqgan.VQGANDecoder", **mix.CONV, "dim": 32}).save_pretrained(folder)
    elif kind == "CalibrationTask":
        build(parts, quantizer={"class": "tok1d.tokenizers.quantizers.kl.KL", "dim": plain["encoder"]["dim"]}).save_pretrained(folder)
    else:
        return None
    return str(folder)
