"""Building from streamed tensors gives what stock `from_pretrained` gives, or says what is wrong with the model."""

import json
import logging
import random
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.engine import Engine, GenerationRequest
from diffusion.errors import ModelError
from diffusion.landing import Landing, Problems
from diffusion.recipe import SDXL
from tests.diffusion.support import (
    LIGHTNING,
    Tensor,
    build,
    edited,
    read_configs,
    read_tensors,
    renamed,
    stock_pipeline,
)


def assert_same_modules(ours, theirs):
    for name in SDXL.modules:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert type(mine) is type(other)
        states = [
            {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for module in (mine, other)
        ]
        assert states[0].keys() == states[1].keys()
        for key, tensor in states[0].items():
            assert tensor.dtype == states[1][key].dtype, f"{name}: {key}"
            assert torch.equal(tensor, states[1][key]), f"{name}: {key}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("folder", ["model", "half_model"])
def test_every_tensor_is_the_one_stock_diffusers_loads(request, folder, dtype):
    folder = request.getfixturevalue(folder)

    ours = build(folder, dtype=dtype)

    assert_same_modules(ours, stock_pipeline(folder, dtype))


def test_the_order_in_which_tensors_land_does_not_matter(model):
    tensors = list(read_tensors(model))
    random.Random(5).shuffle(tensors)

    ours = build(model, tensors=tensors)

    assert_same_modules(ours, stock_pipeline(model))


def test_sharded_files_land_too(model):
    halves = (
        replace(tensor, path=tensor.path.replace(".safetensors", f"-0000{index % 2}.safetensors"))
        for index, tensor in enumerate(read_tensors(model))
    )

    assert_same_modules(build(model, tensors=halves), stock_pipeline(model))


def test_the_pipeline_is_ready_to_serve(model):
    pipeline = build(model)

    for name in SDXL.modules:
        module = getattr(pipeline, name)
        assert not module.training
        for tensor in (*module.parameters(), *module.buffers()):
            assert not tensor.is_meta
            assert not tensor.requires_grad
    assert pipeline.scheduler.config.timestep_spacing == "trailing"


def test_images_carry_no_watermark_although_the_package_for_it_is_installed(model, monkeypatch):
    class Watermarker:
        """The real one needs a package that is not installed here; diffusers only has to find it."""

    monkeypatch.setattr(pipeline_stable_diffusion_xl, "is_invisible_watermark_available", lambda: 1)
    monkeypatch.setattr(
        pipeline_stable_diffusion_xl, "StableDiffusionXLWatermarker", Watermarker, raising=False
    )
    plain = StableDiffusionXLPipeline.from_pretrained(model, local_files_only=True)
    assert isinstance(plain.watermark, Watermarker)

    assert build(model).watermark is None


def test_tokenizers_read_as_stock_ones_do(model):
    ours, theirs = build(model), stock_pipeline(model)

    for name in ("tokenizer", "tokenizer_2"):
        for text in ("", "space needle, Seattle", "猫 🙂 ünïcödé", "many " * 90):
            call = {"padding": "max_length", "max_length": 77, "truncation": True}
            assert (
                getattr(ours, name)(text, **call).input_ids
                == getattr(theirs, name)(text, **call).input_ids
            )


@pytest.mark.parametrize("stated", [None, 1000])
def test_a_tokenizer_reads_no_more_tokens_than_its_text_encoder_has_positions(model, stated):
    # Without the entry, transformers would read 10^30, and every request would fail with an OverflowError.
    configs = read_configs(model)
    for name in ("tokenizer", "tokenizer_2"):
        path = f"{name}/tokenizer_config.json"
        config = json.loads(configs[path])
        assert config.pop("model_max_length") == 77
        config |= {} if stated is None else {"model_max_length": stated}
        configs[path] = json.dumps(config).encode()
    engine = Engine(build(model, configs=configs), LIGHTNING)

    request = GenerationRequest(prompt="red " * 100, width=64, height=64, steps=1, seed=3)
    (generated,) = engine.generate(request)

    (as_published,) = Engine(build(model), LIGHTNING).generate(request)
    assert generated.image.tobytes() == as_published.image.tobytes()


def test_building_never_asks_the_network(model, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    build(model)


def test_a_vae_that_overflows_in_float16_stays_in_float32(model):
    upcast = edited(read_configs(model), "vae/config.json", force_upcast=True)

    assert build(model, configs=upcast, dtype=torch.float16).vae.dtype == torch.float32
    assert build(model, configs=upcast, dtype=torch.float16).unet.dtype == torch.float16
    assert build(model, configs=upcast, dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert build(model, dtype=torch.float16).vae.dtype == torch.float16


def test_a_recipe_may_say_that_the_vae_overflows_in_float16(model):
    recipe = LIGHTNING.model_copy(update={"vae_overflows": True})

    assert build(model, recipe, dtype=torch.float16).vae.dtype == torch.float32
    assert build(model, recipe, dtype=torch.float16).unet.dtype == torch.float16
    assert build(model, recipe, dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_parameters_lie_where_vector_kernels_want_them(model):
    def odd(tensor: Tensor) -> Tensor:
        memory = bytearray(len(tensor.data) + 64)
        memory[4 : 4 + len(tensor.data)] = tensor.data
        return replace(tensor, data=memoryview(memory)[4 : 4 + len(tensor.data)])

    pipeline = build(model, tensors=(odd(tensor) for tensor in read_tensors(model)))

    for name in SDXL.modules:
        for parameter in getattr(pipeline, name).parameters():
            assert parameter.data_ptr() % 64 == 0


def test_a_tensor_is_cast_on_the_device_it_goes_to():
    # "meta" stands in for a card: copies to it are asked of torch in the same way.
    class Casts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.devices: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and args[0].dtype != result.dtype:
                self.devices.append(args[0].device.type)
            return result

    module, problems = torch.nn.Linear(2, 2, bias=False), Problems()
    landing = Landing("unet", module, device=torch.device("meta"), dtype=torch.bfloat16)
    with Casts() as casts:
        landing.take(Tensor("unet/x.safetensors", "weight", "F16", (2, 2), bytearray(8)), problems)

    problems.raise_if_any()
    assert (module.weight.device.type, module.weight.dtype) == ("meta", torch.bfloat16)
    assert casts.devices == ["meta"]


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_tensor_that_lies_on_the_card_already_goes_where_its_module_is_to_lie(place):
    module, problems = torch.nn.Linear(2, 2, bias=False), Problems()
    landing = Landing("unet", module, device=torch.device(place), dtype=torch.bfloat16)
    arrived = torch.ones(2, 2, dtype=torch.float16)

    landing.take(Tensor("unet/x.safetensors", "weight", "F16", (2, 2), arrived), problems)

    problems.raise_if_any()
    assert (module.weight.device.type, module.weight.dtype) == (place, torch.bfloat16)


# Names and tensors of older files


def test_attention_names_of_older_vae_files_are_understood(model):
    tensors = list(read_tensors(model))
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
        tensors = renamed(tensors, "vae", f".{new}.", f".{old}.")
    tensors = list(renamed(tensors, "vae", ".to_out.0.", ".proj_attn."))
    assert any("attentions.0.query.weight" in tensor.name for tensor in tensors)

    assert_same_modules(build(model, tensors=tensors), stock_pipeline(model))


def test_position_ids_of_older_text_encoder_files_are_not_needed(model):
    ids = torch.arange(77)
    data = bytearray(ids.numpy().tobytes())
    older = [
        Tensor(
            f"{folder}/model.safetensors",
            "text_model.embeddings.position_ids",
            "I64",
            (1, 77),
            data,
        )
        for folder in ("text_encoder", "text_encoder_2")
    ]

    pipeline = build(model, tensors=[*read_tensors(model), *older])

    assert_same_modules(pipeline, stock_pipeline(model))


def test_text_encoder_names_without_their_prefix_are_understood(model):
    tensors = list(renamed(read_tensors(model), "text_encoder", "text_model.", ""))

    assert_same_modules(build(model, tensors=tensors), stock_pipeline(model))


def test_weights_of_no_part_of_the_pipeline_are_ignored_with_one_line_each(model, caplog):
    strays = [
        Tensor(path, name, "F32", (1,), bytearray(4))
        for path in ("vae_1_0/model.safetensors", "sd_xl_base_1.0.safetensors")
        for name in ("a", "b")
    ]

    with caplog.at_level(logging.WARNING):
        build(model, tensors=[*strays, *read_tensors(model)])

    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "vae_1_0/model.safetensors" in messages[0]


# Models that are wrong


def without(model, *names: str) -> Iterator[Tensor]:
    return (tensor for tensor in read_tensors(model) if tensor.name not in names)


def test_missing_tensors_are_counted_and_named(model):
    names = [
        tensor.name for tensor in read_tensors(model) if "down_blocks.1.resnets" in tensor.name
    ]
    assert len(names) > 3

    with pytest.raises(
        ModelError, match=rf"{len(names)} missing \(unet/: down_blocks\.1\.resnets.*; …\)"
    ):
        build(model, tensors=without(model, *names))


def test_a_component_that_never_came_is_missing(model):
    others = (t for t in read_tensors(model) if not t.path.startswith("vae/"))

    with pytest.raises(ModelError, match=r"missing \(vae/: "):
        build(model, tensors=others)


def test_unexpected_tensors_are_named_with_their_file(model):
    stray = Tensor("unet/other.safetensors", "lora.down.weight", "F32", (1,), bytearray(4))

    with pytest.raises(
        ModelError, match=r"1 unexpected \(unet/other.safetensors: lora.down.weight"
    ):
        build(model, tensors=[*read_tensors(model), stray])


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(model):
    configs = edited(read_configs(model), "unet/config.json", in_channels=9)

    with pytest.raises(
        ModelError,
        match=r"1 of the wrong shape or type \(unet/.*safetensors: conv_in.weight is "
        r"\[\d+, 4, 3, 3\], its config wants \[\d+, 9, 3, 3\]",
    ):
        build(model, configs=configs)


def test_two_variants_of_one_file_are_told_apart_from_none(model):
    variant = [
        replace(tensor, path=tensor.path.replace(".safetensors", ".fp16.safetensors"))
        for tensor in read_tensors(model)
    ]

    with pytest.raises(ModelError, match=r"found twice .*\.fp16\.safetensors.*Keep one variant"):
        build(model, tensors=[*read_tensors(model), *variant])


def test_scaled_float8_weights_are_refused(model):
    tensors = (
        replace(t, dtype="F8_E4M3") if t.name == "conv_in.bias" else t for t in read_tensors(model)
    )

    with pytest.raises(ModelError, match=r"conv_in\.bias is F8_E4M3, which is not supported"):
        build(model, tensors=tensors)


def test_bytes_that_do_not_make_the_tensor_are_named(model):
    tensors = (
        replace(t, data=t.data[:-4]) if t.name == "conv_in.bias" else t for t in read_tensors(model)
    )

    with pytest.raises(ModelError, match=r"unet/.*: conv_in\.bias are not"):
        build(model, tensors=tensors)


def test_what_goes_wrong_while_reading_passes_through(model):
    class ReadError(Exception):
        pass

    def failing() -> Iterator[Tensor]:
        yield next(read_tensors(model))
        raise ReadError

    with pytest.raises(ReadError):
        build(model, tensors=failing())


@pytest.mark.parametrize(
    ("component", "entry"),
    [
        ("unet", ["os", "system"]),
        ("unet", ["diffusers", "FluxTransformer2DModel"]),
        ("unet", "custom_unet.py"),
        ("vae", ["diffusers", "AutoencoderTiny"]),
        ("text_encoder", [None, None]),
        ("text_encoder_2", []),
        ("tokenizer", ["my_tokenizer", "MyTokenizer"]),
        ("tokenizer_2", None),
    ],
)
def test_a_config_cannot_choose_what_is_imported(model, component, entry):
    configs = edited(read_configs(model), "model_index.json", **{component: entry})

    with pytest.raises(ModelError, match=f"asks for {component} to be"):
        build(model, configs=configs)


def test_a_config_cannot_choose_the_attention_code(model):
    configs = read_configs(model)
    for name in ("attn_implementation", "_attn_implementation"):
        configs = edited(configs, "text_encoder/config.json", **{name: "somebody/kernel"})

    assert build(model, configs=configs).text_encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("unet/config.json", {"down_block_types": ["NoSuchBlock"] * 3}),
        ("unet/config.json", {"block_out_channels": "wide"}),
        ("unet/config.json", {"block_out_channels": [7]}),
        ("vae/config.json", {"norm_num_groups": 0}),
        ("text_encoder/config.json", {"hidden_size": -1}),
        ("text_encoder/config.json", {"hidden_act": "no such function"}),
        ("text_encoder_2/config.json", {"hidden_size": "wide"}),
        ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ],
)
def test_a_config_that_makes_no_module_is_named(model, path, changes):
    configs = edited(read_configs(model), path, **changes)

    with pytest.raises(ModelError, match=path):
        build(model, configs=configs)


@pytest.mark.parametrize("path", ["unet/config.json", "tokenizer_2/vocab.json", "model_index.json"])
def test_a_missing_file_is_named(model, path):
    configs = {other: data for other, data in read_configs(model).items() if other != path}

    with pytest.raises(ModelError, match=f"no {path}"):
        build(model, configs=configs)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("tokenizer/vocab.json", b"{"),
        ("tokenizer/tokenizer_config.json", b"[1"),
        ("tokenizer/merges.txt", b"\xff\xfe"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(model, path, content):
    with pytest.raises(ModelError, match="tokenizer/"):
        build(model, configs=read_configs(model) | {path: content})


def test_a_scheduler_that_refuses_its_config_is_named(model):
    recipe = LIGHTNING.model_copy(
        update={
            "scheduler": LIGHTNING.scheduler.model_copy(update={"config": {"beta_schedule": "x"}})
        }
    )

    with pytest.raises(ModelError, match="No EulerDiscreteScheduler can be built"):
        build(model, recipe)


def test_what_a_class_keeps_in_float32_stays_there():
    # No class of SDXL keeps anything today; diffusers' own loader would honour it, so this one does.
    class Careful(torch.nn.Module):
        _keep_in_fp32_modules = ("norm",)

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(2), torch.nn.Linear(2, 2)

    module, problems = Careful(), Problems()
    landing = Landing("unet", module, device=torch.device("cpu"), dtype=torch.bfloat16)
    for name, parameter in list(module.named_parameters()):
        data = bytearray(parameter.detach().numpy().tobytes())
        landing.take(Tensor("unet/x.safetensors", name, "F32", (*parameter.shape,), data), problems)

    problems.raise_if_any()
    assert module.norm.weight.dtype == torch.float32
    assert module.linear.weight.dtype == torch.bfloat16
