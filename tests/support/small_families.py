"""Small real models of the families that demo's own is not: stock classes, random weights, saved by diffusers.

The pixels mean nothing. What matters is that every class is the real one and every file has its real name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from demo.small_tokenizer import END, START, vocabulary, write_tokenizer
from diffusion.families import ARCHITECTURES


def write_small_sd1(folder: Path, *, seed: int = 0) -> Path:
    """Stable Diffusion 1.5's arrangement: its levels and layers, narrow, and PNDM; no safety checker."""
    torch.manual_seed(seed)
    unet = _full_unet(attention_head_dim=2, cross_attention_dim=32)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    return _write_stable_diffusion(folder, unet, _clip(32), scheduler)


def write_small_sd2(folder: Path, *, seed: int = 0) -> Path:
    """Stable Diffusion 2.1's arrangement: its levels and layers, narrow, DDIM and v-prediction.

    46 MB: what it attends to is 1024 wide, as the real one's is, for this is what it is recognized by.
    """
    torch.manual_seed(seed)
    unet = _full_unet(
        attention_head_dim=(2, 4, 4, 4), cross_attention_dim=1024, use_linear_projection=True
    )
    text = _clip(1024, num_hidden_layers=2, intermediate_size=64, hidden_act="gelu")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return _write_stable_diffusion(folder, unet, text, scheduler)


def write_small_sd_turbo(folder: Path, *, seed: int = 0) -> Path:
    """SD-Turbo's arrangement: Stable Diffusion 2.1's parts, Euler with trailing timesteps, no safety checker."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        cross_attention_dim=32,
        use_linear_projection=True,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    return _write_stable_diffusion(folder, unet, _clip(32), scheduler)


def write_small_sd3(
    folder: Path,
    *,
    seed: int = 0,
    with_t5: bool = True,
    is_3_5_medium: bool = False,
    is_3_5_large: bool = False,
) -> Path:
    """Stable Diffusion 3's arrangement, or one of 3.5's, which normalizes queries and keys.

    3.5 Medium has blocks that attend twice; 3.5 Large has 38 blocks, and they are what it is recognized by.
    """
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        num_layers=38 if is_3_5_large else 2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=32,
        pooled_projection_dim=96,
        pos_embed_max_size=12,
        qk_norm="rms_norm" if is_3_5_medium or is_3_5_large else None,
        dual_attention_layers=(0,) if is_3_5_medium else (),
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=_without_projection(CLIPTextModelWithProjection(_clip(32)).eval()),
        tokenizer=_clip_tokenizer(folder),
        text_encoder_2=CLIPTextModelWithProjection(_clip(64)).eval(),
        tokenizer_2=_clip_tokenizer(folder),
        text_encoder_3=_t5() if with_t5 else None,
        tokenizer_3=_t5_tokenizer() if with_t5 else None,
    )
    pipeline.save_pretrained(folder)
    return folder


def stock_pipeline(folder: Path, **options: Any) -> Any:
    """What anybody gets from diffusers itself, told as it has to be which parts the folder does without."""
    optional = ARCHITECTURES["StableDiffusion3Pipeline"].optional
    absent = {name: None for name in optional if not (folder / name).exists()}
    is_sd3 = (folder / "transformer").exists()
    pipeline: Any = DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, **(absent if is_sd3 else {}), **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _write_stable_diffusion(
    folder: Path, unet: UNet2DConditionModel, text: CLIPTextConfig, scheduler: Any
) -> Path:
    pipeline = StableDiffusionPipeline(
        vae=_vae(latent_channels=4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=_clip_tokenizer(folder),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _full_unet(**config: Any) -> UNet2DConditionModel:
    """Four levels of two layers, as all of Stable Diffusion 1 and 2 has."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        **config,
    )


def _clip(width: int, **config: Any) -> CLIPTextConfig:
    tokens, _ = vocabulary()
    small = {"intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPTextConfig(
        vocab_size=len(tokens),
        bos_token_id=tokens[START],
        eos_token_id=tokens[END],
        pad_token_id=tokens[END],
        hidden_size=width,
        projection_dim=width,
        **{**small, **config},
    )


def _without_projection(model: CLIPTextModelWithProjection) -> CLIPTextModelWithProjection:
    """As Stable Diffusion 3 has its smaller CLIP: the class has a projection, and it changes nothing."""
    torch.nn.init.eye_(model.text_projection.weight)
    return model


def _clip_tokenizer(folder: Path) -> Any:
    write_tokenizer(folder / "tokenizer", pad_token=END)
    return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(_t5_vocabulary()),
        d_model=128,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def _t5_vocabulary() -> list[tuple[str, float]]:
    """Every letter, with and without the mark of a word's beginning, and a few whole words."""
    words = ["▁a", "▁the", "▁fox", "▁golden", "▁night", "▁castle"]
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["▁", *words, *letters, *(f"▁{letter}" for letter in letters)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return special + [(piece, -float(rank)) for rank, piece in enumerate(pieces, start=1)]


def _t5_tokenizer() -> Any:
    return T5Tokenizer(vocab=_t5_vocabulary(), extra_ids=0)


def _vae(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),  # four levels: a scale factor of 8
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
        **config,
    )
