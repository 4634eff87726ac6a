"""Images/s of one-stage TiTok encode and decode: tok1d against a plain reference, as ratios of one run.

The reference, written here, is the published architecture done the obvious way: convolutions for patches and 1×1
projections, sequence-first nn.MultiheadAttention between permutes, the mask sequence made for every image in every call,
all outputs computed and most thrown away, the full token × code distance matrix. Both run in float32 on the same
(random) weights, take turns, and must find the same ids and pictures.

    python benchmarks/titok_speed.py                      # S, B, L at batch 1 and 8
    python benchmarks/titok_speed.py --quick --sizes S    # seconds, to see that it works

S, B and L have encoder and decoder of that size, with 128, 64 and 32 tokens; BL64, BL128 and SL256 are published models.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from tok1d import __version__
from tok1d.tokenizers.decoders.grid import GridDecoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.official.layout import export_state
from tok1d.tokenizers.official.titok import TITOK
from tok1d.tokenizers.quantizers.vq import VQ
from tok1d.tokenizers.tokenizer import Tokenizer1D

WIDTHS = {"S": (512, 8), "B": (768, 12), "L": (1024, 24)}
MODELS = {  # encoder, decoder, tokens
    "S": ("S", "S", 128),
    "B": ("B", "B", 64),
    "L": ("L", "L", 32),
    "BL64": ("B", "L", 64),
    "BL128": ("B", "L", 128),
    "SL256": ("S", "L", 256),
}
CODES, DIM, SIDE, PATCH = 8192, 64, 256, 16
RESULTS = Path(__file__).with_name("results") / "titok_speed.json"


# the reference; names are those of the published state dicts -----------------------------------------------------


class ReferenceBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential()
        for name, layer in layers.items():
            self.mlp.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ReferenceEncoder(nn.Module):
    def __init__(self, tokens: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (SIDE // PATCH) ** 2, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ReferenceBlock(width) for _ in range(depth))
        self.conv_out = nn.Conv2d(width, DIM, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        batch, tokens = len(images), len(latent_tokens)
        x = self.patch_embed(images).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), x], dim=1) + self.positional_embedding
        latents = latent_tokens.expand(batch, -1, -1) + self.latent_token_positional_embedding
        x = self.ln_pre(torch.cat([x, latents], dim=1)).permute(1, 0, 2)
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x.permute(1, 0, 2)[:, -tokens:])
        return self.conv_out(x.permute(0, 2, 1).unsqueeze(2))  # (B, C, 1, L)


class ReferenceDecoder(nn.Module):
    def __init__(self, tokens: int, width: int, depth: int) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(DIM, width)
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (SIDE // PATCH) ** 2, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ReferenceBlock(width) for _ in range(depth))
        self.ffn = nn.Sequential(nn.Conv2d(width, 3 * PATCH * PATCH, 1))
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        batch, _, _, tokens = z.shape
        grid = SIDE // PATCH
        x = self.decoder_embed(z.squeeze(2).permute(0, 2, 1)) + self.latent_token_positional_embedding[:tokens]
        masks = self.mask_token.repeat(batch, grid * grid, 1)
        masks = torch.cat([self.class_embedding.expand(batch, 1, -1), masks], dim=1) + self.positional_embedding
        x = self.ln_pre(torch.cat([masks, x], dim=1)).permute(1, 0, 2)
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x.permute(1, 0, 2)[:, 1 : 1 + grid * grid])
        x = self.ffn(x.permute(0, 2, 1).reshape(batch, -1, grid, grid))
        x = x.view(batch, PATCH, PATCH, 3, grid, grid).permute(0, 3, 4, 1, 5, 2)
        return self.conv_out(x.reshape(batch, 3, SIDE, SIDE))


class Reference(nn.Module):
    def __init__(self, encoder: str, decoder: str, tokens: int) -> None:
        super().__init__()
        self.encoder = ReferenceEncoder(tokens, *WIDTHS[encoder])
        self.decoder = ReferenceDecoder(tokens, *WIDTHS[decoder])
        self.latent_tokens = nn.Parameter(torch.empty(tokens, WIDTHS[encoder][0]))
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(CODES, DIM)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → ids (B, N)."""
        z = self.encoder(images, self.latent_tokens)
        flat, codebook = z.permute(0, 2, 3, 1).reshape(-1, DIM), self.quantize.embedding.weight
        distance = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
        return distance.argmin(1).view(len(images), -1)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (B, N) → (B, 3, H, W)."""
        return self.decoder(self.quantize.embedding(ids).permute(0, 2, 1).unsqueeze(2)).clamp(0, 1)


# the comparison --------------------------------------------------------------------------------------------------


def build(name: str) -> tuple[Tokenizer1D, Reference]:
    """Ours with random weights that use many codes, and the reference on the very same tensors."""
    encoder, decoder, tokens = MODELS[name]
    torch.manual_seed(0)
    ours = Tokenizer1D(
        TiTokEncoder(tokens, DIM, *WIDTHS[encoder]), VQ(CODES, DIM), GridDecoder(tokens, DIM, *WIDTHS[decoder]), name=name
    )
    ours.eval().requires_grad_(False)
    with torch.no_grad():
        z = ours.encode_latents(torch.rand(2, 3, SIDE, SIDE)).flatten(0, 1)
        ours.quantizer.codebook.normal_().mul_(z.std(0)).add_(z.mean(0))
    with torch.device("meta"):
        reference = Reference(encoder, decoder, tokens)
    reference.load_state_dict(export_state(TITOK, ours), assign=True)
    return ours, reference.eval().requires_grad_(False)


def take_turns(one: Callable, other: Callable, seconds: float, least: int) -> tuple[float, float, float]:
    """Median seconds of each function, called alternately, and the median of the ratios of neighbours."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    one(), other()
    while time.perf_counter() < end or len(times[0]) < least:
        order = ((one, times[0]), (other, times[1]))
        for call, spent in order if len(times[0]) % 2 else reversed(order):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios)


