"""docs/figures/generated.jpg: the first seeds of every class of the shipped generator, none chosen.

    python -m benchmarks.generated_pictures
"""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

import tok1d
from benchmarks.plots import FIGURES
from tok1d.generators.images import paint

SEEDS, TOKENS, SIDE, LABEL = 6, 32, 80, 84


def main() -> None:
    generator, tokenizer = tok1d.load_generator("default-flow"), tok1d.load("default")
    names = generator.condition.names
    half = -(-len(names) // 2)
    sheet = Image.new("RGB", (2 * (LABEL + SEEDS * SIDE), half * SIDE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, name in enumerate(names):
        x, y = i // half * (LABEL + SEEDS * SIDE), i % half * SIDE
        draw.text((x + LABEL - 8, y + SIDE // 2), name, fill="black", font=font, anchor="rm")
        pictures = (paint(tokenizer, generator.generate(SEEDS, label=name, tokens=TOKENS)) * 255).round().byte()
        for j, picture in enumerate(pictures):
            small = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(small, (x + LABEL + j * SIDE, y))
    path = FIGURES / "generated.jpg"
    sheet.save(path, quality=88)
    print(path)


if __name__ == "__main__":
    main()
