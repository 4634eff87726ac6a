"""Images/s of binary latents (Instella-T2I's tokenizer) encode and decode: tok1d against a plain reference, as ratios of one run.

The reference, written here, is the architecture done the obvious way: one layer a weight, attention as two products and a
softmax, positions and their cosines made in every call, pixel (un)shuffles for the shortcuts, all outputs of the last block
computed and most thrown away. Both run in float32 on the same (random) weights, take turns, and must find the same bits
and pictures.

    python -m benchmarks.binary_speed                            # published size, one image of 256 × 256
    python -m benchmarks.binary_speed --sides 256,512
    python -m benchmarks.binary_speed --quick --model small      # seconds, to see that it works
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import RESULTS, save
from tok1d.tokenizers.official.instella import INSTELLA, instella_config
from tok1d.tokenizers.official.layout import export_state
from tok1d.tokenizers.tokenizer import Tokenizer1D

MODELS = {
    "published": {},
    "small": {"tokens": 8, "dim": 64, "code_dim": 64, "encoder_width": 128, "encoder_depth": 3, "decoder_width": 128, "decoder_depth": 2},
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Reference:
    """Functions of a published state dict, heads of 64 channels, S = 64 patches a side."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.tokens = state["encoder.latent_tokens"].shape[1]
        self.depth = {side: sum(k.startswith(side) and k.endswith("o_proj.weight") for k in state) for side in ("encoder", "decoder")}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.state[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def positions(self, latents: int, rows: int, cols: int, scale: int) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(latents + rows * cols, 3)
        ids[:latents, 0] = torch.arange(latents)
        ids[latents:, 1] = (torch.arange(rows) / (rows - 1) * (scale - 1)).repeat_interleave(cols)
        ids[latents:, 2] = (torch.arange(cols) / (cols - 1) * (scale - 1)).repeat(rows)
        turns = [ids[:, i : i + 1].double() * 10000.0 ** -(torch.arange(0, n, 2).double() / n) for i, n in enumerate((8, 28, 28))]
        turn = torch.cat(turns, 1).repeat_interleave(2, 1)
        return turn.cos().float(), turn.sin().float()

    def attention(self, x: Tensor, at: str, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (self.linear(x, f"{at}{n}_proj").unflatten(-1, (-1, 64)).transpose(1, 2) for n in "qkv")
        q, k = self.norm(q, f"{at}norm_q.weight"), self.norm(k, f"{at}norm_k.weight")
        q, k = (y * cos + torch.cat([-y[..., 32:], y[..., :32]], -1) * sin for y in (q, k))
        y = (q @ k.transpose(2, 3) / 8).softmax(-1) @ v
        return self.linear(y.transpose(1, 2).flatten(2), f"{at}o_proj")

    def blocks(self, x: Tensor, side: str, numbers: range, cos: Tensor, sin: Tensor) -> Tensor:
        for i in numbers:
            at = f"{side}.transformer_blocks.{i}."
            x = x + self.attention(self.norm(x, f"{at}input_layernorm.weight"), f"{at}attn.", cos, sin)
            y = self.norm(x, f"{at}post_attention_layernorm.weight")
            x = x + self.linear(F.silu(self.linear(y, f"{at}mlp.gate_proj")) * self.linear(y, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
        return x

    def encode(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → uint8 bits (B, N, d)."""
        s, n, depth = self.state, self.tokens, self.depth["encoder"]
        x = F.conv2d(images * 2 - 1, s["encoder.patch_embedder.weight"], s["encoder.patch_embedder.bias"], stride=16)
        batch, width, rows, cols = x.shape
        x = torch.cat([s["encoder.latent_tokens"].repeat(batch, 1, 1), x.flatten(2).transpose(1, 2)], 1)
        x = self.blocks(x, "encoder", range(depth * 2 // 3), *self.positions(n, rows, cols, 64))
        grid = x[:, n:].transpose(1, 2).reshape(batch, width, rows, cols)
        conv = F.conv2d(grid, s["encoder.down_layers.0.conv.weight"], s["encoder.down_layers.0.conv.bias"], stride=2, padding=1)
        grid = conv + F.pixel_unshuffle(grid, 2).unflatten(1, (width, 4)).mean(2)
        x = torch.cat([x[:, :n], grid.flatten(2).transpose(1, 2)], 1)
        x = self.blocks(x, "encoder", range(depth * 2 // 3, depth), *self.positions(n, rows // 2, cols // 2, 32))
        z = self.linear(self.norm(x, "encoder.norm_out.weight")[:, :n], "encoder.proj_out")
        return (self.linear(z, "quantizer.proj.0").sigmoid() > 0.5).to(torch.uint8)

    def decode(self, bits: Tensor, rows: int, cols: int) -> Tensor:
        """uint8 bits (B, N, d), rows and columns of patches → float (B, 3, H, W) in [0, 1]."""
        s, depth = self.state, self.depth["decoder"]
        x = self.linear(self.norm(bits.float() @ s["quantizer.embed"], "decoder.input_layer.0.weight"), "decoder.input_layer.1")
        batch, n, width = x.shape
        x = torch.cat([x, s["decoder.mask_tokens"].repeat(batch, rows * cols // 4, 1)], 1)
        x = self.blocks(x, "decoder", range(depth // 2), *self.positions(n, rows // 2, cols // 2, 32))
        grid = x[:, n:].transpose(1, 2).reshape(batch, width, rows // 2, cols // 2)
        conv = F.conv2d(grid, s["decoder.up_layers.0.conv.weight"], s["decoder.up_layers.0.conv.bias"], padding=1)
        grid = F.pixel_shuffle(conv, 2) + F.pixel_shuffle(grid.repeat_interleave(4, 1), 2)
        x = torch.cat([x[:, :n], grid.flatten(2).transpose(1, 2)], 1)
        x = self.blocks(x, "decoder", range(depth // 2, depth), *self.positions(n, rows, cols, 64))
        x = self.linear(self.norm(x, "decoder.norm_out.weight")[:, n:], "to_pixel")
        x = x.view(batch, rows, cols, 16, 16, 3).permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, rows * 16, cols * 16)
        return (x / 2 + 0.5).clamp(0, 1)


def take_turns(one: Callable[[], Tensor], other: Callable[[], Tensor], seconds: float, least: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Median seconds of each function, called alternately, and the median of the ratios of neighbours."""
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < least:
        for i in (0, 1) if len(times[0]) % 2 else (1, 0):
            start = clock()
            (one, other)[i]()
            times[i].append(clock() - start)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios)


@torch.inference_mode()
def measure(model: str, sides: list[int], batch: int, seconds: float, least: int, clock: str) -> list[dict]:
    torch.manual_seed(0)
    ours = Tokenizer1D.from_config(instella_config(**MODELS[model])).eval()
    ours.decoder.to_pixels.weight.mul_(50)  # new models begin grey, which would compare nothing
    reference = Reference(export_state(INSTELLA, ours))
    rows = []
    for side in sides:
        x = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
        encode = lambda x=x: ours.quantizer(ours.encode_latents(x)).bits  # noqa: E731
        bits = encode()
        if not torch.equal(bits, reference.encode(x)):
            raise SystemExit(f"{side}: bits differ in {int((bits != reference.encode(x)).sum())} of {bits.numel()} places")
        decode = lambda b=bits, s=side: ours.decode_latents(ours.quantizer.ids_to_codes(b), size=(s, s)).clamp(0, 1)  # noqa: E731
        plain = lambda b=bits, s=side: reference.decode(b, s // 16, s // 16)  # noqa: E731
        error = (decode() - plain()).abs().max().item()
        if not error < 1e-3:
            raise SystemExit(f"{side}: pictures differ by {error:.2g}")
        for verb, mine, his in (("encode", encode, lambda x=x: reference.encode(x)), ("decode", decode, plain)):
            a, b, ratio = take_turns(mine, his, seconds, least, CLOCKS[clock])
            row = {"model": model, "side": side, "batch": batch, "verb": verb, "tok1d_images_per_s": round(batch / a, 3)}
            rows.append(row | {"reference_images_per_s": round(batch / b, 3), "ratio": round(ratio, 3), "max_error": error})
            print(f"{model:9} {side:5} px  batch {batch:2} {verb}  {batch / a:8.3f} img/s  {batch / b:8.3f} img/s  × {ratio:.3f}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="published", choices=list(MODELS))
    parser.add_argument("--sides", default="256", help="of pictures in pixels, comma-separated multiples of 32 from 64 (default: 256)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--seconds", type=float, default=60, help="per row (default: 60)")
    parser.add_argument("--quick", action="store_true", help="two calls a row; shows that it works, measures little")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write binary_speed.json in")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: seconds of all threads, which other programs disturb little")
    args = parser.parse_args(argv)
    sides = [int(side) for side in args.sides.split(",")]
    rows = measure(args.model, sides, args.batch, 0 if args.quick else args.seconds, 2 if args.quick else 5, args.clock)
    save("binary_speed", {"dtype": "float32", "clock": args.clock, "quick": args.quick, "rows": rows}, threads=torch.get_num_threads(), folder=args.out)


if __name__ == "__main__":
    main()
