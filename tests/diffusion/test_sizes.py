"""Aspect ratios: SDXL's own buckets at 1024, and their like at other sizes."""

import math

import pytest

from diffusion.errors import RequestError
from diffusion.sizes import ASPECT_RATIOS, size_for

# Height, width of every bucket in appendix I of https://arxiv.org/abs/2307.01952, landscape half.
TRAINED = {
    *((512, width) for width in (1856, 1920, 1984, 2048)),
    *((576, width) for width in (1664, 1728, 1792)),
    *((640, width) for width in (1536, 1600)),
    *((704, width) for width in (1344, 1408, 1472)),
    *((768, width) for width in (1280, 1344)),
    *((832, width) for width in (1152, 1216)),
    *((896, width) for width in (1088, 1152)),
    *((960, width) for width in (1024, 1088)),
    (1024, 1024),
}


def error(size: tuple[int, int], ratio: str) -> float:
    across, down = map(int, ratio.split(":"))
    return abs(size[0] / size[1] - across / down)


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_at_1024_every_ratio_is_a_size_sdxl_was_trained_on(ratio):
    size = size_for(ratio, 1024)

    assert (min(size), max(size)) in TRAINED
    landscape = (max(size), min(size))
    across, down = sorted(map(int, ratio.split(":")), reverse=True)
    nearest = min(error((width, height), f"{across}:{down}") for height, width in TRAINED)
    # 5:4 gives way by this much, so as not to share a bucket with 4:3.
    assert error(landscape, f"{across}:{down}") <= nearest + (0.0015 if across == 5 else 0)


def test_ratios_of_different_names_have_different_sizes_at_1024():
    assert len({size_for(ratio, 1024) for ratio in ASPECT_RATIOS}) == len(ASPECT_RATIOS)


@pytest.mark.parametrize("native_size", [256, 512, 768, 1024, 1536])
@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_other_native_sizes_keep_ratio_and_area_and_divide_evenly(ratio, native_size):
    width, height = size_for(ratio, native_size)
    across, down = map(int, ratio.split(":"))

    assert width % 32 == 0
    assert height % 32 == 0
    assert abs(math.log(width / height * down / across)) < 0.06
    assert 0.8 < width * height / native_size**2 < 1.1


@pytest.mark.parametrize("native_size", [256, 768, 1024])
def test_portrait_is_landscape_on_end(native_size):
    for portrait, landscape in (("2:3", "3:2"), ("9:16", "16:9"), ("9:21", "21:9"), ("4:5", "5:4")):
        assert size_for(portrait, native_size) == size_for(landscape, native_size)[::-1]


@pytest.mark.parametrize("ratio", ["", "7:5", "16:9 ", "1:0", "wide"])
def test_an_unknown_ratio_is_refused_with_those_there_are(ratio):
    with pytest.raises(RequestError, match="21:9"):
        size_for(ratio, 1024)
