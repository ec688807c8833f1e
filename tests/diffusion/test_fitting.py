"""Which layout a card of a given size gets, and that a model laid out so makes the same images."""

import logging
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion.device import has_room_to_land
from diffusion.fitting import GIB, Fit, Needs, choose_fit, decode_in_tiles, needs_of, visiting
from diffusion.host_memory import pin
from diffusion.recipe import SDXL
from tests.diffusion.support import build, read_tensors
from tests.support.small_families import write_small_sd1, write_small_sd3


@pytest.fixture(scope="module")
def sdxl() -> dict[str, torch.nn.Module]:
    """SDXL at its real dimensions, without memory: what its repo's configs say."""
    with init_empty_weights():
        return {
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                    projection_dim=768,
                )
            ),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=32,
                    num_attention_heads=20,
                    projection_dim=1280,
                )
            ),
            "unet": UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=(
                    "DownBlock2D",
                    "CrossAttnDownBlock2D",
                    "CrossAttnDownBlock2D",
                ),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=[1, 2, 10],
                attention_head_dim=[5, 10, 20],
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                sample_size=1024,
            ),
        }


def sdxl_needs(modules, *, vae_bytes: int = 2) -> Needs:
    item_bytes = dict.fromkeys(modules, 2) | {"vae": vae_bytes}
    return needs_of(modules, item_bytes, "unet", 1024, guided=False)


def test_the_count_of_sdxl_is_what_its_files_weigh(sdxl):
    needs = sdxl_needs(sdxl)

    # In half precision, from its repo: UNet 5.14 GB and VAE 0.17, text encoders 0.25 and 1.39.
    assert needs.others / 1e9 == pytest.approx(5.14 + 0.17, abs=0.02)
    assert needs.text / 1e9 == pytest.approx(0.25 + 1.39, abs=0.02)


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of what was made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)
                self.bytes = max(self.bytes, sum(self._alive.values()))
        return made


def test_the_estimates_are_above_what_is_counted_and_not_far(sdxl):
    # On the meta device, where a pass costs nothing and has all its tensors.
    needs = sdxl_needs(sdxl)
    for module in sdxl.values():
        module.half().requires_grad_(False)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    with torch.inference_mode(), Peak() as decoding:
        sdxl["vae"].decode(empty(1, 4, 128, 128))
    with torch.inference_mode(), Peak() as denoising:
        sdxl["unet"](
            empty(1, 4, 128, 128),
            empty(),
            encoder_hidden_states=empty(1, 77, 2048),
            added_cond_kwargs={"text_embeds": empty(1, 1280), "time_ids": empty(1, 6)},
        )

    assert decoding.bytes <= needs.decoding <= 2 * decoding.bytes
    assert denoising.bytes <= needs.denoising <= 2 * denoising.bytes


@pytest.mark.parametrize(
    ("card_gib", "vae_bytes", "expected"),
    [
        (80, 2, Fit()),
        (23, 4, Fit()),
        (15.5, 2, Fit()),
        (11.2, 2, Fit()),
        (11.2, 4, Fit(tiles=True)),
        (7.4, 2, Fit(tiles=True, text_on_host=True)),
        (7.4, 4, Fit(tiles=True, text_on_host=True)),
    ],
)
def test_every_card_gets_the_fastest_layout_that_fits(sdxl, card_gib, vae_bytes, expected):
    assert choose_fit(int(card_gib * GIB), sdxl_needs(sdxl, vae_bytes=vae_bytes)) == expected


def test_a_smaller_layout_is_said_in_the_log(sdxl, caplog):
    with caplog.at_level(logging.INFO, logger="diffusion"):
        choose_fit(int(80 * GIB), sdxl_needs(sdxl))
        choose_fit(int(7.4 * GIB), sdxl_needs(sdxl))

    (record,) = caplog.records
    assert record.getMessage() == (
        "7.4 GiB of the card are free, and this model would take about 9.1: the text encoders stay in host memory and "
        "the decoder works in tiles."
    )


def test_a_card_that_is_too_small_gets_the_smallest_layout_and_a_warning(sdxl, caplog):
    assert choose_fit(int(4 * GIB), sdxl_needs(sdxl)) == Fit(tiles=True, text_on_host=True)

    assert "large images may fail" in caplog.text


def test_text_encoders_lie_in_host_memory_also_where_tensors_arrive_elsewhere(model):
    # "meta" stands in for the card. Tensors of the text encoders can only come from where their values are.
    tensors = (
        replace(tensor, data=torch.frombuffer(tensor.data, dtype=torch.float32).view(tensor.shape))
        for tensor in read_tensors(model)
    )

    pipeline = build(model, tensors=tensors, device="meta", fit=Fit(text_on_host=True))

    places = {
        name: {parameter.device.type for parameter in getattr(pipeline, name).parameters()}
        for name in SDXL.modules
    }
    assert places == {
        "text_encoder": {"cpu"},
        "text_encoder_2": {"cpu"},
        "unet": {"meta"},
        "vae": {"meta"},
    }


