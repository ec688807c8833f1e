"""What a person sees when the environment is wrong, and what never shows."""

from pathlib import Path

import pytest

import settings as settings_module
from settings import (
    SettingsError,
    StorageSettings,
    load_runner_settings,
    load_source_settings,
    load_storage_settings,
)

COMPLETE = {
    "AWS_ACCESS_KEY_ID": "tid_AzureDiamond",
    "AWS_SECRET_ACCESS_KEY": "tsec_hunter2",
    "AWS_ENDPOINT_URL_S3": "https://fly.storage.tigris.dev",
    "AWS_REGION": "auto",
    "MODEL_PATH": "ByteDance/SDXL-Lightning",
    "MODEL_BUCKET_NAME": "model-storage",
    "PUBLIC_BUCKET_NAME": "generated-images",
}


def test_the_tutorials_environment_is_complete():
    settings = load_runner_settings(COMPLETE)
    assert settings.model_path == "ByteDance/SDXL-Lightning"
    assert settings.model_bucket == "model-storage"
    assert settings.image_bucket == "generated-images"
    assert settings.image_url_lifetime == 3600


def test_aws_proper_needs_neither_endpoint_nor_keys():
    environment = {name: COMPLETE[name] for name in COMPLETE if not name.startswith("AWS_")}
    settings = load_runner_settings(environment)
    assert settings.endpoint_url is None
    assert settings.access_key_id is None


def test_every_missing_variable_is_named_at_once_with_purpose_and_example(tmp_path, monkeypatch):
    # A checkout may hold one that was pulled for an image.
    monkeypatch.setattr(settings_module, "BAKED_FOLDER", tmp_path / "model")
    with pytest.raises(SettingsError) as caught:
        load_runner_settings({})
    message = str(caught.value)
    for name, purpose, example in (
        ("MODEL_PATH", "the model's folder in the bucket", "ByteDance/SDXL-Lightning"),
        ("MODEL_BUCKET_NAME", "the private bucket that holds the models", "model-storage"),
        ("PUBLIC_BUCKET_NAME", "the bucket that receives", "generated-images"),
    ):
        line = next(line for line in message.splitlines() if name in line)
        assert "is missing" in line
        assert purpose in line
        assert f"{name}={example}" in line


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("MODEL_BUCKET_NAME", "s3://model-storage", "without s3://"),
        ("PUBLIC_BUCKET_NAME", "a b", "not a bucket name"),
        ("MODEL_PATH", "../other", "plain path"),
        ("MODEL_PATH", "///", "must not be empty"),
        ("AWS_ENDPOINT_URL_S3", "fly.storage.tigris.dev", "https://"),
        ("AWS_ENDPOINT_URL_S3", "http://host:notaport", "https://"),
        ("AWS_ENDPOINT_URL_S3", "https://key:word@host", "user"),
        ("AWS_ENDPOINT_URL_S3", "http://my_minio:9000", "https://"),
        ("AWS_REGION", "us east 1", "pattern"),
        ("MODEL_VERSION", "latest", "pattern"),
        ("IMAGE_URL_LIFETIME", "soon", "integer"),
        ("IMAGE_URL_LIFETIME", "0", "greater than or equal to 1"),
        ("DEVICE", "tpu", "'cuda'"),
        ("MODEL_READ_CONNECTIONS", "0", "greater than or equal to 1"),
        ("S3_ADDRESSING_STYLE", "dns", "'path'"),
        ("MODEL_FOLDER", "model", "absolute path"),
    ],
)
def test_a_malformed_variable_is_named_with_what_is_wrong_and_an_example(name, value, hint):
    with pytest.raises(SettingsError) as caught:
        load_runner_settings(COMPLETE | {name: value})
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert name in line
    assert hint in line
    assert f"Example: {name}=" in line


def without_a_model_bucket(**changes: str) -> dict[str, str]:
    return {name: COMPLETE[name] for name in COMPLETE if name != "MODEL_BUCKET_NAME"} | changes


