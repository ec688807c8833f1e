"""Aspect ratios to the sizes SDXL was trained on, scaled for models of another native size. Imports no torch."""

import math
from itertools import product

from diffusion.errors import RequestError

# Landscape sides of the training buckets in appendix I of the SDXL paper (https://arxiv.org/abs/2307.01952), the
# nearest to each ratio by name. 5:4 would share 1152x896 with 4:3 by 0.0015; it takes the next bucket, which tells
# them apart. Portrait names are the same buckets on end.
_LANDSCAPE = {
    "1:1": (1024, 1024),
    "5:4": (1088, 896),
    "4:3": (1152, 896),
    "3:2": (1216, 832),
    "16:9": (1344, 768),
    "21:9": (1536, 640),
}
_TRAINED_SIZE = 1024

ASPECT_RATIOS: tuple[str, ...] = (
    "1:1",
    "16:9",
    "21:9",
    "3:2",
    "2:3",
    "4:5",
    "5:4",
    "3:4",
    "4:3",
    "9:16",
    "9:21",
)

# Eight pixels a latent, and SDXL's UNet halves the latents twice: 32 divides evenly all the way down.
_MULTIPLE = 32


def size_for(aspect_ratio: str, native_size: int) -> tuple[int, int]:
    """Width and height in pixels for an aspect ratio by name, about `native_size` squared in area.

    At 1024 these are SDXL's own buckets. At other sizes each side is a multiple of 32 next to the scaled bucket's, the
    pair nearest to the ratio. Raises `RequestError` for a ratio that is not in `ASPECT_RATIOS`.
    """
    if aspect_ratio not in ASPECT_RATIOS:
        raise RequestError(
            f"aspect_ratio {aspect_ratio!r} is not one of {', '.join(ASPECT_RATIOS)}."
        )
    across, down = aspect_ratio.split(":")
    if int(across) < int(down):
        height, width = size_for(f"{down}:{across}", native_size)
        return width, height

    wide, high = (side * native_size / _TRAINED_SIZE for side in _LANDSCAPE[aspect_ratio])

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        width, height = size
        off_ratio = abs(math.log(width / height * int(down) / int(across)))
        return off_ratio, abs(math.log(width * height / (wide * high)))

    return min(product(_neighbours(wide), _neighbours(high)), key=distance)


def _neighbours(side: float) -> tuple[int, ...]:
    below = math.floor(side / _MULTIPLE) * _MULTIPLE
    above = math.ceil(side / _MULTIPLE) * _MULTIPLE
    return tuple(sorted({max(below, _MULTIPLE), above}))
