"""What a card is given in the place of stock's layers, computed on a CPU: the same numbers, but for their last bits."""

import math

import pytest
import torch
import torch._dynamo
from diffusers import AutoencoderKL
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from diffusion import group_norms, wide_attention
from diffusion.fused import fuse_projections
from diffusion.group_norms import SpreadGroupNorm, spread_group_norms
from diffusion.layout import SideBySideTransformer, lay_channels_side_by_side
from diffusion.prompt_keys import make_keys_once, prepared
from diffusion.regions import decoder_regions, denoiser_regions
from diffusion.upsampling import (
    SubPixelUpsample,
    convolve_after_doubling,
    convolve_before_doubling,
)
from diffusion.wide_attention import WideAttention, attend, widen_attention
from tests.diffusion.support import build


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def vae() -> AutoencoderKL:
    """Small, but as wide in its middle as the real one."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
    ).eval()


class TestGroupNorms:
    @pytest.mark.parametrize("side_by_side", [False, True])
    @pytest.mark.parametrize("at_once", [1, 5000, 2**24])
    @pytest.mark.parametrize("shape", [(1, 64, 32, 32), (2, 64, 24, 40), (1, 32, 7, 1)])
    def test_values_are_those_of_exact_arithmetic(self, monkeypatch, shape, at_once, side_by_side):
        monkeypatch.setattr(group_norms, "MOST_AT_ONCE", at_once)
        # Far from zero, where a sum of squares has no digits left for the variance.
        image = noise(*shape) * 3 + 200
        if side_by_side:
            image = image.to(memory_format=torch.channels_last)
        norm = nn.GroupNorm(32, shape[1], eps=1e-6)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        exact = norm.double()(image.double())
        norm.float()

        assert spread_group_norms(nn.Sequential(norm)) == 1

        found = norm(image)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
        assert found.stride() == image.stride()

    def test_halves_are_rounded_once(self):
        image = noise(1, 64, 16, 16).bfloat16()
        norm = nn.GroupNorm(8, 64).bfloat16()
        exact = norm.double()(image.double()).bfloat16()
        norm.bfloat16()
        spread_group_norms(nn.Sequential(norm))

        assert torch.equal(norm(image), exact)

    def test_weights_stay_where_they_are_and_what_is_not_an_image_is_stocks(self):
        norm = nn.GroupNorm(4, 32, affine=False)
        names = [name for name, _ in nn.GroupNorm(4, 32).named_parameters()]
        spread_group_norms(nn.Sequential(norm))
        rows = noise(1, 32, 9)

        torch.testing.assert_close(norm(rows), nn.GroupNorm(4, 32, affine=False)(rows))
        norm(noise(1, 32, 4, 4))
        affine = nn.GroupNorm(4, 32)
        spread_group_norms(nn.Sequential(affine))
        assert [name for name, _ in affine.named_parameters()] == names
        assert spread_group_norms(nn.Sequential(affine)) == 0  # already

    def test_a_device_that_cannot_leaves_stocks(self, monkeypatch):
        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("result type Float can't be cast to BFloat16")

        norms = nn.Sequential(nn.GroupNorm(4, 32), nn.GroupNorm(4, 32))
        monkeypatch.setattr(torch, "addcmul", refuse)

        with pytest.raises(RuntimeError, match="cast"):
            spread_group_norms(norms)

        assert [type(norm) for norm in norms] == [nn.GroupNorm, nn.GroupNorm]

    @pytest.mark.slow
    @pytest.mark.system_program("g++")
    @pytest.mark.timeout(300)
    def test_values_are_the_same_compiled(self):
        image = (noise(1, 64, 16, 24) * 3 + 50).to(memory_format=torch.channels_last)
        norm = nn.GroupNorm(32, 64)
        exact = norm.double()(image.double())
        norm.float()
        spread_group_norms(nn.Sequential(norm))

        found = torch.compile(norm, fullgraph=True, dynamic=False)(image)

        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


class TestWideAttention:
    @pytest.mark.parametrize("most_scores", [1, 1000, 2**25])
    def test_rows_attend_as_stocks_do(self, monkeypatch, most_scores):
        monkeypatch.setattr(wide_attention, "MOST_SCORES", most_scores)
        query, key, value = (noise(2, 50, 300, seed=seed) for seed in range(3))

        found = attend(query, key, value)

        expected = nn.functional.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_scores_of_halves_are_not_rounded(self):
        query, key, value = (noise(1, 64, 512, seed=seed).bfloat16() for seed in range(3))

        found = attend(query * 3, key, value)

        exact = nn.functional.scaled_dot_product_attention(
            *(one.double() for one in (query * 3, key, value))
        )
        error = (found.double() - exact).abs().max() / exact.abs().max()
        assert error < 2**-7

    def test_a_decoder_gives_the_same_pictures(self, vae, monkeypatch):
        monkeypatch.setattr(wide_attention, "MOST_SCORES", 384 * 100)
        latents = noise(1, 4, 16, 24)
        expected = vae.decode(latents, return_dict=False)[0]

        assert widen_attention(vae) == 2  # the encoder's too
        assert spread_group_norms(vae) > 20
        lay_channels_side_by_side(vae)
        assert convolve_before_doubling(vae) == 2

        found = vae.decode(latents, return_dict=False)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert widen_attention(vae) == 0

    def test_a_compiler_can_read_a_decoder_whole(self, vae, caplog):
        latents = noise(1, 4, 8, 8)
        expected = vae.decode(latents, return_dict=False)[0]
        widen_attention(vae)
        spread_group_norms(vae)
        lay_channels_side_by_side(vae)
        convolve_before_doubling(vae)
        (decoder,) = decoder_regions(vae)
        decoder.compile({"fullgraph": True, "dynamic": False, "backend": "eager"})
        decoder.run_learning()

        found = vae.decode(latents, return_dict=False)[0]

        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        # Stock warns of arguments that a processor does not name.
        assert [one for one in caplog.records if one.levelname == "WARNING"] == []

    def test_attention_that_fast_kernels_take_stays_stocks(self, model):
        pipeline = build(model)

        assert widen_attention(pipeline.vae) == 0
        assert widen_attention(pipeline.unet) == 0

    def test_attention_of_another_kind_stays_as_it_is(self, vae):
        (attention,) = vae.decoder.mid_block.attentions
        attention.set_processor(object())

        assert widen_attention(vae.decoder) == 0
        assert not isinstance(attention.processor, WideAttention)


class TestUpsampling:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("side_by_side", [False, True])
    @pytest.mark.parametrize("shape", [(1, 16, 5, 7), (2, 16, 1, 1), (1, 16, 8, 3)])
    def test_pixels_are_those_of_doubling_first(self, shape, side_by_side, bias):
        part = Upsample2D(16, use_conv=True, out_channels=24, bias=bias)
        image = noise(*shape)
        if side_by_side:
            part.to(memory_format=torch.channels_last)
            image = image.to(memory_format=torch.channels_last)
        expected, names = part(image), list(part.state_dict())

        assert convolve_before_doubling(nn.Sequential(part)) == 1

        found = part(image)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert list(part.state_dict()) == names
        if side_by_side:
            assert found.is_contiguous(memory_format=torch.channels_last)

    def test_kernels_in_halves_are_rounded_once(self):
        part = Upsample2D(16, use_conv=True).bfloat16()
        doubled, exact = part.conv.weight.float(), Upsample2D(16, use_conv=True)
        exact.conv.weight.data = doubled
        convolve_before_doubling(nn.Sequential(part))
        convolve_before_doubling(nn.Sequential(exact))

        assert part.kernels.dtype == part.biases.dtype == torch.bfloat16
        assert torch.equal(part.kernels, exact.kernels.bfloat16())

    def test_new_weights_are_taken_up_where_the_old_ones_were(self):
        part = Upsample2D(8, use_conv=True)
        convolve_before_doubling(nn.Sequential(part))
        places = part.kernels.data_ptr(), part.biases.data_ptr()
        other, image = Upsample2D(8, use_conv=True), noise(1, 8, 4, 6)
        part.load_state_dict(other.state_dict())

        assert convolve_before_doubling(nn.Sequential(part)) == 1

        torch.testing.assert_close(part(image), other(image), rtol=0, atol=1e-5)
        assert (part.kernels.data_ptr(), part.biases.data_ptr()) == places

    def test_another_size_than_twice_is_stocks(self):
        part, image = Upsample2D(8, use_conv=True), noise(1, 8, 4, 6)
        expected = part(image, output_size=(7, 11))

        convolve_before_doubling(nn.Sequential(part))

        assert torch.equal(part(image, output_size=(7, 11)), expected)

    def test_it_is_stocks_again(self):
        part, image = Upsample2D(8, use_conv=True), noise(1, 8, 4, 6)
        expected = part(image)
        convolve_before_doubling(nn.Sequential(part))

        convolve_after_doubling(nn.Sequential(part))

        assert type(part) is Upsample2D
        assert torch.equal(part(image), expected)
        assert "kernels" not in vars(part)

    @pytest.mark.parametrize(
        "part",
        [
            Upsample2D(8, use_conv=False),
            Upsample2D(8, use_conv_transpose=True),
            Upsample2D(8, use_conv=True, kernel_size=5, padding=2),
            Upsample2D(8, use_conv=True, norm_type="ln_norm", eps=1e-6, elementwise_affine=True),
            Upsample2D(8, use_conv=True, interpolate=False),
        ],
    )
    def test_what_is_not_stocks_plain_one_stays(self, part):
        assert convolve_before_doubling(nn.Sequential(part)) == 0
        assert type(part) is Upsample2D

    @pytest.mark.slow
    @pytest.mark.system_program("g++")
    @pytest.mark.timeout(300)
    def test_pixels_are_the_same_compiled(self):
        part, image = Upsample2D(16, use_conv=True), noise(1, 16, 6, 9)
        expected = part(image)
        convolve_before_doubling(nn.Sequential(part))

        for memory_format in (torch.contiguous_format, torch.channels_last):
            one = image.contiguous(memory_format=memory_format)
            found = torch.compile(part, fullgraph=True, dynamic=False)(one)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class TestLayout:
    @pytest.mark.parametrize("linear", [False, True])
    def test_a_transformer_in_an_image_gives_the_same_without_its_copy(self, linear):
        torch.manual_seed(0)
        part = Transformer2DModel(
            2, 16, in_channels=32, cross_attention_dim=24, use_linear_projection=linear
        ).eval()
        image, prompt = noise(2, 32, 8, 12), noise(2, 5, 24)
        expected = part(image, prompt, return_dict=False)[0]

        lay_channels_side_by_side(nn.Sequential(part))

        found = part(image.to(memory_format=torch.channels_last), prompt, return_dict=False)[0]
        assert type(part) is SideBySideTransformer
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_unet_keeps_its_numbers(self, model, compiled):
        pipeline = build(model)
        unet = pipeline.unet
        arguments = {
            "timestep": torch.tensor(749.0),
            "encoder_hidden_states": noise(1, 77, unet.config.cross_attention_dim),
            "added_cond_kwargs": {
                "text_embeds": noise(1, pipeline.text_encoder_2.config.projection_dim),
                "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
            },
            "return_dict": False,
        }
        latents = noise(1, 4, 8, 8)
        expected = unet(latents, **arguments)[0]

        make_keys_once(unet, joined=True)
        lay_channels_side_by_side(unet)
        spread = spread_group_norms(unet)
        fuse_projections(unet)
        assert convolve_before_doubling(unet) > 0
        prompt = prepared(unet, arguments["encoder_hidden_states"])
        regions = list(denoiser_regions(unet, on_card=True)) if compiled else []
        for region in regions:
            region.compile({"fullgraph": True, "dynamic": False, "backend": "eager"})
            region.run_learning()
        kinds = [type(region._module) for region in regions]
        assert (SubPixelUpsample in kinds) is compiled

        with torch._dynamo.config.patch(recompile_limit=128):
            found = unet(latents, **arguments | {"encoder_hidden_states": prompt})[0]
        assert spread == sum(isinstance(one, SpreadGroupNorm) for one in unet.modules())
        assert math.isclose(float((found - expected).abs().max()), 0, abs_tol=1e-4)