def test_a_folder_beside_the_code_is_where_a_baked_model_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(settings_module, "BAKED_FOLDER", tmp_path / "model")
    assert load_runner_settings(COMPLETE).model_folder is None
    with pytest.raises(SettingsError, match="MODEL_BUCKET_NAME is missing"):
        load_runner_settings(without_a_model_bucket())

    (tmp_path / "model").mkdir()  # which may be anything of that name
    assert load_runner_settings(COMPLETE).model_folder is None
    (tmp_path / "model/manifest.json").touch()

    assert load_runner_settings(COMPLETE).model_folder == tmp_path / "model"
    assert load_runner_settings(without_a_model_bucket()).model_bucket is None
    elsewhere = load_runner_settings(COMPLETE | {"MODEL_FOLDER": "/elsewhere"})
    assert elsewhere.model_folder == Path("/elsewhere")


def test_where_a_folder_is_named_no_bucket_need_be_but_for_refreshing():
    assert load_runner_settings(without_a_model_bucket(MODEL_FOLDER="/x")).model_bucket is None
    refreshing = without_a_model_bucket(MODEL_FOLDER="/x", MODEL_REFRESH_SECONDS="60")
    with pytest.raises(SettingsError, match="MODEL_REFRESH_SECONDS asks a bucket"):
        load_runner_settings(refreshing)


def test_compiled_code_is_allowed_by_its_digests():
    one, other = "a" * 64, "0" * 64
    settings = load_runner_settings(COMPLETE | {"COMPILED_SHA256": f"{one.upper()}, {other}"})
    assert settings.compiled_sha256 == (one, other)
    assert load_runner_settings(COMPLETE).compiled_sha256 is None
    with pytest.raises(SettingsError, match="COMPILED_SHA256 must be SHA-256s"):
        load_runner_settings(COMPLETE | {"COMPILED_SHA256": one[1:]})


def test_plain_storage_makes_the_same_storage_again():
    settings = load_runner_settings(COMPLETE)
    again = StorageSettings(**settings.plain_storage())
    assert again == load_storage_settings(COMPLETE)
    assert again.plain_storage()["secret_access_key"] == "tsec_hunter2"


def test_half_a_keypair_is_refused():
    environment = dict(COMPLETE)
    del environment["AWS_SECRET_ACCESS_KEY"]
    with pytest.raises(SettingsError, match="AWS_SECRET_ACCESS_KEY is missing"):
        load_runner_settings(environment)


def test_region_auto_without_an_endpoint_is_refused():
    environment = dict(COMPLETE)
    del environment["AWS_ENDPOINT_URL_S3"]
    with pytest.raises(SettingsError, match="AWS_REGION=auto needs AWS_ENDPOINT_URL_S3"):
        load_runner_settings(environment)


def test_url_lifetime_is_limited_to_seven_days_except_on_tigris():
    thirty_days = COMPLETE | {"IMAGE_URL_LIFETIME": str(30 * 24 * 3600)}
    assert load_runner_settings(thirty_days).image_url_lifetime == 30 * 24 * 3600
    elsewhere = thirty_days | {"AWS_ENDPOINT_URL_S3": "https://s3.us-east-1.amazonaws.com"}
    with pytest.raises(SettingsError, match="at most 604800 seconds"):
        load_runner_settings(elsewhere)
    lookalike = thirty_days | {"AWS_ENDPOINT_URL_S3": "https://eviltigris.dev"}
    with pytest.raises(SettingsError, match="at most 604800 seconds"):
        load_runner_settings(lookalike)


def test_an_empty_variable_counts_as_unset():
    settings = load_runner_settings(COMPLETE | {"AWS_REGION": "", "MODEL_VERSION": ""})
    assert settings.region is None
    assert settings.model_version is None


def test_the_secret_is_in_no_repr_and_no_dump():
    settings = load_storage_settings(COMPLETE)
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hunter2" not in shown


def test_a_malformed_secret_is_refused_without_being_shown():
    broken = COMPLETE | {"AWS_SECRET_ACCESS_KEY": "tsec_ hunter2", "DEVICE": "hunter2"}
    with pytest.raises(SettingsError) as caught:
        load_runner_settings(broken)
    assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    # A chained ValidationError would print its input in the traceback.
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


def test_a_session_token_is_as_secret_as_the_key():
    broken = COMPLETE | {"AWS_SESSION_TOKEN": "IQoJhunter2\n"}
    with pytest.raises(
        SettingsError, match="AWS_SESSION_TOKEN contains a space or a control"
    ) as caught:
        load_runner_settings(broken)
    assert "hunter2" not in str(caught.value)


