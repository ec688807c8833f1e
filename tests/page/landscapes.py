"""Pictures for tests and for the pages of the documentation, drawn rather than generated: hills under a sky.

They stand in for a model's, so that what surrounds them can be judged. The same seed draws the same hills.
"""

from __future__ import annotations

import colorsys
import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

Colour = tuple[float, float, float]


@lru_cache(maxsize=64)
def landscape(seed: int, width: int, height: int) -> Image.Image:
    random = np.random.default_rng(seed)
    hue = seed * 0.618034 % 1  # the golden ratio keeps neighbours apart
    sky = np.linspace(0, 1, height)[:, None, None]
    top, low = _colour(hue, 0.35, 0.62), _colour(hue + 0.08 + 0.06 * random.random(), 0.42, 0.97)
    picture = np.array(top) * (1 - sky) + np.array(low) * sky
    picture = np.broadcast_to(picture, (height, width, 3)).copy()

    y, x = np.mgrid[0:height, 0:width]
    centre = random.uniform(0.2, 0.8) * width, random.uniform(0.22, 0.45) * height
    far = np.hypot(x - centre[0], y - centre[1])
    radius = random.uniform(0.05, 0.1) * min(width, height)
    light = np.array(_colour(hue + 0.12, 0.18, 1.0))
    glow = np.exp(-far / (radius * 3.5))[..., None] * 0.6
    disc = np.clip(radius - far + 0.5, 0, 1)[..., None]
    picture = picture * (1 - glow) + light * glow
    picture = picture * (1 - disc) + light * disc

    layers = int(random.integers(5, 8))
    for layer in range(layers):
        depth = (layer + 1) / layers
        ridge = height * (0.42 + 0.5 * depth * depth) + _ridge(random, width, height, depth)
        colour = np.array(_colour(hue + 0.05 * (1 - depth), 0.2 + 0.4 * depth, 0.86 - 0.72 * depth))
        inside = np.clip(y - ridge[None, :], 0, 1)[..., None]
        # Mist lies in the valleys: the further below its ridge, the paler.
        mist = np.clip((y - ridge[None, :]) / (0.35 * height), 0, 1)[..., None] * (1 - depth) * 0.7
        picture = picture * (1 - inside) + (colour * (1 - mist) + np.array(low) * mist) * inside

    picture += random.normal(0, 0.012, picture.shape)
    return Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))


def encoded(picture: Image.Image, kind: str = "webp") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=82)
    return buffer.getvalue()


def preview(picture: Image.Image, done: float) -> bytes:
    """What a step of denoising shows of it: less and less noise, as a small JPEG."""
    small = picture.resize(
        (
            max(8, picture.width * 96 // max(picture.size)),
            max(8, picture.height * 96 // max(picture.size)),
        )
    )
    small = small.filter(ImageFilter.GaussianBlur(4 * (1 - done)))
    noise = np.random.default_rng(0).integers(0, 255, (small.height, small.width, 3))
    mixed = np.asarray(small) * (0.35 + 0.65 * done) + noise * (0.65 - 0.65 * done)
    return encoded(Image.fromarray(mixed.astype(np.uint8)), "jpeg")


def _ridge(random: np.random.Generator, width: int, height: int, depth: float) -> np.ndarray:
    across = np.linspace(0, 1, width)
    ridge = np.zeros(width)
    for octave in range(7):
        amount = height * 0.09 * (0.6 + 0.6 * depth) / 1.9**octave
        ridge += amount * np.sin(
            2 * np.pi * (across * 1.3 * 2**octave * random.uniform(0.7, 1.2) + random.random())
        )
    return ridge


def _colour(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue % 1, saturation, value)
