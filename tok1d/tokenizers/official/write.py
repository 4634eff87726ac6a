"""Write a tokenizer as its family publishes it: model.safetensors and, where readers need one, config.json.

The TiTok family's config.json is the tree that its code reads (``model.vq_model``, ``dataset.preprocessing``). FlexTok's
trees name Python classes of its own code, which we do not write: its file holds the values that weights do not show, for us
to read back. Instella's reader takes no configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tok1d.disk import atomic_write
from tok1d.tokenizers.official import layout_named
from tok1d.tokenizers.official.layout import export_state
from tok1d.tokenizers.tokenizer import Tokenizer1D

# (width, depth) of the published code's names; other sizes get "width_depth", which it does not know
SIDES = {(512, 8): "small", (768, 12): "base", (1024, 24): "large"}
FLOW = ("max_timestep", "null_prob", "noise", "mode_scale", "stratified", "scaling_factor", "guidance")


def write_published(tokenizer: Tokenizer1D, layout: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the files, each atomically.

    Args:
        tokenizer: one whose parts the layout has places for.
        layout: ``titok``, ``titok-legacy``, ``tatitok``, ``maskgit-vqgan``, ``flextok`` or ``instella``.
        folder: made if missing.
        dtype: of the stored weights.

    Raises:
        ModelError: no such layout, or a tokenizer that does not fit it.
    """
    from safetensors.torch import save

    state = export_state(layout_named(layout), tokenizer)
    blob = save({k: v.cpu().to(dtype) if v.is_floating_point() else v.cpu() for k, v in state.items()}, metadata={"format": "pt"})
    config = published_config(tokenizer, layout)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "model.safetensors", blob)
    if config:
        atomic_write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def published_config(tokenizer: Tokenizer1D, layout: str) -> dict[str, Any]:
    """What config.json holds, {} if the family has none."""
    config = tokenizer.to_config()
    encoder, quantizer, decoder = config["encoder"], config["quantizer"], config["decoder"]
    crop = {"preprocessing": {"crop_size": tokenizer.image_size[0]}}
    if layout == "instella":
        return {}
    if layout == "maskgit-vqgan":
        return {"experiment": {}, "model": {}, "dataset": crop}
    if layout == "flextok":
        return {
            **{key: decoder[key] for key in FLOW},
            "levels": quantizer["levels"],
            "lengths": config["lengths"].get("distribution", "uniform"),
            "posterior": encoder["posterior"],
        }
    discrete = "vocab_size" in quantizer
    vq_model = {
        "quantize_mode": "vq" if discrete else "vae",
        "codebook_size": quantizer.get("vocab_size", 4096),
        "token_size": decoder["dim"],
        "use_l2_norm": bool(quantizer.get("l2", False)),
        "commitment_cost": tokenizer.quantizer.loss_weights.get("commitment", 0.25),
        "vit_enc_model_size": _side(encoder),
        "vit_dec_model_size": _side(decoder),
        "vit_enc_patch_size": encoder["patch_size"],
        "vit_dec_patch_size": decoder["patch_size"],
        "num_latent_tokens": encoder["tokens"],
        "is_legacy": layout == "titok-legacy",
        "finetune_decoder": layout == "titok-legacy" and decoder["pixels"],
    }
    if tokenizer.is_nested:
        vq_model["strict_length_assertion"] = False
    if layout == "tatitok":
        vq_model |= {"text_context_length": decoder["text_tokens"], "text_embed_dim": decoder["text_dim"], "clustering_vq": False}
    return {"experiment": {"project": tokenizer.name}, "model": {"vq_model": vq_model}, "dataset": crop}


def _side(part: dict[str, Any]) -> str:
    size = (part["width"], part["depth"])
    return SIDES.get(size, f"{size[0]}_{size[1]}")
