"""Golden files as they would be published: a folder or file with the recorded weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.golden.read import Golden, read

# case → its layout, and what a file without configuration needs to be told
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "titok_vq": ("titok", {}),
    "titok_vae": ("titok", {}),
    "titok_legacy_vq": ("titok-legacy", {}),
    "titok_legacy_stage1": ("titok-legacy", {}),
    "one_d_piece": ("titok-legacy", {}),
    "tatitok_vq": ("tatitok", {}),
    "maskgit_vqgan": ("maskgit-vqgan", {"crop_size": 64}),
    "flextok": ("flextok", {"scaling_factor": 0.6, "max_timestep": 1.0}),
}


def publish(case: str, folder: Path, name: str = "model.safetensors", config: dict[str, Any] | None = None) -> Golden:
    """Write the weights of a golden case under ``folder``/``name``, float16 as recorded, and config.json if given."""
    golden = read(case)
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(golden.state, folder / name)
    else:
        torch.save(golden.state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return golden


def tree(golden: Golden) -> dict[str, Any]:
    """The configuration of a golden TiTok as its authors write config.json: nested, with references."""
    vq_model = dict(golden.meta["config"]["vq_model"])
    return {
        "experiment": {"project": "test", "name": "${experiment.project}_${model.vq_model.num_latent_tokens}"},
        "model": {"vq_model": vq_model, "generator": {"image_seq_len": "${model.vq_model.num_latent_tokens}"}},
        "dataset": {"preprocessing": {"crop_size": golden.meta["config"]["crop_size"]}},
    }
