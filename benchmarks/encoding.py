"""Time and size of encoding one generated image: PNG levels and strategies, WebP efforts, JPEG, in the same run.

`python benchmarks/encoding.py` writes benchmarks/results/encoding.md; images/encode.py takes its settings from there.
It measures Pillow alone, in one thread; what the network adds is not looked at.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, features

Pixels = npt.NDArray[np.float64]

EDGE = 1024
SEED = 20261120
RESULTS = Path(__file__).parent / "results" / "encoding.md"
BASELINE = "PNG level 6 (Pillow's default)"
Z_HUFFMAN_ONLY, Z_RLE = 2, 3  # zlib.h

OPTIONS: dict[str, dict[str, Any]] = {
    BASELINE: {"format": "PNG", "compress_level": 6},
    "PNG level 0": {"format": "PNG", "compress_level": 0},
    "PNG level 1": {"format": "PNG", "compress_level": 1},
    "PNG level 2": {"format": "PNG", "compress_level": 2},
    "PNG level 3": {"format": "PNG", "compress_level": 3},
    "PNG level 9": {"format": "PNG", "compress_level": 9},
    "PNG level 1, run lengths (Z_RLE)": {
        "format": "PNG",
        "compress_level": 1,
        "compress_type": Z_RLE,
    },
    "PNG level 1, Huffman only": {
        "format": "PNG",
        "compress_level": 1,
        "compress_type": Z_HUFFMAN_ONLY,
    },
    "WebP q80, effort 0": {"format": "WEBP", "quality": 80, "method": 0},
    "WebP q80, effort 2": {"format": "WEBP", "quality": 80, "method": 2},
    "WebP q80, effort 4 (Pillow's default)": {"format": "WEBP", "quality": 80, "method": 4},
    "WebP q80, effort 6": {"format": "WEBP", "quality": 80, "method": 6},
    "WebP q95, effort 0": {"format": "WEBP", "quality": 95, "method": 0},
    "JPEG q80": {"format": "JPEG", "quality": 80},
    "JPEG q80, optimised": {"format": "JPEG", "quality": 80, "optimize": True},
    "JPEG q95": {"format": "JPEG", "quality": 95},
}


def spectrum(generator: np.random.Generator, exponent: float) -> Pixels:
    """Noise whose amplitude falls as 1/f^exponent, standard deviation 1; photographs are near 1 to 1.2."""
    frequency = np.hypot(np.fft.fftfreq(EDGE)[:, None], np.fft.rfftfreq(EDGE)[None])
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(generator.standard_normal((EDGE, EDGE)))
    noise = np.fft.irfft2(white / frequency**exponent, s=(EDGE, EDGE))
    return np.asarray(noise / noise.std())


def coloured(light: Pixels, tint: Pixels, generator: np.random.Generator) -> Pixels:
    """Mostly light, a little colour, as in real pictures: the channels go together."""
    other = spectrum(generator, 1.5)[..., None] * np.array([1.0, -0.2, -1.0])
    return np.asarray(light[..., None] * tint + 0.25 * other)


def to_image(values: Pixels) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def photograph() -> Image.Image:
    """Texture everywhere: amplitude 1/f^1.1, and grain of one grey level."""
    generator = np.random.default_rng(SEED)
    body = coloured(spectrum(generator, 1.1), np.array([1.0, 0.95, 0.85]), generator)
    return to_image(128 + 38 * body + generator.normal(0, 1.0, body.shape))


def out_of_focus() -> Image.Image:
    """Soft background, sharp middle: amplitude 1/f^2.2 outside, 1/f^1.1 inside, grain of half a grey level."""
    generator = np.random.default_rng(SEED + 1)
    y, x = np.mgrid[-1 : 1 : EDGE * 1j, -1 : 1 : EDGE * 1j]
    sharp = np.clip(1.6 - 2.2 * np.hypot(x, y), 0, 1)
    light = (1 - sharp) * spectrum(generator, 2.2) + sharp * spectrum(generator, 1.1)
    body = coloured(light, np.array([0.9, 1.0, 1.0]), generator)
    return to_image(120 + 45 * body + generator.normal(0, 0.5, body.shape))


def illustration() -> Image.Image:
    """Flat colours with sharp edges over a vertical gradient, noise of 0.3 grey levels: mostly unchanged pixels."""
    generator = np.random.default_rng(SEED + 2)
    shapes = np.digitize(spectrum(generator, 2.0), [-1.0, -0.4, 0.2, 0.9])
    palette = generator.integers(30, 220, (5, 3))
    gradient = np.linspace(-20, 20, EDGE)[:, None, None]
    return to_image(palette[shapes] + gradient + generator.normal(0, 0.3, (EDGE, EDGE, 3)))


def white_background() -> Image.Image:
    """One textured object on paper white, clipped at 255 as a decoder does: two thirds of the pixels are equal."""
    generator = np.random.default_rng(SEED + 3)
    y, x = np.mgrid[-1 : 1 : EDGE * 1j, -1 : 1 : EDGE * 1j]
    paper = np.clip((np.hypot(x, y) - 0.62) * 30, 0, 1)[..., None]
    body = 120 + 40 * coloured(spectrum(generator, 1.3), np.array([1.0, 0.8, 0.9]), generator)
    return to_image((1 - paper) * body + paper * 257 + generator.normal(0, 0.4, body.shape))


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "photograph": photograph,
    "out of focus": out_of_focus,
    "illustration": illustration,
    "white background": white_background,
}


@dataclass
class Measurement:
    milliseconds: list[float] = field(default_factory=list)
    size: int = 0
    fidelity: float | None = None  # PSNR in dB; None is exact

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def peak_signal_to_noise(image: Image.Image, data: bytes) -> float | None:
    with Image.open(io.BytesIO(data)) as decoded:
        difference = np.asarray(image, np.float64) - np.asarray(decoded, np.float64)
    error = float(np.mean(difference**2))
    return None if error == 0 else 10 * math.log10(255**2 / error)


def encode(image: Image.Image, options: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def measure(rounds: int) -> dict[str, dict[str, Measurement]]:
    """CPU milliseconds of this thread: the wall clock would also count what else the machine is doing.

    Every round runs every option once, in a new order, so that a slow minute falls on all of them alike.
    """
    results = {name: {option: Measurement() for option in OPTIONS} for name in PICTURES}
    order = random.Random(SEED)
    for name, picture in PICTURES.items():
        image = picture()
        for number in range(rounds + 1):
            for option in order.sample(sorted(OPTIONS), len(OPTIONS)):
                start = time.thread_time()
                data = encode(image, OPTIONS[option])
                elapsed = (time.thread_time() - start) * 1000
                found = results[name][option]
                if number:
                    found.milliseconds.append(elapsed)
                else:  # the first round warms caches and the allocator, and is not timed
                    found.size = len(data)
                    found.fidelity = peak_signal_to_noise(image, data)
    return results


def table(measurements: dict[str, Measurement]) -> list[str]:
    baseline = measurements[BASELINE]
    lines = [
        "| option | CPU ms, median | min to max | ratio | size, kB | ratio | PSNR, dB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for option, found in measurements.items():
        lines.append(
            f"| {option} | {found.median:.0f} | {min(found.milliseconds):.0f} to {max(found.milliseconds):.0f} "
            f"| {found.median / baseline.median:.2f} | {found.size / 1000:,.0f} "
            f"| {found.size / baseline.size:.2f} "
            f"| {'exact' if found.fidelity is None else f'{found.fidelity:.1f}'} |"
        )
    return lines


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> str:
    return (
        f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"Pillow {PIL.__version__} with zlib-ng {features.version_feature('zlib_ng')}, "
        f"libjpeg-turbo {features.version_feature('libjpeg_turbo')}, libwebp {features.version('webp')}; "
        f"numpy {np.__version__}."
    )


def report(results: dict[str, dict[str, Measurement]], rounds: int) -> str:
    lines = [
        "# Encoding one 1024 by 1024 image",
        "",
        f"Written by `python benchmarks/encoding.py --rounds {rounds}` on {datetime.now(UTC):%Y-%m-%d}.",
        machine(),
        "",
        f"CPU time of one thread, median of {rounds} rounds after one to warm up; every round runs all options",
        "in a new order, so that a slow minute falls on all alike.",
        f'Ratios are to "{BASELINE}" on the same picture. Sizes are without metadata. The pictures are synthetic',
        f"(numpy, seed {SEED}), made to bracket what a diffusion model paints:",
        "",
    ]
    for name, picture in PICTURES.items():
        lines.append(f"- **{name}**: {(picture.__doc__ or '').strip()}")
    for name, measurements in results.items():
        lines += ["", f"## {name.capitalize()}", "", *table(measurements)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args()
    text = report(measure(options.rounds), options.rounds)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
