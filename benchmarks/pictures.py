"""docs/figures/reconstructions.jpg: photos beside what 8, 32, 128 and 256 tokens give back, with the bytes of each.

    python -m benchmarks.pictures default photos-free-val-00000.tar

The photos are named here because their licences allow showing them; docs/figures/CREDITS.md credits them. None of them,
nor another window of the same picture, is in the training split.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.default_scores import file_size
from benchmarks.measure import SIDE, to_bytes
from benchmarks.plots import FIGURES
from tok1d import load
from tok1d.data.photos import centre_crop, decode_rgb, index_images, read_sample

PHOTOS = (
    "wp_budgie_013436c2",  # mountain
    "wp_budgie_013443c1",  # daisies
    "lire_cars_015106",  # car
    "wp_budgie_013472c2",  # city at sunset
    "grocery_004731",  # an orange
)
CELL, GAP, TOP, BOTTOM = 176, 6, 32, 21


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name, folder or hub id")
    parser.add_argument("data", nargs="+", help="shards or folders that hold the photos")
    parser.add_argument("--photos", default=",".join(PHOTOS), help="keys")
    parser.add_argument("--tokens", default="8,32,128,256")
    parser.add_argument("-o", "--output", type=Path, default=FIGURES / "reconstructions.jpg")
    args = parser.parse_args(argv)

    by_key = {sample[0]: sample for sample in index_images(args.data)}
    missing = [key for key in args.photos.split(",") if key not in by_key]
    if missing:
        raise SystemExit(f"not in these data: {', '.join(missing)}")
    model = load(args.model)
    views = torch.stack([centre_crop(decode_rgb(read_sample(by_key[key])), SIDE) for key in args.photos.split(",")])
    encoded = model.encode(views)
    columns = [("original", f"{SIDE} x {SIDE} pixels", views)]
    for k in map(int, args.tokens.split(",")):
        images = torch.cat([to_bytes(model.decode(encoded[i, :k])[0])[None] for i in range(len(views))])
        payload = -(-k * model.bits_per_token // 8)
        columns.append((f"{k} tokens", f"{payload} bytes (.tok file {file_size(model, k)})", images))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(columns).save(args.output, quality=88, optimize=True)
    print(f"{args.output} {args.output.stat().st_size} bytes")


def sheet(columns: list[tuple[str, str, Tensor]]) -> Image.Image:
    """Columns (title, what it costs, uint8 (R, 3, 256, 256)) as one picture; the cost stands under every image."""
    rows = len(columns[0][2])
    width = len(columns) * (CELL + GAP) + GAP
    height = TOP + rows * (CELL + BOTTOM)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    title, small = ImageFont.load_default(size=17), ImageFont.load_default(size=12)
    for c, (name, cost, images) in enumerate(columns):
        left = GAP + c * (CELL + GAP)
        draw.text((left + CELL // 2, TOP // 2), name, font=title, fill="black", anchor="mm")
        for r, image in enumerate(images):
            top = TOP + r * (CELL + BOTTOM)
            pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
            picture.paste(pixels.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
            draw.text((left + CELL // 2, top + CELL + BOTTOM // 2 - 1), cost, font=small, fill="#444444", anchor="mm")
    return picture


if __name__ == "__main__":
    main()
