"""Time and size of encoding one generated image, by all of benchmarks/encoders.py in the same run.

`.venv-bench/bin/python benchmarks/encoding.py` writes benchmarks/results/encoding.md; images/ takes its settings from
there. Encoding is measured alone and beside a thread that never stops computing in Python.
The network is not looked at.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, features

# As a script this file's own folder would come first, where `weights` is benchmarks/weights.py and not the room.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.encoders import BASELINE, OPTIONS, Encoder  # noqa: E402

Pixels = npt.NDArray[np.float64]

EDGE = 1024
SEED = 20261120
RESULTS = Path(__file__).parent / "results" / "encoding.md"
LIBRARIES = ("isal", "zlib-ng", "deflate", "fpng", "opencv-python-headless", "simplejpeg")


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
    """Milliseconds, one a round, and what came out."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    wall_beside_another: list[float] = field(default_factory=list)
    other_stood_still: list[float] = field(default_factory=list)
    size: int = 0
    fidelity: float | None = None  # PSNR in dB; None is exact


class BusyThread(threading.Thread):
    """Computes in Python without a pause, as a thread that launches kernels does, and notes how long it had to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.longest_pause = 0.0
        self._running = threading.Event()
        self._stopped = False

    def run(self) -> None:
        last = time.perf_counter()
        self._running.set()
        last_turn = False
        while not last_turn:
            last_turn = self._stopped  # read first: one more look at the clock after the last pause
            now = time.perf_counter()
            self.longest_pause = max(self.longest_pause, now - last)
            last = now

    def __enter__(self) -> BusyThread:
        self.start()
        self._running.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self.join()


def peak_signal_to_noise(image: Image.Image, data: bytes) -> float | None:
    with Image.open(io.BytesIO(data)) as decoded:
        difference = np.asarray(image, np.float64) - np.asarray(decoded, np.float64)
    error = float(np.mean(difference**2))
    return None if error == 0 else 10 * math.log10(255**2 / error)


def measure(rounds: int) -> dict[str, dict[str, Measurement]]:
    """Every round runs every option twice, in a new order, so that a slow minute falls on all of them alike.

    CPU time is this thread's alone, whatever else the machine is doing; the other times are of the wall clock.
    """
    results = {name: {option: Measurement() for option in OPTIONS} for name in PICTURES}
    order = random.Random(SEED)
    for name, picture in PICTURES.items():
        image = picture()
        for option, encode in OPTIONS.items():  # also warms caches and the allocator
            data = encode(image)
            results[name][option].size = len(data)
            results[name][option].fidelity = peak_signal_to_noise(image, data)
        for _ in range(rounds):
            for option in order.sample(sorted(OPTIONS), len(OPTIONS)):
                measure_once(results[name][option], OPTIONS[option], image)
    return results


def measure_once(found: Measurement, encode: Encoder, image: Image.Image) -> None:
    start, cpu_start = time.perf_counter(), time.thread_time()
    encode(image)
    found.cpu.append((time.thread_time() - cpu_start) * 1000)
    found.wall.append((time.perf_counter() - start) * 1000)
    with BusyThread() as other:
        start = time.perf_counter()
        encode(image)
        found.wall_beside_another.append((time.perf_counter() - start) * 1000)
    found.other_stood_still.append(other.longest_pause * 1000)


def table(measurements: dict[str, Measurement]) -> list[str]:
    baseline = measurements[BASELINE]
    lines = [
        "| option | CPU | min to max | ratio | wall | beside another | it stood still | size, kB | ratio | PSNR |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for option, found in measurements.items():
        cpu = statistics.median(found.cpu)
        lines.append(
            f"| {option} | {cpu:.1f} | {min(found.cpu):.1f} to {max(found.cpu):.1f} "
            f"| {cpu / statistics.median(baseline.cpu):.2f} | {statistics.median(found.wall):.1f} "
            f"| {statistics.median(found.wall_beside_another):.1f} "
            f"| {min(found.other_stood_still):.1f} "
            f"| {found.size / 1000:,.0f} | {found.size / baseline.size:.2f} "
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
        f"numpy {np.__version__}, "
        f"{', '.join(f'{library} {metadata.version(library)}' for library in LIBRARIES)}."
    )


def report(results: dict[str, dict[str, Measurement]], rounds: int) -> str:
    lines = [
        "# Encoding one 1024 by 1024 image",
        "",
        f"Written by `.venv-bench/bin/python benchmarks/encoding.py --rounds {rounds}`",
        f"on {datetime.now(UTC):%Y-%m-%d}.",
        machine(),
        "",
        f"Medians of {rounds} rounds after one to warm up; every round runs all options in a new order, so that",
        "a slow minute falls on all alike. Times are in milliseconds. *CPU* is the time of the thread that encodes,",
        "whatever else the machine does; *wall* is the clock's. *Beside another* is the clock's again, while a second",
        "thread computes in Python without a pause, as one does that launches kernels. *It stood still* is the longest",
        "that this thread stopped at once, in the round where that was shortest: an encoder that kept Python's lock",
        "while it works would show there. PSNR is in dB.",
        "",
        f'Ratios are to "{BASELINE}" on the same picture. Sizes are without metadata. "Average", "Sub", "Up" and',
        '"Paeth" are PNG\'s filters, the same for every row and computed by numpy; the rest of the name says what',
        "deflates. The pictures are synthetic",
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
