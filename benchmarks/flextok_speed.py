"""Seconds of FlexTok decoding, 25 guided steps: tok1d against a plain reference, as ratios of one run.

The reference, written here, is the published decoder the way it runs on a CPU: all images in one packed sequence under a
dense mask, every register, one pass with the tokens and one without, modulations of every block computed in every step and
expanded to every position, separate projections. Both run in float32 on the same (random) weights and the same noise, take
turns, and must make the same pictures (1e-4). Decoding is measured whole; nothing is extrapolated from fewer steps.

    python -m benchmarks.flextok_speed                        # tiny and d12, batch 1: about ten minutes on two cores
    python -m benchmarks.flextok_speed --models tiny --quick  # seconds, to see that it works

"flow" is the flow alone, "decode" includes the VAE's decoder, of which the reference is diffusers' AutoencoderKL.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import RESULTS, save, say
from tok1d.extras import require
from tok1d.tokenizers.blocks import unpatchify
from tok1d.tokenizers.decoders.flow import RectifiedFlowDecoder
from tok1d.tokenizers.decoders.flow_sampler import seeded_noise
from tok1d.tokenizers.flextok_blocks import patches_of
from tok1d.tokenizers.official.flextok import FLEXTOK, flextok_config
from tok1d.tokenizers.official.layout import export_state
from tok1d.tokenizers.tokenizer import Tokenizer1D

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"decoder_depth": 4, "decoder_width": 128, "latent_channels": 4, "vae_channels": (32, 32, 32, 32)},
    "d12": {"decoder_depth": 12, "latent_channels": 16},
}
ENCODER = {"encoder_depth": 1, "encoder_width": 64}  # not measured
KEPT = (1, 32, 64, 256)
GUIDANCE = 7.5
TOLERANCE = 1e-4  # of a picture in [0, 1]


class Reference:
    """The published decoder on its published tensors.

    Args:
        state: tensors by published name.
        grid, patch: rows and columns of patches, side of a patch in latents.
        config: of our decoder, for the sizes of the VAE.
    """

    def __init__(self, state: dict[str, Tensor], grid: tuple[int, int], patch: int, config: dict[str, Any]) -> None:
        prefix = "decoder.module_dict.dec_"
        self.w = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        self.grid, self.patch, self.patches = grid, patch, grid[0] * grid[1]
        self.depth = len({key.split(".")[2] for key in self.w if key.startswith("transformer.blocks.")})
        self.table = self.w["registers_posemb_module.posembs"][0, 0].T
        self.masks: dict[int, Tensor] = {}
        kl = require("diffusers", "flow").AutoencoderKL
        levels = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
        levels = {key: value * len(config["vae_channels"]) for key, value in levels.items()}
        self.scale = config["scaling_factor"]
        self.vae = kl(
            **levels,
            block_out_channels=tuple(config["vae_channels"]),
            layers_per_block=config["vae_layers"],
            latent_channels=config["latent_channels"],
        ).eval()
        self.vae.load_state_dict({k.removeprefix("vae.vae."): v for k, v in state.items() if k.startswith("vae.vae.")})

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, H, W)."""
        return (self.vae.decode(latents / self.scale).sample + 1) / 2

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def velocity(self, x: Tensor, t: Tensor, q: Tensor, null: bool) -> Tensor:
        """Latents (B, C, h, w), times (B,), codes (B, n, D) → velocity (B, C, h, w)."""
        batch, total = len(x), len(self.table)
        padded = F.pad(q, (0, 0, 0, total - q.shape[1]))
        registers = self.linear("from_latents.proj", padded) + self.table
        registers[:, q.shape[1] :] = self.w["nested_dropout.dropout_mask_token"]
        if null:
            registers[:] = self.w["latent_dropout.nullcond"]
        patches = self.linear("noise_patch_emb.patch_proj", patches_of(x, self.patch))
        patches = patches + self.w["patches_posemb_module.posembs"][0].flatten(1).T
        length = self.patches + total
        packed = torch.cat([patches, registers], dim=1).reshape(1, batch * length, -1)
        if batch not in self.masks:
            image = torch.arange(batch).repeat_interleave(length)
            self.masks[batch] = (image[:, None] == image)[None, None]
        time_code = self.time(t)
        for i in range(self.depth):
            packed = self.block(f"transformer.blocks.{i}.", packed, time_code, self.masks[batch], total)
        y = packed.view(batch, length, -1)[:, : self.patches]
        shift, scale = self.linear("to_patches.adaLN_modulation.1", F.silu(time_code)).chunk(2, dim=-1)
        y = F.layer_norm(y, y.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]
        return unpatchify(self.linear("to_patches.proj", y), self.grid, self.patch)

    def time(self, t: Tensor) -> Tensor:
        angle = t[:, None] * 1000 * 256 ** (-torch.arange(128) / 128)
        code = self.linear("time_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1))
        return self.linear("time_embedder.mlp.2", F.silu(code))

    def block(self, name: str, x: Tensor, time_code: Tensor, mask: Tensor, registers: int) -> Tensor:
        rows = self.linear(f"{name}adaLN_modulation.1", F.silu(time_code)).unflatten(-1, (2, -1))  # (B, 2, 6 W)
        counts = torch.tensor([self.patches, registers]).repeat(len(rows))
        expanded = rows.flatten(0, 1).repeat_interleave(counts, dim=0)[None]  # (1, B · 512, 6 W)
        gate1, gate2, shift1, scale1, shift2, scale2 = expanded.chunk(6, dim=-1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = (self.linear(f"{name}attn.w{s}", y).unflatten(-1, (-1, 64)).transpose(1, 2) for s in "qkv")
        q, k = F.layer_norm(q, (64,)), F.layer_norm(k, (64,))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=8 / 64)
        x = x + gate1 * self.linear(f"{name}attn.proj", y.transpose(1, 2).flatten(2))
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        y = F.silu(self.linear(f"{name}mlp.fc1", y)) * self.linear(f"{name}mlp.fc3", y)
        return x + gate2 * self.linear(f"{name}mlp.fc2", y)

    def sample(self, noise: Tensor, q: Tensor, steps: int, guidance: float) -> Tensor:
        """Euler with normalised guidance: float (B, C, h, w) noise → latents."""
        x, last = noise, torch.zeros_like(noise)
        for i in range(steps, 0, -1):
            t = torch.full((len(x),), i / steps)
            given, without = self.velocity(x, t, q, null=False), self.velocity(x, t, q, null=True)
            last = given - without - 0.5 * last
            clip = (2.5 / last.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None, None]
            unit = F.normalize(given.double().flatten(1), dim=1)
            clipped = (last * clip).double().flatten(1)
            across = clipped - (clipped * unit).sum(1, keepdim=True) * unit
            x = x - (given + (guidance - 1) * across.view_as(given).float()) / steps
        return x


def build(name: str) -> tuple[RectifiedFlowDecoder, Reference]:
    """Ours with random weights whose modulations and head are no zeros, and the reference on the very same tensors."""
    torch.manual_seed(0)
    tokenizer = Tokenizer1D.from_config(flextok_config(**ENCODER, **MODELS[name])).eval().requires_grad_(False)
    decoder = tokenizer.decoder
    assert isinstance(decoder, RectifiedFlowDecoder)
    for module in (*(block.modulation for block in decoder.net.blocks), decoder.net.final_modulation, decoder.net.head):
        torch.nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
        torch.nn.init.normal_(module.bias, std=0.2)
    for vector in (decoder.net.dropped, decoder.net.null, decoder.net.token_positions):
        torch.nn.init.normal_(vector)
    return decoder, Reference(export_state(FLEXTOK, tokenizer), decoder.grid, decoder.patch, decoder.config)


def take_turns(calls: list[Callable[[], Tensor]], repeats: int) -> tuple[list[list[float]], list[Tensor]]:
    """Seconds of every call of each function, called alternately, and what they returned last."""
    times: list[list[float]] = [[] for _ in calls]
    results: list[Tensor] = [torch.empty(0) for _ in calls]
    for turn in range(repeats):
        order = range(len(calls)) if turn % 2 else reversed(range(len(calls)))
        for i in order:
            start = time.perf_counter()
            results[i] = calls[i]()
            times[i].append(time.perf_counter() - start)
    return times, results


@torch.inference_mode()
def measure(name: str, kept: list[int], batches: list[int], steps: int, repeats: int) -> list[dict[str, Any]]:
    """A row of seconds and ratio for every number of tokens and batch size."""
    decoder, reference = build(name)
    rows = []
    for batch in batches:
        generator = torch.Generator().manual_seed(1)
        codes = torch.rand(batch, decoder.tokens, decoder.dim, generator=generator) * 2 - 1
        noise = seeded_noise(range(batch), decoder.latent_shape)
        decoder.sample(noise, codes, steps=1)  # warm
        reference.sample(noise, codes, 1, GUIDANCE)
        for k in kept:
            q = codes[:, :k]
            ours = partial(decoder.sample, noise, q, steps=steps, guidance=GUIDANCE)
            theirs = partial(reference.sample, noise, q, steps, GUIDANCE)
            (mine, his), (latents, expected) = take_turns([ours, theirs], repeats)
            (my_vae, his_vae), images = take_turns([partial(decoder.vae, latents), partial(reference.pixels, expected)], repeats)
            error = (images[0].clamp(0, 1) - images[1].clamp(0, 1)).abs().max().item()
            a, b, v, w = (statistics.median(times) for times in (mine, his, my_vae, his_vae))
            ratio = statistics.median(h / m for m, h in zip(mine, his, strict=True))
            row: dict[str, Any] = {"model": name, "batch": batch, "tokens": k, "steps": steps}
            row |= {"tok1d_flow_s": round(a, 4), "reference_flow_s": round(b, 4), "flow_ratio": round(ratio, 3)}
            row |= {"tok1d_vae_s": round(v, 4), "reference_vae_s": round(w, 4), "decode_ratio": round((b + w) / (a + v), 3)}
            row |= {"max_error": error, "repeats": repeats}
            rows.append(row)
            say(f"{name:5} batch {batch} {k:4} tokens  {a:9.3f} s  {b:9.3f} s  × {ratio:.2f}, with VAE × {row['decode_ratio']:.2f}, error {error:.1e}")
            if not error <= TOLERANCE:
                raise SystemExit(f"{name}, {k} tokens: pictures differ by {error:.2g}, more than {TOLERANCE}")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="tiny,d12", help=f"comma-separated, of {', '.join(MODELS)} (default: tiny,d12)")
    parser.add_argument("--tokens", default=",".join(map(str, KEPT)), help="comma-separated numbers of tokens kept")
    parser.add_argument("--batches", default="1", help="comma-separated (default: 1)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=0, help="decodes a row; 0 (default): 7 of tiny, 1 of larger models")
    parser.add_argument("--quick", action="store_true", help="2 steps once; shows that it works, measures little")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write flextok_speed.json in")
    args = parser.parse_args(argv)
    models = args.models.split(",")
    if unknown := [m for m in models if m not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}; choose of {', '.join(MODELS)}")
    kept, batches = ([int(n) for n in text.split(",")] for text in (args.tokens, args.batches))
    say("model          kept       tok1d     reference    ratio")
    rows = []
    for model in models:
        repeats = 1 if args.quick else args.repeats or (7 if model == "tiny" else 1)
        rows += measure(model, kept, batches, 2 if args.quick else args.steps, repeats)
    body = {"guidance": GUIDANCE, "dtype": "float32", "quick": args.quick, "tolerance": TOLERANCE, "rows": rows}
    save("flextok_speed", body, threads=torch.get_num_threads(), folder=args.out)


if __name__ == "__main__":
    main()