@torch.inference_mode()
def measure(name: str, batches: list[int], seconds: float, least: int) -> list[dict]:
    ours, reference = build(name)
    images = torch.rand(max(batches), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    rows = []
    for batch in batches:
        x = images[:batch]
        encode = lambda x=x: ours.quantizer(ours.encode_latents(x)).ids  # noqa: E731
        ids, theirs = encode(), reference.encode(x)
        if not torch.equal(ids, theirs):
            raise SystemExit(f"{name}: ids differ in {int((ids != theirs).sum())} of {ids.numel()} places")
        decode = lambda ids=ids: ours.decode_latents(ours.quantizer.ids_to_codes(ids)).clamp(0, 1)  # noqa: E731
        error = (decode() - reference.decode(ids)).abs().max().item()
        if not error < 1e-3:
            raise SystemExit(f"{name}: pictures differ by {error:.2g}")
        for verb, mine, his in (
            ("encode", encode, lambda x=x: reference.encode(x)),
            ("decode", decode, lambda ids=ids: reference.decode(ids)),
        ):
            a, b, ratio = take_turns(mine, his, seconds, least)
            row = {"model": name, "batch": batch, "verb": verb, "tok1d_images_per_s": round(batch / a, 3)}
            row |= {"reference_images_per_s": round(batch / b, 3), "ratio": round(ratio, 3), "distinct_ids": len(ids.unique())}
            rows.append(row)
            print(f"{name:6} batch {batch:2} {verb}  {batch / a:8.2f} img/s  {batch / b:8.2f} img/s  × {ratio:.3f}", flush=True)
    return rows


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="S,B,L", help=f"comma-separated, of {', '.join(MODELS)} (default: S,B,L)")
    parser.add_argument("--batches", default="1,8", help="comma-separated (default: 1,8)")
    parser.add_argument("--seconds", type=float, default=20, help="per row (default: 20)")
    parser.add_argument("--quick", action="store_true", help="two calls a row; shows that it works, measures little")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    args = parser.parse_args(argv)
    sizes, batches = args.sizes.split(","), [int(b) for b in args.batches.split(",")]
    if unknown := [s for s in sizes if s not in MODELS]:
        parser.error(f"unknown size {unknown[0]!r}; choose of {', '.join(MODELS)}")
    print("model  batch    verb        tok1d      reference      ratio")
    rows = [row for s in sizes for row in measure(s, batches, 0 if args.quick else args.seconds, 2 if args.quick else 5)]
    report = {
        "benchmark": "titok_speed",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tok1d": __version__,
        "dtype": "float32",
        "quick": args.quick,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
