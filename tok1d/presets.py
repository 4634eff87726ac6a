"""The table of models that can be loaded by name, as plain data; nothing else in the package knows their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Placed:
    """What a row of a table says by where its weights are; rows are found by :func:`tok1d.hub.find`.

    Attributes:
        name: what it is called.
        where: ``package``, ``hub:owner/name``, or ``hub:owner/name:file``.
        also: other places with the same weights.
        licence, research_only, revision, sha256: as :class:`Preset`.
    """

    name: str
    where: str
    also: tuple[str, ...]
    licence: str
    research_only: bool
    revision: str | None
    sha256: str | None

    @property
    def hub_id(self) -> str:
        """``owner/name`` or ``owner/name:file``; empty for shipped models."""
        return self.where.removeprefix("hub:") if self.where.startswith("hub:") else ""

    @property
    def repository(self) -> str:
        return self.hub_id.partition(":")[0]

    @property
    def url(self) -> str:
        """Page of the weights with their licence; empty for shipped models."""
        return f"https://huggingface.co/{self.repository}" if self.repository else ""


@dataclass(frozen=True)
class Preset(Placed):
    """One model.

    Attributes:
        name: what ``tok1d.load`` and ``--model`` take.
        where: ``package`` (its weights ship inside tok1d), ``hub:owner/name``, or ``hub:owner/name:file``.
        tokens: how many it makes; nested models make any number up to that.
        bits_per_token: ceil(log2(vocabulary)); 0 for continuous latents.
        nested: whether any prefix decodes.
        image_size: (height, width) in pixels.
        licence: of the weights.
        parameters: numbers in the published tensors, buffers that only training uses left out.
        description: one line.
        layout: family of published weights (``tok1d.tokenizers.official``); ``tok1d`` for our own.
        sizes: arguments of the family's configuration builder.
        tensors: in the published file, without those that may be missing; 0 for our own.
        research_only: whether the licence must be accepted before the weights are fetched.
        continuous: latents instead of tokens.
        also: other places with the same weights.
        options: entries that the published configuration lacks.
        revision: of the hub repository, None for its newest.
        sha256: of the weights file, hexadecimal; None where nobody has recorded it.
        printed: scores that the authors print (not measured by us; ImageNet validation, 256 × 256), by name.
        paper, code: addresses.
    """

    name: str
    where: str
    tokens: int
    bits_per_token: int
    nested: bool
    image_size: tuple[int, int]
    licence: str
    parameters: int
    description: str
    layout: str = "tok1d"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    tensors: int = 0
    research_only: bool = False
    continuous: bool = False
    also: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    sha256: str | None = None
    printed: Mapping[str, float] = field(default_factory=dict)
    paper: str = ""
    code: str = ""

    @property
    def bits_per_image(self) -> int:
        return self.tokens * self.bits_per_token


DEFAULT = Preset(
    name="default",
    where="package",
    tokens=256,
    bits_per_token=12,
    nested=True,
    image_size=(256, 256),
    licence="Apache-2.0",
    parameters=8_053_496,
    description="photos, any number of tokens from 1 to 256",
)

# (width, depth) of the transformers that the TiTok family calls small, base and large
S, B, L = (512, 8), (768, 12), (1024, 24)
TITOK: dict[str, Any] = {"paper": "https://arxiv.org/abs/2406.07550", "code": "https://github.com/bytedance/1d-tokenizer"}
TATITOK: dict[str, Any] = {"paper": "https://arxiv.org/abs/2501.07730", "code": "https://github.com/bytedance/1d-tokenizer"}
ONE_D_PIECE: dict[str, Any] = {"paper": "https://arxiv.org/abs/2501.10064", "code": "https://github.com/turingmotors/One-D-Piece"}
MASKGIT: dict[str, Any] = {"paper": "https://arxiv.org/abs/2202.04200", "code": "https://github.com/bytedance/1d-tokenizer"}
FLEXTOK: dict[str, Any] = {"paper": "https://arxiv.org/abs/2502.13967", "code": "https://github.com/apple/ml-flextok"}
INSTELLA: dict[str, Any] = {"paper": "https://arxiv.org/abs/2506.21022", "code": "https://github.com/AMD-AGI/Instella-T2I"}


def _row(
    name: str,
    hub: str,
    layout: str,
    tokens: int,
    bits_per_token: int,
    parameters: int,
    tensors: int,
    description: str,
    *,
    size: int = 256,
    licence: str = "Apache-2.0",
    nested: bool = False,
    **rest: Any,
) -> Preset:
    return Preset(
        name, f"hub:{hub}", tokens, bits_per_token, nested, (size, size), licence, parameters, description, layout,
        tensors=tensors, continuous=bits_per_token == 0, research_only=licence != "Apache-2.0", **rest,
    )  # fmt: skip


def _titok(short: str, sides: tuple[Any, Any], tokens: int, parameters: int, tensors: int, rfid: float) -> Preset:
    """Two stages, 4096 codes, pixel decoder of MaskGIT-VQGAN; also published as a loose file."""
    letter = {S: "s", B: "b", L: "l"}[sides[0]]
    return _row(
        f"titok-{letter}-{tokens}", f"yucornetto/tokenizer_titok_{short}_imagenet", "titok-legacy", tokens, 12, parameters,
        tensors, f"TiTok-{letter.upper()}-{tokens}, two stages, ImageNet", printed={"rFID": rfid}, **TITOK,
        sizes={"encoder": sides[0], "decoder": sides[1], "tokens": tokens},
        also=(f"hub:fun-research/TiTok:tokenizer_titok_{short}.bin",),
    )  # fmt: skip


def _one_stage(
    name: str, hub: str, layout: str, sides: tuple[Any, Any], tokens: int, vocab_size: int, parameters: int, tensors: int,
    rfid: float, description: str, links: dict[str, Any],
) -> Preset:  # fmt: skip
    """One-stage TiTok or TA-TiTok: 8192 codes of width 64, or (vocab_size 0) latents of width 16."""
    sizes = {"encoder": sides[0], "decoder": sides[1], "tokens": tokens, "vocab_size": vocab_size, "dim": 64 if vocab_size else 16}
    kind = "8192 codes" if vocab_size else "continuous, 16 channels"
    return _row(
        name, hub, layout, tokens, 13 if vocab_size else 0, parameters, tensors, f"{description}, {kind}", sizes=sizes,
        printed={"rFID": rfid}, **links,
    )  # fmt: skip


def _one_d_piece(letter: str, side: tuple[int, int], parameters: int, tensors: int, rfid: float) -> Preset:
    """Published without config.json."""
    return _row(
        f"one-d-piece-{letter.lower()}-256", f"turing-motors/One-D-Piece-{letter}-256", "titok-legacy", 256, 12, parameters,
        tensors, f"One-D-Piece-{letter}-256, ImageNet, any number of tokens from 1 to 256", nested=True,
        sizes={"encoder": side, "decoder": side, "tokens": 256, "nested": True}, printed={"rFID": rfid}, **ONE_D_PIECE,
    )  # fmt: skip


def _flextok(short: str, depths: tuple[int, int], data: str, parameters: int, tensors: int, rfid: float | None) -> Preset:
    name = f"flextok-d{depths[0]}-d{depths[1]}" + ("-dfn" if data == "DFN" else "")
    return _row(
        name, f"EPFL-VILAB/flextok_{short}", "flextok", 256, 16, parameters, tensors,
        f"FlexTok d{depths[0]}-d{depths[1]}, {data}, any number of tokens from 1 to 256, flow decoder", nested=True,
        licence="apple-amlr", sizes={"encoder_depth": depths[0], "decoder_depth": depths[1]},
        printed={} if rfid is None else {"rFID of 32 tokens": rfid}, **FLEXTOK,
    )  # fmt: skip


YU, TA = "yucornetto/tokenizer_titok_", "turkeyju/tokenizer_tatitok_"
PRESETS: tuple[Preset, ...] = (
    DEFAULT,
    _titok("l32", (L, L), 32, 641_054_735, 692, 2.21),
    _titok("b64", (B, B), 64, 204_814_095, 404, 1.70),
    _titok("s128", (S, S), 128, 83_674_639, 308, 1.71),
    _one_stage("titok-bl-64-vq8k", f"{YU}bl64_vq8k_imagenet", "titok", (B, L), 64, 8192, 390_016_148, 459, 2.06, "TiTok-BL-64, ImageNet", TITOK),
    _one_stage("titok-bl-128-vq8k", f"{YU}bl128_vq8k_imagenet", "titok", (B, L), 128, 8192, 390_179_988, 459, 1.49, "TiTok-BL-128, ImageNet", TITOK),
    _one_stage("titok-sl-256-vq8k", f"{YU}sl256_vq8k_imagenet", "titok", (S, L), 256, 8192, 330_260_884, 411, 1.03, "TiTok-SL-256, ImageNet", TITOK),
    _one_stage("titok-ll-32-vae", f"{YU}ll32_vae_c16_imagenet", "titok", (L, L), 32, 0, 606_879_604, 602, 1.61, "TiTok-LL-32, ImageNet", TITOK),
    _one_stage("titok-bl-64-vae", f"{YU}bl64_vae_c16_imagenet", "titok", (B, L), 64, 0, 389_418_100, 458, 1.25, "TiTok-BL-64, ImageNet", TITOK),
    _one_stage("titok-bl-128-vae", f"{YU}bl128_vae_c16_imagenet", "titok", (B, L), 128, 0, 389_581_940, 458, 0.84, "TiTok-BL-128, ImageNet", TITOK),
    _one_stage("tatitok-bl-32-vq", f"{TA}bl32_vq", "tatitok", (B, L), 32, 8192, 390_800_532, 462, 3.95, "TA-TiTok-BL-32, reads text", TATITOK),
    _one_stage("tatitok-bl-64-vq", f"{TA}bl64_vq", "tatitok", (B, L), 64, 8192, 390_882_452, 462, 2.43, "TA-TiTok-BL-64, reads text", TATITOK),
    _one_stage("tatitok-bl-128-vq", f"{TA}bl128_vq", "tatitok", (B, L), 128, 8192, 391_046_292, 462, 1.53, "TA-TiTok-BL-128, reads text", TATITOK),
    _one_stage("tatitok-bl-32-vae", f"{TA}bl32_vae", "tatitok", (B, L), 32, 0, 390_202_484, 461, 1.53, "TA-TiTok-BL-32, reads text", TATITOK),
    _one_stage("tatitok-bl-64-vae", f"{TA}bl64_vae", "tatitok", (B, L), 64, 0, 390_284_404, 461, 1.47, "TA-TiTok-BL-64, reads text", TATITOK),
    _one_stage("tatitok-sl-128-vae", f"{TA}sl128_vae", "tatitok", (S, L), 128, 0, 330_275_188, 413, 0.90, "TA-TiTok-SL-128, reads text", TATITOK),
    _one_d_piece("S", S, 83_871_247, 308, 1.48),
    _one_d_piece("B", B, 205_256_463, 404, 1.11),
    _one_d_piece("L", L, 641_742_863, 692, 1.08),
    _row(
        "maskgit-vqgan", "fun-research/TiTok:maskgit-vqgan-imagenet-f16-256.bin", "maskgit-vqgan", 256, 10, 54_515_587, 168,
        "MaskGIT-VQGAN, ImageNet: a grid of tokens; teacher of TiTok, tokenizer of RAR", printed={"rFID": 2.28}, **MASKGIT,
    ),
    _flextok("d12_d12_in1k", (12, 12), "ImageNet", 341_651_737, 462, 4.20),
    _flextok("d18_d18_in1k", (18, 18), "ImageNet", 949_734_553, 558, 1.61),
    _flextok("d18_d28_in1k", (18, 28), "ImageNet", 2_540_882_841, 648, 1.45),
    _flextok("d18_d28_dfn", (18, 28), "DFN", 2_540_882_841, 648, None),
    _row(
        "instella-bae", "amd/Instella-T2I:bae/model.safetensors", "instella", 128, 64, 427_754_560, 328,
        "Instella-T2I, 128 × 64 bits at any size up to 1024 × 1024", size=512, licence="RAIL-MS", **INSTELLA,
    ),
)  # fmt: skip
