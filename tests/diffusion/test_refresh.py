"""A new version takes over: the images of a fresh engine in the memory of the old one, or nothing at all."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from mmap import mmap
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import refresh
from diffusion.components import build_module
from diffusion.errors import ModelError, RequestError
from diffusion.fitting import Fit
from diffusion.recipe import SDXL, SchedulerRecipe
from tests.diffusion.refreshing import (
    REQUEST,
    assert_same_images,
    assert_same_tensors,
    images,
    places,
    serve,
    staged,
)
from tests.diffusion.support import (
    GUIDED,
    LIGHTNING,
    Tensor,
    build,
    edited,
    read_configs,
    read_tensors,
    renamed,
)


def drawn_for(configs: dict[str, bytes], part: str) -> Iterator[Tensor]:
    """Tensors that fit `part` of the configs, and are the same at every call."""
    generator = torch.Generator().manual_seed(7)
    for name, meta in build_module(part, SDXL.modules[part], configs).state_dict().items():
        drawn = torch.randn(meta.shape, generator=generator) * 0.05
        data = bytearray(drawn.numpy().tobytes())
        yield Tensor(f"{part}/model.safetensors", name, "F32", tuple(meta.shape), data)


# What it is afterwards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_those_of_an_engine_built_from_the_new_version(model, update, dtype):
    engine = serve(model, dtype=dtype)
    fresh = serve(update, dtype=dtype)
    old_images = images(engine)

    assert engine.replace(staged(update)) > 0

    assert engine.version == "new"
    assert_same_tensors(engine, fresh)
    assert_same_images(engine, fresh)
    assert not np.array_equal(images(engine)[0], old_images[0])


def test_files_in_half_precision_are_cast_as_a_fresh_engine_casts_them(model, half_model):
    engine = serve(model)

    engine.replace(staged(half_model))

    assert_same_tensors(engine, serve(half_model))


def test_parameters_stay_where_they_are(model, update):
    engine = serve(model)
    before, modules = places(engine), [getattr(engine._pipeline, part) for part in SDXL.modules]

    engine.replace(staged(update))

    assert places(engine) == before
    assert [getattr(engine._pipeline, part) for part in SDXL.modules] == modules


def test_one_version_after_another_takes_over(model, update):
    engine = serve(model)
    before = places(engine)

    engine.replace(staged(update))
    engine.replace(staged(model))

    assert places(engine) == before
    assert_same_images(engine, serve(model))


def test_names_of_older_files_are_understood(model, update):
    tensors = list(renamed(read_tensors(update), "text_encoder", "text_model.", ""))
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
        tensors = list(renamed(tensors, "vae", f".{new}.", f".{old}."))
    engine = serve(model)

    engine.replace(staged(update, tensors=tensors))

    assert_same_tensors(engine, serve(update))


def test_what_a_config_notes_about_its_file_does_not_make_it_another(model, update):
    configs = edited(read_configs(update), "unet/config.json", _diffusers_version="0.19.0")
    configs = edited(
        configs, "text_encoder/config.json", dtype="float16", transformers_version="4.32"
    )
    engine = serve(model)
    before = places(engine)

    engine.replace(staged(update, configs=configs))

    assert places(engine) == before


def test_scheduler_steps_and_guidance_are_the_new_recipe_s(model, update):
    recipe = GUIDED.model_copy(
        update={"scheduler": SchedulerRecipe(class_name="DPMSolverMultistepScheduler")}
    )
    engine = serve(model)
    with pytest.raises(RequestError, match="1 or 2 or 4"):
        engine.generate(replace(REQUEST, steps=3))

    engine.replace(staged(update, recipe))

    assert engine.recipe == recipe
    assert_same_images(engine, serve(update, recipe), steps=3, negative_prompt="red")
    (made,) = engine.generate(replace(REQUEST, steps=None))
    assert (made.steps, made.guidance_scale) == (GUIDED.default_steps, GUIDED.guidance_scale)


def test_tokenizers_and_the_treatment_of_empty_prompts_are_the_new_version_s(model, update):
    configs = read_configs(update)
    for name in ("tokenizer", "tokenizer_2"):
        configs = edited(configs, f"{name}/tokenizer_config.json", model_max_length=9)
    configs = edited(configs, "model_index.json", force_zeros_for_empty_prompt=False)
    engine = serve(model, GUIDED)

    engine.replace(staged(update, GUIDED, configs=configs))

    assert engine._pipeline.tokenizer.model_max_length == 9
    assert_same_images(engine, serve(update, GUIDED, configs=configs), prompt="a long red " * 9)


def test_a_part_whose_config_changed_is_exchanged_and_the_others_stay(model, update):
    configs = edited(read_configs(update), "vae/config.json", block_out_channels=[16, 32, 32, 64])

    def tensors() -> Iterator[Tensor]:
        yield from (tensor for tensor in read_tensors(update) if tensor.path[:4] != "vae/")
        yield from drawn_for(configs, "vae")

    engine, fresh = serve(model), serve(update, configs=configs, tensors=tensors())
    old_vae = weakref.ref(engine._pipeline.vae)
    before = {part: places(engine, part) for part in SDXL.modules}

    engine.replace(staged(update, configs=configs, tensors=tensors()))

    assert_same_tensors(engine, fresh)
    assert_same_images(engine, fresh)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        assert places(engine, part) == before[part]
    gc.collect()
    assert old_vae() is None


def test_a_config_that_changes_no_shape_counts_too(model, update):
    configs = edited(read_configs(update), "vae/config.json", scaling_factor=0.2)
    engine = serve(model)

    engine.replace(staged(update, configs=configs))

    assert_same_images(engine, serve(update, configs=configs))


def test_a_vae_that_is_exchanged_decodes_in_tiles_where_the_one_before_did(model, update):
    configs = edited(read_configs(update), "vae/config.json", scaling_factor=0.2)
    tiled, whole = serve(model, fit=Fit(tiles=True)), serve(model)

    for engine in (tiled, whole):
        engine.replace(staged(update, configs=configs))

    expected = build(update, configs=configs, fit=Fit(tiles=True)).vae
    vae = tiled._pipeline.vae
    assert vae.use_tiling
    assert vae.tile_sample_min_size == expected.tile_sample_min_size
    assert vae.tile_latent_min_size == expected.tile_latent_min_size
    assert not whole._pipeline.vae.use_tiling


def test_a_vae_that_must_stay_in_float32_comes_into_a_float16_engine(model, update):
    configs = edited(read_configs(update), "vae/config.json", force_upcast=True)
    engine = serve(model, dtype=torch.float16)
    assert engine._pipeline.vae.dtype == torch.float16

    engine.replace(staged(update, configs=configs))

    assert engine._pipeline.vae.dtype == torch.float32
    assert_same_tensors(engine, serve(update, configs=configs, dtype=torch.float16))


def test_a_recipe_that_newly_says_that_its_vae_overflows_brings_it_in_float32(model, update):
    recipe = LIGHTNING.model_copy(update={"vae_overflows": True})
    engine = serve(model, dtype=torch.float16)

    engine.replace(staged(update, recipe))

    assert engine._pipeline.vae.dtype == torch.float32
    assert engine._pipeline.unet.dtype == torch.float16


def test_staged_tensors_are_let_go_one_by_one(model, update):
    engine = serve(model)
    alive: weakref.WeakSet[mmap] = weakref.WeakSet()

    def watched() -> Iterator[Tensor]:
        for tensor in read_tensors(update):
            memory = mmap(-1, len(tensor.data))
            memory[:] = tensor.data
            alive.add(memory)
            yield replace(tensor, data=memory)
            del tensor, memory

    class Copies(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.alive: list[int] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
            if function is torch.ops.aten.copy_.default:
                self.alive.append(len(alive))
            return function(*args, **(kwargs or {}))

    waiting = staged(update, tensors=watched())
    with Copies() as copies:
        engine.replace(waiting)

    total = len(list(read_tensors(update)))
    assert copies.alive == list(range(total, 0, -1))
    assert len(alive) == 0


# New versions that are wrong


def missing(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if tensor.name != "conv_in.bias")


def misshapen(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        shape = (1, *tensor.shape) if tensor.name == "conv_in.bias" else tensor.shape
        yield replace(tensor, shape=shape)


def unexpected(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    yield Tensor("unet/lora.safetensors", "lora.down.weight", "F32", (1,), bytearray(4))
    yield from tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"missing \(unet/: conv_in\.bias"),
        (misshapen, r"conv_in\.bias is \[1, 32\], its config wants \[32\]"),
        (unexpected, r"unexpected .*lora\.down"),
    ],
)
def test_tensors_that_do_not_fit_leave_the_old_version_as_it_was(model, update, change, message):
    engine = serve(model)
    before = places(engine)

    with pytest.raises(ModelError, match=message):
        staged(update, tensors=change(read_tensors(update)))

    assert (engine.version, places(engine)) == ("old", before)
    assert_same_tensors(engine, serve(model))


@pytest.mark.parametrize(
    "path", ["unet/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
)
def test_configs_that_are_broken_are_named_before_any_tensor_is_asked_for(update, path):
    def never() -> Iterator[Tensor]:
        pytest.fail("a tensor was asked for")
        yield

    with pytest.raises(ModelError, match=path.partition("/")[0]):
        staged(update, configs=read_configs(update) | {path: b"{"}, tensors=never())


def test_a_device_with_no_room_for_a_changed_part_leaves_the_old_version_as_it_was(model, update):
    class FullAtLast(TorchDispatchMode):
        """The error cannot be had at will without filling the machine; here there is no room for what is asked last."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
            if (kwargs or {}).get("dtype") is torch.uint8:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return function(*args, **(kwargs or {}))

    configs = edited(read_configs(update), "vae/config.json", scaling_factor=0.2)
    engine, waiting = serve(model), staged(update, configs=configs)
    before = places(engine)

    refused = pytest.raises(ModelError, match=r"no memory for the parts of version new .*goes on")
    with refused, FullAtLast():
        engine.replace(waiting)

    assert (engine.version, places(engine)) == ("old", before)
    assert_same_tensors(engine, serve(model))
    assert_same_images(engine, serve(model))
    engine.replace(waiting)  # with room again
    assert_same_images(engine, serve(update, configs=configs))