def test_modules_visit_a_device_and_come_back_to_the_memory_they_left(monkeypatch):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).half()
    places = [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]

    class Elsewhere:
        """A device of another name, so that tensors are moved; torch has but one in a machine without a card."""

    visited = []
    original = torch.Tensor.to

    def to(tensor: torch.Tensor, device: object, **_: object) -> torch.Tensor:
        visited.append(tensor.data_ptr())
        return original(tensor, torch.device("cpu"), copy=True)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with visiting([module], Elsewhere()):
        during = [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]

    assert visited == places
    assert not set(during) & set(places)
    after = [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]
    assert after == places


def test_a_decoder_in_tiles_begins_where_one_tile_ends(model):
    plain, tiled = build(model), build(model, fit=Fit(tiles=True))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 96, 96, generator=generator)  # 768 pixels: two tiles a side

    shapes = []
    tiled.vae.decoder.register_forward_hook(
        lambda _, inputs, __: shapes.append(inputs[0].shape[2:])
    )
    with torch.inference_mode():
        small = [vae.decode(latents[..., :64, :64])[0] for vae in (plain.vae, tiled.vae)]
        large = [vae.decode(latents)[0] for vae in (plain.vae, tiled.vae)]

    assert torch.equal(*small)
    assert large[0].shape == large[1].shape
    assert len(shapes) == 1 + 4
    assert max(max(shape) for shape in shapes) == 64
    decode_in_tiles(plain.vae)
    with torch.inference_mode():
        assert torch.equal(plain.vae.decode(latents)[0], large[1])


@pytest.mark.parametrize("write", [write_small_sd1, write_small_sd3])
def test_tiles_of_every_family_are_of_512_pixels(write, tmp_path):
    vae = AutoencoderKL.from_pretrained(write(tmp_path), subfolder="vae").eval()
    latents = torch.randn(1, vae.config.latent_channels, 80, 72)
    shapes = []
    vae.decoder.register_forward_hook(lambda _, inputs, made: shapes.append(made.shape[2:]))

    with torch.inference_mode():
        whole = vae.decode(latents)[0]
        decode_in_tiles(vae)
        tiled = vae.decode(latents)[0]

    assert tiled.shape == whole.shape == (1, 3, 640, 576)
    assert shapes[1] == (512, 512)


def test_a_vae_of_few_levels_has_tiles_of_as_many_pixels():
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        layers_per_block=1,
    ).eval()
    decode_in_tiles(vae)
    shapes = []
    vae.decoder.register_forward_hook(lambda _, inputs, made: shapes.append(made.shape[2:]))

    with torch.inference_mode():
        made = vae.decode(torch.randn(1, 4, 32, 288))[0]

    assert made.shape == (1, 3, 64, 576)
    assert shapes == [(64, 512), (64, 192)]


def test_rounded_copies_count_where_8_bit_floats_are_wanted(sdxl):
    item_bytes = dict.fromkeys(sdxl, 2)
    plain, rounded = (
        needs_of(sdxl, item_bytes, "unet", 1024, guided=False, float8=float8)
        for float8 in (False, True)
    )

    # A byte for each weight of the feed-forward layers, and of query, key and value of attention to the image itself.
    assert (rounded.others - plain.others) / 1e9 == pytest.approx(1.54, abs=0.01)
    assert rounded.text == plain.text


def test_what_is_no_parameter_and_comes_from_a_file_counts_too(tmp_path):
    transformer = SD3Transformer2DModel.from_pretrained(
        write_small_sd3(tmp_path), subfolder="transformer"
    )
    vae = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")

    needs = needs_of(
        {"transformer": transformer, "vae": vae},
        {"transformer": 2, "vae": 2},
        "transformer",
        64,
        guided=True,
    )

    # Of SD 3.5 Medium the embedded positions are 0.45 GB.
    states = (*transformer.state_dict().values(), *vae.state_dict().values())
    assert "pos_embed.pos_embed" in transformer.state_dict()
    assert needs.others == 2 * sum(tensor.numel() for tensor in states)


@pytest.mark.parametrize(("free", "room"), [(8 * GIB, False), (9 * GIB, True), (80 * GIB, True)])
def test_weights_land_on_a_card_that_has_room_for_all_of_them_and_some_more(free, room):
    assert has_room_to_land(free, int(6.94e9)) is room


def test_a_module_that_stays_on_the_host_is_pinned_in_one_piece_and_keeps_its_numbers(caplog):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3).half())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    pin(module)

    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
        assert tensor.data_ptr() % 64 == 0
    assert len({one.untyped_storage().data_ptr() for one in module.state_dict().values()}) == 1
    if not torch.cuda.is_available():
        assert "cannot be pinned" in caplog.text
