"""The recipes of published models as data; scripts/write_recipes.py makes the pages of configs/tokenizer/ of them.

Architectures come from ``tok1d.presets``; what training needs beyond them stands here. Figures are those of papers, READMEs and
published configurations. Where nothing was published the value is ours, and the header of the page says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tok1d.presets import PRESETS, Preset
from tok1d.tokenizers.official import config_of
from tok1d.tokenizers.official.titok_configs import legacy_config

ROWS = {preset.name: preset for preset in PRESETS}
IMAGENET = "ImageNet-1k train (1,281,167 images), random square of the shorter side, mirrored"
DATACOMP = "DataComp-1B filtered by the authors to 685.8 M images with captions, random square of the shorter side, mirrored"
RFID = "the authors' README, 50,000 images of ImageNet validation; not reproduced by us"


@dataclass(frozen=True)
class Recipe:
    """One page.

    Attributes:
        name: of the file, without its suffix.
        title: first line of the page.
        reproduces: model, paper, what of its training is known.
        task: class of ``tok1d.training.tasks``.
        parts: ``Tokenizer1D.from_config`` data.
        steps, batch: optimizer steps, and images of all GPUs in one.
        settings: arguments of the task after tokenizer, adversary and losses.
        sources: arguments before the tokenizer: where weights come from.
        adversary: arguments of the adversary.
        losses: further losses by log name.
        gpus, accumulate: how the batch is shared out.
        data, cost, expected: lines of the header.
        notes: further lines, label → text.
        streamed: whether the data comes in shards too large to index.
        trained: False for a calibration.
    """

    name: str
    title: str
    reproduces: str
    task: str
    parts: dict[str, Any]
    steps: int
    batch: int
    settings: dict[str, Any]
    sources: dict[str, Any] = field(default_factory=dict)
    adversary: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    gpus: int = 8
    accumulate: int = 1
    data: str = IMAGENET
    cost: str = "not known"
    expected: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    streamed: bool = False
    trained: bool = True

    @property
    def per_gpu(self) -> int:
        return self.batch // (self.gpus * self.accumulate)

    @property
    def place(self) -> str:
        return "SHARDS/train-{0000..9999}.tar" if self.streamed else "TRAIN/"

    @property
    def default_place(self) -> str:
        return "data/train/{0000..9999}.tar" if self.streamed else "data/train"


def of(path: str, **arguments: Any) -> dict[str, Any]:
    """``class_path`` and ``init_args`` of a class under ``tok1d.training.losses``."""
    return {"class_path": f"tok1d.training.losses.{path}", **({"init_args": arguments} if arguments else {})}


def adversary(start: int, discriminator: dict[str, Any] | None = None, loss: str = "hinge", **more: Any) -> dict[str, Any]:
    return {"discriminator": discriminator or of("discriminators.TiTokDiscriminator"), "loss": loss, "start": start, "lecam": 0.001, **more}


def changed(parts: dict[str, Any], **slots: dict[str, Any]) -> dict[str, Any]:
    """Parts with other arguments in some slots."""
    return parts | {slot: parts[slot] | arguments for slot, arguments in slots.items()}


CONVNEXT = {"convnext": of("features.ClassifierLoss", model="convnext_small.fb_in1k", size=224)}
NOTE_CONVNEXT = "torchvision's ConvNeXt-Small in the feature loss (losses.convnext.init_args.weights: its file); timm's is taken unless given"


# two stages: TiTok and One-D-Piece ------------------------------------------------------------------------------------


def two_stages(preset: Preset, gpus: tuple[int, int], accumulate: tuple[int, int], batch: tuple[int, int], cost: str, paper: str) -> list[Recipe]:
    slug, family = preset.name.replace("-", "_"), "One-D-Piece" if preset.nested else "TiTok"
    first, second = f"{slug}_stage1", f"{slug}_stage2"
    drop = ", one length a batch uniform in 1..256" if preset.nested else ""
    shared = {"lr": 1e-4, "final_lr": 0.1, "weight_decay": 1e-4}
    cache = "the teacher runs once, over ten views of an image, with: tok tokenize TRAIN/ -m maskgit-vqgan -o runs/codes/train --views 10 --area 1 1, then here --config data/cached_codes"
    return [
        Recipe(
            name=first, title=f"{preset.name}, stage 1 of 2: name the codes that a frozen MaskGIT-VQGAN gives every patch{drop}.",
            reproduces=f"{family} ({paper}), stage 1 as published, but bfloat16 in place of float16" if not preset.nested else f"{family} ({paper}), stage 1 as published",
            task="ProxyCodeTask", parts=legacy_config(preset.name, pixels=False, **preset.sizes), steps=1_000_000, batch=batch[0],
            gpus=gpus[0], accumulate=accumulate[0], cost=cost, sources={"teacher": "maskgit-vqgan"},
            settings={"weights": {"cross_entropy": 1.0, "commitment": 0.25, "codebook": 1.0}, "warmup_steps": 10_000, "betas": [0.9, 0.99], **shared},
            expected="cross entropy from 6.93 to about 3.0 (a user's run of TiTok-S-128)",
            notes={"Cached": cache},
        ),
        Recipe(
            name=second, title=f"{preset.name}, stage 2 of 2: fine-tune the decoder on pixels, encoder and codes fixed{drop}.",
            reproduces=f"{family} ({paper}), stage 2 as published{'' if preset.nested else ', but bfloat16 in place of float16'}",
            task="DecoderTask", parts=config_of(preset), steps=500_000, batch=batch[1], gpus=gpus[1], accumulate=accumulate[1], cost=cost,
            sources={"init_from": f"runs/{first}/model", "teacher": "maskgit-vqgan"}, adversary=adversary(20_000, warmup_steps=5000),
            losses=CONVNEXT, settings={"weights": {"l2": 1.0, "convnext": 0.1, "gan": 0.01}, "warmup_steps": 5000, "betas": [0.9, 0.999], **shared},
            expected=f"rFID {preset.printed['rFID']} ({RFID})",
            notes={"Theirs": NOTE_CONVNEXT, "Before": f"stage 1, and: tok export runs/{first} runs/{first}/model"},
        ),
    ]  # fmt: skip


TITOK, ONE_D_PIECE = "arXiv 2406.07550", "arXiv 2501.10064"
TWO_STAGES = [
    *two_stages(ROWS["titok-l-32"], (8, 8), (1, 1), (256, 256), "64 A100-40G, 74 hours", TITOK),
    *two_stages(ROWS["titok-b-64"], (8, 8), (1, 1), (256, 256), "32 A100-40G, 41 hours", TITOK),
    *two_stages(ROWS["titok-s-128"], (8, 8), (1, 1), (256, 256), "not known", TITOK),
    *two_stages(ROWS["one-d-piece-s-256"], (8, 8), (1, 1), (1024, 512), "8 H100, time not known", ONE_D_PIECE),
    *two_stages(ROWS["one-d-piece-b-256"], (8, 8), (1, 1), (1024, 512), "8 H100, time not known", ONE_D_PIECE),
    *two_stages(ROWS["one-d-piece-l-256"], (8, 8), (4, 2), (1024, 512), "8 H100, time not known", ONE_D_PIECE),
]


# one stage: TiTok and TA-TiTok ----------------------------------------------------------------------------------------


def one_stage(preset: Preset) -> Recipe:
    text, vq = preset.layout == "tatitok", not preset.continuous
    own = {"commitment": 0.25, "codebook": 1.0} if vq else {"kl": 1e-6}
    parts = config_of(preset)
    parts = changed(parts, quantizer={"clustering": True}) if text and vq else parts
    known = "as published, but bfloat16 in place of float16" if text else "whose recipe is not published: TA-TiTok's, with the known 1M steps of 256 images"
    return Recipe(
        name=preset.name.replace("-", "_"),
        title=f"{preset.name}, one stage: pixels, LPIPS, classifier logits and an adversary" + (", told the caption." if text else "."),
        reproduces=f"TA-TiTok (arXiv 2501.07730), {known}" if text else f"one-stage TiTok ({TITOK}), {known}",
        task="TextTask" if text else "AdversarialTask", parts=parts, steps=650_000 if text else 1_000_000, batch=1024 if text else 256,
        gpus=32 if text else 8, data=DATACOMP if text else IMAGENET, streamed=text,
        adversary=adversary(200_000, warmup_steps=10_000), losses=CONVNEXT,
        settings={
            "weights": {"l2": 1.0, "lpips_vgg": 1.0, "convnext": 0.1, "gan": 0.1, **own},
            "lr": 1e-4, "warmup_steps": 10_000, "final_lr": 0.1, "betas": [0.9, 0.999], "weight_decay": 1e-4,
        },
        expected=f"rFID {preset.printed['rFID']} ({RFID})",
        notes={"Theirs": NOTE_CONVNEXT},
    )  # fmt: skip


ONE_STAGE = [one_stage(p) for p in PRESETS if p.layout in ("titok", "tatitok")]


# rectified flow: FlexTok ----------------------------------------------------------------------------------------------


def flextok(preset: Preset) -> Recipe:
    parts = changed(config_of(preset), decoder={"noise": "mode"})
    dfn, depths = preset.name.endswith("-dfn"), preset.sizes
    wide = depths["decoder_depth"] > 18
    score = preset.printed.get("rFID of 32 tokens")
    return Recipe(
        name=preset.name.replace("-", "_"),
        title=f"{preset.name}: registers read an image in order, a rectified flow in a frozen VAE's latents paints any prefix of them.",
        reproduces="FlexTok (arXiv 2502.13967): rectified flow and alignment to DINOv2-L, both of weight 1, tokens dropped to powers of two",
        task="FlowTask", parts=parts, steps=500_000, batch=2048, gpus=32 if wide else 16, accumulate=2,
        data="DFN-2B (a subset), random square of the shorter side, mirrored" if dfn else IMAGENET, streamed=dfn,
        sources={"vae": "EPFL-VILAB/flextok_vae_c16"},
        losses={"alignment": of("alignment.FeatureAlignment", width=parts["decoder"]["width"], model="vit_large_patch14_dinov2.lvd142m", block="decoder.net.blocks.1")},
        settings={
            "weights": {"flow": 1.0, "alignment": 1.0}, "lr": 3e-4, "warmup_steps": 5000, "final_lr": 0.1, "betas": [0.9, 0.99],
            "weight_decay": 0.01, "val_tokens": [1, 8, 32, 256], "val_steps": 10,
        },
        expected=f"rFID {score} with 32 tokens (the authors' model card, ImageNet; not reproduced by us)" if score else "no score was published",
        notes={
            "Ours": "steps, learning rate and decay: theirs use muP, and their training code was not released. Times are drawn as in a configuration that "
            "others derived (mode_scale 0.25)",
            "VAE": "its weights are for research only (apple-amlr). scaling_factor must be that of its config.json; another one is refused with the number to set",
            "Cached": "the VAE runs once with: tok tokenize TRAIN/ -m MODEL -o runs/latents/train --what vae --views 10 --area 1 1, MODEL an export of a short run of this page, then here --config data/cached_latents",
        },
    )  # fmt: skip


FLOW = [flextok(p) for p in PRESETS if p.layout == "flextok"]


# bits, the teacher, calibration ---------------------------------------------------------------------------------------

VQGAN = config_of(ROWS["maskgit-vqgan"])
WETOK = {
    "image_size": [256, 256],
    "encoder": {k: v for k, v in VQGAN["encoder"].items() if k != "shortcut"} | {"dim": 32, "depth": 4},
    "quantizer": {"class": "tok1d.tokenizers.quantizers.grouped_lfq.GroupedLFQ", "groups": 4, "group_bits": 8},
    "decoder": {k: v for k, v in VQGAN["decoder"].items() if k != "shortcut"} | {"dim": 32, "depth": 4},
    "lengths": {"class": "tok1d.tokenizers.lengths.FixedLength"},
}
GENERATIVE = {
    "class": "tok1d.tokenizers.decoders.generative.GenerativeDecoder", "tokens": 256, "dim": 32, "width": 512, "depth": 8, "image_size": [256, 256],
}  # fmt: skip
PATCHES = of("discriminators.PatchDiscriminator")
WEIGHTS = {"l1": 1.0, "lpips_vgg": 1.0, "gan": 0.1}
ADAM = {"lr": 1e-4, "warmup_steps": 5000, "final_lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 1e-4}
CONTINUOUS = config_of(ROWS["titok-bl-128-vae"])
OTHERS = [
    Recipe(
        name="instella_bae", title="instella-bae: 128 tokens of 64 bits, coin flips in training whose temperature falls.",
        reproduces="the tokenizer of Instella-T2I (arXiv 2506.21022): smooth L1, perceptual and adversarial losses, annealed temperature",
        task="BinaryTask", parts=config_of(ROWS["instella-bae"]), steps=500_000, batch=256, gpus=16, adversary=adversary(50_000, warmup_steps=5000),
        data="LAION-COCO, 100 M images, random square of the shorter side, mirrored", streamed=True, cost="under 200 MI300X GPU-days with the generator",
        settings={
            "weights": {"smooth_l1": 1.0, "lpips_vgg": 1.0, "gan": 0.1, "bit_variance": 0.1},
            "temperature_start": 1.0, "temperature_end": 0.1, "temperature_steps": 250_000, **ADAM,
        },
        expected="no score of reconstruction was published",
        notes={"Ours": "every number: neither weights, schedule, steps nor batch were released. Their second stage of many sizes up to 1024 pixels and their "
               "alignment of the decoder are left out"},
    ),
    Recipe(
        name="wetok_f16_32", title="WeTok type, 256 positions of 32 bits: convolutions around grouped lookup-free quantization.",
        reproduces="losses and their weights of WeTok (arXiv 2508.05599): L1, LPIPS, 0.1 non-saturating adversary, 0.1 entropy, 0.25 commitment",
        task="AdversarialTask", parts=WETOK, steps=500_000, batch=256, adversary=adversary(0, PATCHES, "non_saturating"),
        settings={"weights": {**WEIGHTS, "entropy": 0.1, "commitment": 0.25}, **ADAM},
        expected="none claimed: the parts are ours, not their checkpoints'",
        notes={"Ours": "the convolutions (those of MaskGIT-VQGAN, four blocks a level), steps, batch and schedule; entropies are taken of each group"},
    ),
    Recipe(
        name="wetok_generative", title="WeTok type, second stage: a decoder fed with noise on the fixed codes of wetok_f16_32.",
        reproduces="the generative decoder of WeTok (arXiv 2508.05599): adversarial training goes on with encoder and codes fixed",
        task="DecoderTask", parts=WETOK | {"decoder": GENERATIVE}, steps=250_000, batch=256, sources={"init_from": "runs/wetok_f16_32/model"},
        adversary=adversary(0, PATCHES, "non_saturating"), settings={"weights": WEIGHTS, **ADAM},
        expected="none claimed: the parts are ours, not their checkpoints'",
        notes={"Ours": "a mask grid reads the codes before the convolutions, so that the decoder starts untrained; steps, batch and schedule",
               "Before": "the first stage, and: tok export runs/wetok_f16_32 runs/wetok_f16_32/model"},
    ),
    Recipe(
        name="maskgit_vqgan", title="maskgit-vqgan: the convolutional tokenizer whose codes are the proxies of two-stage TiTok.",
        reproduces="the architecture of MaskGIT's VQGAN (arXiv 2202.04200) in its published PyTorch form, to be a teacher on data of your own",
        task="AdversarialTask", parts=VQGAN, steps=500_000, batch=256, adversary=adversary(20_000, PATCHES), expected=f"none claimed; the published weights have rFID 2.28 ({RFID})",
        settings={"weights": {**WEIGHTS, "commitment": 0.25, "codebook": 1.0}, **ADAM},
        notes={"Ours": "losses, steps and schedule: the training of the published weights is not documented"},
    ),
    Recipe(
        name="tokenbridge_titok_bl_128", title="Bits without training: 16 channels × 6 bits measured between encoder and decoder of titok-bl-128-vae.",
        reproduces="TokenBridge's idea (arXiv 2503.20430) on a 1D tokenizer; theirs is the KL-16 VAE of MAR with one table for all channels",
        task="CalibrationTask", trained=False, steps=100, batch=64, gpus=1, cost="minutes",
        parts=CONTINUOUS | {"quantizer": {
            "class": "tok1d.tokenizers.quantizers.post_training.PerChannel", "channels": 16, "bits": 6, "calibration": "gaussian", "posterior": True,
        }},
        sources={"init_from": "titok-bl-128-vae"}, settings={"most_latents": 1_000_000},
        expected="val/psnr_128 near val/psnr_continuous; the continuous model has rFID 0.84 (the authors' README)",
        notes={"Theirs": "calibration: tokenbridge is their table, for latents of unit variance"},
    ),
]  # fmt: skip

RECIPES = [*TWO_STAGES, *ONE_STAGE, *FLOW, *OTHERS]