def test_a_session_token_without_its_keypair_is_refused():
    environment = {name: COMPLETE[name] for name in COMPLETE if "KEY" not in name}
    with pytest.raises(SettingsError, match="AWS_SESSION_TOKEN needs the keypair"):
        load_runner_settings(environment | {"AWS_SESSION_TOKEN": "IQoJhunter2"})


def test_a_secret_in_the_wrong_variable_is_not_echoed():
    with pytest.raises(SettingsError) as caught:
        load_runner_settings(COMPLETE | {"MODEL_BUCKET_NAME": "tsec/hunter2"})
    assert "hunter2" not in str(caught.value)


SOURCE = {
    "SOURCE_AWS_ACCESS_KEY_ID": "AKIASOURCE",
    "SOURCE_AWS_SECRET_ACCESS_KEY": "source-hunter2",
    "SOURCE_AWS_ENDPOINT_URL_S3": "https://s3.us-east-1.amazonaws.com",
    "SOURCE_AWS_REGION": "us-east-1",
}


def test_a_source_is_reached_as_the_published_bucket_unless_it_says_otherwise():
    inherited = load_source_settings(COMPLETE).source_storage()
    assert inherited.access_key_id == "tid_AzureDiamond"
    assert inherited.endpoint_url == "https://fly.storage.tigris.dev"
    own = load_source_settings(COMPLETE | SOURCE)
    assert own.source_storage().access_key_id == "AKIASOURCE"
    assert own.source_storage().endpoint_url == "https://s3.us-east-1.amazonaws.com"
    assert own.source_storage().region == "us-east-1"
    # and what is published to stays what it was
    assert (own.access_key_id, own.region) == ("tid_AzureDiamond", "auto")


def test_a_source_inherits_no_token_with_a_keypair_and_no_region_with_a_server():
    temporary = COMPLETE | {"AWS_SESSION_TOKEN": "IQoJ", "AWS_REGION": "eu-west-1"}
    source = {name: value for name, value in SOURCE.items() if "REGION" not in name}
    storage = load_source_settings(temporary | source).source_storage()
    assert storage.session_token is None
    assert storage.region is None


def test_half_a_source_s_keypair_is_refused():
    with pytest.raises(SettingsError, match="SOURCE_AWS_ACCESS_KEY_ID and SOURCE_AWS_SECRET"):
        load_source_settings(COMPLETE | {"SOURCE_AWS_ACCESS_KEY_ID": "AKIASOURCE"})


def test_a_source_s_secret_is_in_no_repr_and_no_dump():
    settings = load_source_settings(COMPLETE | SOURCE)
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hunter2" not in shown


def test_google_is_shown_no_keypair_of_another_server():
    ours = load_source_settings(COMPLETE | SOURCE).gcs_storage()
    assert ours.access_key_id is None
    assert ours.endpoint_url == "https://storage.googleapis.com"
    hmac = load_source_settings(COMPLETE | SOURCE | {"SOURCE_AWS_ACCESS_KEY_ID": "GOOG1E"})
    assert hmac.gcs_storage().access_key_id == "GOOG1E"


def test_an_emulator_may_be_named_without_a_scheme():
    settings = load_source_settings({"STORAGE_EMULATOR_HOST": "localhost:9023"})
    assert settings.gcs_storage().endpoint_url == "http://localhost:9023"


def test_several_models_are_named_with_commas_and_the_first_is_the_one():
    settings = load_runner_settings(COMPLETE | {"MODEL_PATH": " a/one/, b/two ,c"})

    assert settings.model_paths == ("a/one", "b/two", "c")
    assert settings.model_path == "a/one"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MODEL_PATH": "a/one,b/two,a/one/"}, "must not name a model twice"),
        ({"MODEL_PATH": "a/one,,b"}, "must not be empty"),
        (
            {"MODEL_PATH": "a,b", "MODEL_VERSION": "0" * 32},
            "MODEL_VERSION is a version of one model",
        ),
    ],
)
def test_several_models_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(SettingsError, match=words):
        load_runner_settings(COMPLETE | changes)