# What the copies are


def test_a_tensor_of_another_dtype_is_cast_on_the_device_and_needs_no_memory_there():
    # "meta" stands in for a card: copies to it are asked of torch in the same way.
    module, target = nn.Linear(4, 4, bias=False).half(), torch.empty(4, 4, device="meta")
    ((_, slot),) = refresh.slots(module, torch.float32)
    move = refresh._Move(slot, target)
    scratch = torch.empty(refresh._scratch_bytes([move]), dtype=torch.uint8, device="meta")
    copies = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
            if function is torch.ops.aten.copy_.default:
                copies.append([(tensor.device.type, tensor.dtype) for tensor in args[:2]])
            elif function is not torch.ops.aten.detach.default:
                assert function.is_view, f"{function} may allocate"
            return function(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        refresh._carry_out(move, scratch)

    half, single = ("meta", torch.float16), ("meta", torch.float32)
    assert copies == [[half, ("cpu", torch.float16)], [single, half]]


def test_integers_and_buffers_of_a_file_are_copied_too():
    module = nn.BatchNorm1d(2)
    ours = dict(refresh.slots(module, torch.bfloat16))

    assert ours["num_batches_tracked"].final_dtype == torch.int64
    assert ours["running_mean"].final_dtype == torch.bfloat16
    refresh._carry_out(
        refresh._Move(ours["num_batches_tracked"], target := torch.tensor(5)), torch.empty(0)
    )
    assert target == 0
    assert module.num_batches_tracked is target
