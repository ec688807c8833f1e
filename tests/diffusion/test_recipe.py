"""Recipes: what a folder's own configs say, what Lightning wants, and how they travel."""

import json

import pytest

from diffusion.errors import ModelError
from diffusion.recipe import Recipe, SchedulerRecipe, Source, lightning_recipe

SDXL_BASE = {
    "model_index.json": {"_class_name": "StableDiffusionXLPipeline"},
    "scheduler/scheduler_config.json": {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "timestep_spacing": "leading",
    },
    "text_encoder/config.json": {"torch_dtype": "float16"},
    "unet/config.json": {"sample_size": 128},
    "vae/config.json": {"block_out_channels": [128, 256, 512, 512]},
}


def as_bytes(configs: dict[str, object]) -> dict[str, bytes]:
    return {path: json.dumps(config).encode() for path, config in configs.items()}


def test_a_plain_sdxl_folder_runs_as_stock_diffusers_would_run_it():
    recipe = Recipe.from_configs(as_bytes(SDXL_BASE))

    assert recipe.scheduler == SchedulerRecipe(
        class_name="EulerDiscreteScheduler", config={"timestep_spacing": "leading"}
    )
    assert recipe.native_size == 1024
    assert recipe.dtype == "float16"
    assert recipe.steps is None
    assert (recipe.default_steps, recipe.guidance_scale) == (50, 5.0)
    assert not recipe.guidance_free


def test_diffusers_still_has_the_defaults_that_mirrored_models_get():
    import inspect

    from diffusers import StableDiffusionXLPipeline

    call = inspect.signature(StableDiffusionXLPipeline.__call__).parameters
    recipe = Recipe.from_configs(as_bytes(SDXL_BASE))

    assert recipe.default_steps == call["num_inference_steps"].default
    assert recipe.guidance_scale == call["guidance_scale"].default


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lightning_runs_trailing_without_guidance_at_its_own_step_count(steps):
    recipe = lightning_recipe(steps)

    assert recipe.scheduler.config["timestep_spacing"] == "trailing"
    assert recipe.scheduler.config.get("prediction_type") == ("sample" if steps == 1 else None)
    assert recipe.steps == (steps,)
    assert recipe.default_steps == steps
    assert recipe.guidance_free
    assert recipe.guidance_scale == 0


def test_lightning_has_no_3_step_checkpoint():
    with pytest.raises(ModelError, match="1, 2, 4 and 8"):
        lightning_recipe(3)


def test_a_recipe_survives_the_journey_through_json():
    recipe = lightning_recipe(source=Source(repo="ByteDance/SDXL-Lightning", licence="openrail++"))

    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
        ("model_index.json", {"_class_name": None}, "no known pipeline"),
        ("scheduler/scheduler_config.json", {"_class_name": "os.system"}, "os.system"),
        ("scheduler/scheduler_config.json", {"_class_name": None}, "class_name"),
        ("unet/config.json", {"sample_size": None}, "unet/config.json.*sample_size None"),
        ("vae/config.json", {"block_out_channels": []}, "vae/config.json"),
    ],
)
def test_a_folder_that_is_no_sdxl_model_is_refused_by_what_it_is(path, changes, message):
    configs = SDXL_BASE | {path: SDXL_BASE[path] | changes}

    with pytest.raises(ModelError, match=message):
        Recipe.from_configs(as_bytes(configs))


@pytest.mark.parametrize("path", SDXL_BASE)
def test_a_missing_or_broken_config_is_named(path):
    whole = as_bytes(SDXL_BASE)
    missing = {other: content for other, content in whole.items() if other != path}

    with pytest.raises(ModelError, match=path):
        Recipe.from_configs(missing)
    with pytest.raises(ModelError, match=f"{path}.*not JSON"):
        Recipe.from_configs(whole | {path: b"{"})
    with pytest.raises(ModelError, match=f"{path}.*list"):
        Recipe.from_configs(whole | {path: b"[]"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": "FluxPipeline"}, "pipeline"),
        ({"scheduler": {"class_name": "LMSDiscreteScheduler"}}, "use one of .*EulerDiscrete"),
        ({"steps": [2, 4], "default_steps": 3}, "default_steps 3"),
        ({"steps": []}, "steps"),
        ({"steps": [0], "default_steps": 0}, "from 1 to 50"),
        ({"guidance_scale": 3.5}, "guidance_free says it is off"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"native_size": 0}, "native_size"),
        ({"dtype": "int4"}, "dtype"),
        ({"cfg": 3}, "cfg"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_a_model_error_naming_the_field(changes, message):
    recipe = lightning_recipe().model_dump(mode="json") | changes

    with pytest.raises(ModelError, match=message):
        Recipe.model_validate(recipe)
