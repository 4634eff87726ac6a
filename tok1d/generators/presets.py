"""The table of generators that load by name, as plain data: where they are, their sizes, and how their authors sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tok1d.errors import ModelError
from tok1d.presets import Placed


@dataclass(frozen=True)
class GeneratorPreset(Placed):
    """One generator.

    Attributes:
        name: what ``tok generate`` and :func:`tok1d.load_generator` take.
        where: ``package`` (its weights ship inside tok1d), ``hub:owner/name`` or ``hub:owner/name:file``.
        layout: family of published weights (:mod:`tok1d.generators.official`); ``tok1d`` for our own.
        tokenizer: whose tokens it makes, a name of :mod:`tok1d.presets`.
        tokens: of a row.
        vocab_size: number of ids.
        parameters: numbers in the published tensors.
        sizes: arguments of the family's configuration builder.
        sampling: what its authors sample with, options of ``generate``; used where a caller gives none.
        printed: scores that the authors print (not measured by us; ImageNet 256 × 256, 50,000 samples), by name.
        licence, research_only: of the weights.
        also: other places with the same weights.
        revision: of the hub repository, None for its newest.
        sha256: of the weights file, hexadecimal; None where nobody has recorded it.
        paper, code: addresses.
    """

    name: str
    where: str
    layout: str
    tokenizer: str
    tokens: int
    vocab_size: int
    parameters: int
    sizes: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    printed: Mapping[str, float] = field(default_factory=dict)
    licence: str = "Apache-2.0"
    research_only: bool = False
    also: tuple[str, ...] = ()
    revision: str | None = None
    sha256: str | None = None
    paper: str = ""
    code: str = ""


CODE = "https://github.com/bytedance/1d-tokenizer"


def _titok(
    size: str, tokenizer: str, layout: str, tokens: int, parameters: int, gfid: float, steps: int, temperature: float, guidance: float, schedule: str
) -> GeneratorPreset:  # fmt: skip
    return GeneratorPreset(
        f"{tokenizer}-maskgit", f"hub:yucornetto/generator_titok_{size}_imagenet", layout, tokenizer, tokens, 4096, parameters,
        sampling={"steps": steps, "temperature": temperature, "guidance": guidance, "schedule": schedule, "annealing": True},
        printed={"gFID": gfid}, also=(f"hub:fun-research/TiTok:generator_titok_{size}.bin",), paper="https://arxiv.org/abs/2406.07550", code=CODE,
    )  # fmt: skip


def _one_d_piece(size: str, gfid: float, temperature: float, guidance: float) -> GeneratorPreset:
    return GeneratorPreset(
        f"one-d-piece-{size.lower()}-256-maskgit", f"hub:turing-motors/MaskGIT_One-D-Piece-{size}-256", "maskgit-bert",
        f"one-d-piece-{size.lower()}-256", 256, 4096, 177_374_464, printed={"gFID": gfid},
        sampling={"steps": 16, "temperature": temperature, "guidance": guidance, "schedule": "power_cosine(3)"},
        paper="https://arxiv.org/abs/2501.10064", code="https://github.com/turingmotors/One-D-Piece",
    )  # fmt: skip


def _rar(
    size: str, width: int, depth: int, hidden: int, parameters: int, gfid: float, inception: float, temperature: float, guidance: float, power: float
) -> GeneratorPreset:  # fmt: skip
    return GeneratorPreset(
        f"rar-{size}", f"hub:yucornetto/RAR:rar_{size}.bin", "rar", "maskgit-vqgan", 256, 1024, parameters,
        sizes={"width": width, "depth": depth, "hidden": hidden}, printed={"gFID": gfid, "IS": inception},
        sampling={"temperature": temperature, "guidance": guidance, "schedule": f"power_cosine({power:g})"},
        paper="https://arxiv.org/abs/2411.00776", code=CODE,
    )  # fmt: skip


# Authors' linear schedules add w (c - u) to c: our guidance is their w + 1.
GENERATORS: tuple[GeneratorPreset, ...] = (
    GeneratorPreset(
        "default-flow", "package", "tok1d", "default", 64, 4096, 8_341_588,
        sampling={"steps": 25, "solver": "heun", "guidance": 2.5}, paper="https://arxiv.org/abs/2209.03003",
    ),
    _titok("l32", "titok-l-32", "maskgit-bert", 32, 177_202_432, 2.77, 8, 9.5, 5.5, "linear"),
    _titok("b64", "titok-b-64", "maskgit-bert", 64, 177_227_008, 2.48, 8, 11.0, 4.0, "linear"),
    _titok("s128", "titok-s-128", "maskgit-uvit", 128, 294_990_848, 1.97, 64, 2.8, 6.9, "power_cosine(3)"),
    _one_d_piece("S", 2.67, 3.0, 12.5),
    _one_d_piece("B", 2.70, 2.5, 8.5),
    _one_d_piece("L", 2.35, 3.0, 5.5),
    _rar("b", 768, 24, 3072, 260_923_648, 1.95, 290.5, 1.0, 16.0, 2.75),
    _rar("l", 1024, 24, 4096, 461_668_352, 1.70, 299.5, 1.02, 15.5, 2.5),
    _rar("xl", 1280, 32, 5120, 955_425_024, 1.50, 306.9, 1.02, 6.9, 1.5),
    _rar("xxl", 1408, 40, 6144, 1_498_520_704, 1.48, 326.0, 1.02, 8.0, 1.2),
)


def sampling_line(preset: GeneratorPreset) -> str:
    """What its authors sample with, in a line.

    Example:
        >>> sampling_line(generator_named("titok-l-32-maskgit"))
        '8 steps, temperature 9.5, guidance 5.5 linear, annealing'
    """
    options = dict(preset.sampling)
    steps, guidance, schedule = (options.pop(name, None) for name in ("steps", "guidance", "schedule"))
    parts = [f"{steps} steps"] if steps else []
    parts += [f"temperature {options.pop('temperature'):g}"] if "temperature" in options else []
    parts += [f"guidance {guidance:g}" + (f" {schedule}" if schedule else "")] if guidance else []
    return ", ".join(parts + [name if value is True else f"{name} {value}" for name, value in options.items()])


def generator_named(name: str) -> GeneratorPreset:
    """A row by its name.

    Raises:
        ModelError: there is none of that name.
    """
    found = next((preset for preset in GENERATORS if preset.name == name), None)
    if found is None:
        raise ModelError(f"no generator is called {name!r:.100}; there are {', '.join(preset.name for preset in GENERATORS)}")
    return found


def config_of(preset: GeneratorPreset) -> dict[str, Any]:
    """``Generator.from_config`` data of a published generator from its row alone, to train one like it.

    Raises:
        ModelError: one of our own, whose config.json says it.
    """
    if preset.layout == "tok1d":
        raise ModelError(f"{preset.name} is of no published family; its configuration is in the config.json that it ships with")
    from tok1d.generators.official.maskgit import bert_config, uvit_config
    from tok1d.generators.official.rar import rar_config

    builder = {"maskgit-bert": bert_config, "maskgit-uvit": uvit_config, "rar": rar_config}[preset.layout]
    config: dict[str, Any] = builder(preset.tokenizer, preset.tokens, preset.vocab_size, **preset.sizes)
    return config
