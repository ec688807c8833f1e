"""The real repos' exact file names and layout, at small size: real components where a pipeline reads them, and a few
bytes for everything that must never be downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

# Everything in stabilityai/stable-diffusion-xl-base-1.0 beside what is needed, and a pickle for good measure.
BASE_DECOYS = (
    *("01.png", "LICENSE.md", "comparison.png", "pipeline.png", "sd_xl_base_1.0.safetensors"),
    *("sd_xl_base_1.0_0.9vae.safetensors", "sd_xl_offset_example-lora_1.0.safetensors"),
    *(
        "text_encoder/flax_model.msgpack",
        "text_encoder/model.onnx",
        "text_encoder/openvino_model.bin",
    ),
    *(
        "text_encoder/openvino_model.xml",
        "text_encoder_2/flax_model.msgpack",
        "text_encoder_2/model.onnx",
    ),
    *("text_encoder_2/model.onnx_data", "text_encoder_2/openvino_model.bin"),
    *("text_encoder_2/openvino_model.xml", "unet/diffusion_flax_model.msgpack", "unet/model.onnx"),
    *("unet/model.onnx_data", "unet/openvino_model.bin", "unet/openvino_model.xml"),
    *(
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_flax_model.msgpack",
        "vae_1_0/config.json",
    ),
    *(
        "vae_1_0/diffusion_pytorch_model.fp16.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    ),
    *("vae_decoder/config.json", "vae_decoder/model.onnx", "vae_decoder/openvino_model.bin"),
    *("vae_encoder/config.json", "vae_encoder/model.onnx", "vae_encoder/openvino_model.bin"),
)
LIGHTNING_DECOYS = (
    *("sdxl_lightning_1step_unet_x0.safetensors", "sdxl_lightning_1step_x0.safetensors"),
    *("sdxl_lightning_2step.safetensors", "sdxl_lightning_2step_lora.safetensors"),
    *("sdxl_lightning_2step_unet.safetensors", "sdxl_lightning_4step.safetensors"),
    *("sdxl_lightning_4step_lora.safetensors", "sdxl_lightning_8step.safetensors"),
    *("sdxl_lightning_8step_lora.safetensors", "sdxl_lightning_8step_unet.safetensors"),
    *("sdxl_lightning_samples.jpg", "comfyui/sdxl_lightning_workflow_full.json"),
)
VAE_DECOYS = (
    *("diffusion_pytorch_model.bin", "sdxl.vae.safetensors", "sdxl_vae.safetensors"),
    *("images/activation-magnitudes.jpg", "images/fix-fp16.png"),
)
WEIGHTS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


def write_base(folder: Path, half: Path, full: Path) -> Path:
    """SDXL base: fp16 and fp32 copies side by side, and every other program's files."""
    shutil.copytree(half, folder)
    for component, stem in WEIGHTS.items():
        plain = folder / component / f"{stem}.safetensors"
        plain.rename(folder / component / f"{stem}.fp16.safetensors")
        shutil.copyfile(full / component / f"{stem}.safetensors", plain)
    write_decoys(folder, BASE_DECOYS)
    write_card(folder, "openrail++")
    return folder


def write_lightning(folder: Path, half: Path) -> Path:
    """ByteDance/SDXL-Lightning: no diffusers folder, but checkpoints of every kind side by side."""
    folder.mkdir()
    shutil.copyfile(
        half / "unet" / "diffusion_pytorch_model.safetensors",
        folder / "sdxl_lightning_4step_unet.safetensors",
    )
    write_decoys(folder, LIGHTNING_DECOYS)
    write_card(folder, "openrail++")
    return folder


def write_vae(folder: Path, full: Path) -> Path:
    """madebyollin/sdxl-vae-fp16-fix: a VAE at the repo's root, in single precision."""
    folder.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copyfile(full / "vae" / name, folder / name)
    write_decoys(folder, VAE_DECOYS)
    write_card(folder, "mit")
    return folder


def write_finetune(folder: Path, full: Path) -> Path:
    """A finetune as people publish them: one plain set of weights, the single-file checkpoint beside it."""
    shutil.copytree(full, folder)
    write_decoys(folder, ("finetune.safetensors", "sample.png", "unet/diffusion_pytorch_model.bin"))
    write_card(folder, "other", "fair-ai-public-license-1.0-sd")
    return folder


def write_decoys(folder: Path, names: tuple[str, ...]) -> None:
    """Files with contents of their own, so that none is mistaken for another by its digest."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"not needed: {name}".encode())


def write_card(folder: Path, licence: str, licence_name: str | None = None) -> None:
    name = f"license_name: {licence_name}\n" if licence_name else ""
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n{name}---\n# A model\n")


def split(file: Path, names: list[str]) -> None:
    """Replace a safetensors file by several, each with a part of its tensors."""
    tensors = load_file(file)
    keys = sorted(tensors)
    share = -(-len(keys) // len(names))
    file.unlink()
    for number, name in enumerate(names):
        part = {key: tensors[key] for key in keys[number * share : (number + 1) * share]}
        save_file(part, file.parent / name, metadata={"format": "pt"})
