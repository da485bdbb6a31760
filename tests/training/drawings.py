"""Drawn shapes to learn from: a colour and a shape are all there is to say of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS, SHAPES = ("red", "green", "blue", "yellow", "black"), ("circle", "square", "triangle", "cross")


def draw(colour: str, shape: str, random: np.random.Generator) -> Image.Image:
    """96 pixels wide; somewhere near the middle, larger or smaller."""
    (x, y), r = random.integers(32, 64, 2).tolist(), int(random.integers(16, 28))
    return draw_at(colour, shape, 96, (x, y), r, 9)


def draw_at(colour: str, shape: str, size: int, middle: tuple[int, int], r: int, width: int) -> Image.Image:
    """On white; ``width`` is that of a cross's lines."""
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    x, y = middle
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    else:
        pen.line(box, fill=colour, width=width)
        pen.line((x - r, y + r, x + r, y - r), fill=colour, width=width)
    return image


def weights(run: Path) -> list[bytes]:
    """What a run wrote."""
    return [(run / name).read_bytes() for name in ("image.onnx", "text.onnx", "tokenizer.json")]
