"""The environment: every variable the rooms need, named once, typed and checked at start-up.

The rooms take what they need from here and never ask the environment themselves. What a variable is for and an
example stand beside its type, because the error a person sees when it is missing or malformed is made of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from checks import (
    absolute_path,
    check_bucket_name,
    digests,
    http_url,
    key_prefix,
    secret_without_spaces,
    split_model_paths,
    with_scheme,
    without_spaces,
)

DAY = 24 * 60 * 60
AWS_LONGEST_URL_LIFETIME = 7 * DAY  # SigV4 query signatures: X-Amz-Expires is at most 604800
TIGRIS_LONGEST_URL_LIFETIME = 90 * DAY
TIGRIS_HOSTS = ("storage.dev", "tigris.dev")
# Beside the code, which is where a container image has it too: what `pull --to model` leaves needs no variable.
BAKED_FOLDER = Path(__file__).parent / "model"


class SettingsError(Exception):
    """The environment cannot be used; the message names each variable, what it is for and an example."""


BucketName = Annotated[str, AfterValidator(check_bucket_name)]
HttpUrl = Annotated[str, AfterValidator(http_url)]


def variable(name: str, purpose: str, example: str, **constraints: Any) -> Any:
    """A field that is read from the environment variable `name`; `purpose` continues "It is …" in errors."""
    return Field(
        validation_alias=name, description=purpose, examples=[f"{name}={example}"], **constraints
    )


class StorageSettings(BaseModel):
    """Where the buckets are and who we are to them. Without keys, boto3's own chain decides (instance roles)."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    access_key_id: Annotated[str, AfterValidator(without_spaces)] | None = variable(
        "AWS_ACCESS_KEY_ID", "the access key ID of the keypair", "tid_…", default=None, repr=False
    )
    secret_access_key: Annotated[SecretStr, AfterValidator(secret_without_spaces)] | None = (
        variable("AWS_SECRET_ACCESS_KEY", "the secret half of the keypair", "tsec_…", default=None)
    )
    session_token: Annotated[SecretStr, AfterValidator(secret_without_spaces)] | None = variable(
        "AWS_SESSION_TOKEN", "the token of temporary AWS credentials", "IQoJ…", default=None
    )
    endpoint_url: HttpUrl | None = variable(
        "AWS_ENDPOINT_URL_S3",
        "the S3 server; leave it out for AWS itself",
        "https://t3.storage.dev",
        default=None,
    )
    region: str | None = variable(
        "AWS_REGION",
        "the buckets' region; `auto` for Tigris",
        "auto",
        default=None,
        pattern=r"^[a-z0-9-]+$",
    )
    addressing_style: Literal["auto", "path", "virtual"] = variable(
        "S3_ADDRESSING_STYLE",
        "bucket in the path or in the host name; `auto` is path with an endpoint, virtual on AWS",
        "path",
        default="auto",
    )

    def plain_storage(self) -> dict[str, str]:
        """What is set of the storage's own fields, as plain values, secrets included: for another process."""
        values = {name: getattr(self, name) for name in StorageSettings.model_fields}
        return {
            name: value.get_secret_value() if isinstance(value, SecretStr) else value
            for name, value in values.items()
            if value is not None
        }

    @model_validator(mode="after")
    def _consistent(self) -> StorageSettings:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            missing = "AWS_ACCESS_KEY_ID" if self.access_key_id is None else "AWS_SECRET_ACCESS_KEY"
            raise ValueError(
                f"{missing} is missing: a keypair is AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY together. "
                "Set both, or neither to use the machine's own role."
            )
        if self.session_token and not self.access_key_id:
            raise ValueError(
                "AWS_SESSION_TOKEN needs the keypair it belongs to: set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY too, or unset it."
            )
        if self.region == "auto" and self.endpoint_url is None:
            raise ValueError(
                "AWS_REGION=auto needs AWS_ENDPOINT_URL_S3: AWS itself has no region of that name. "
                "For Tigris: AWS_ENDPOINT_URL_S3=https://t3.storage.dev. For AWS: AWS_REGION=us-east-1."
            )
        return self


class SourceSettings(StorageSettings):
    """What scripts/prepare_model.py needs: the bucket it publishes to, and the one that a model may come from."""

    source_access_key_id: Annotated[str, AfterValidator(without_spaces)] | None = variable(
        "SOURCE_AWS_ACCESS_KEY_ID",
        "the access key ID of a keypair that may list and read the source bucket",
        "AKIA…",
        default=None,
        repr=False,
    )
    source_secret_access_key: Annotated[SecretStr, AfterValidator(secret_without_spaces)] | None = (
        variable(
            "SOURCE_AWS_SECRET_ACCESS_KEY", "the secret half of that keypair", "wJal…", default=None
        )
    )
    source_session_token: Annotated[SecretStr, AfterValidator(secret_without_spaces)] | None = (
        variable(
            "SOURCE_AWS_SESSION_TOKEN", "the token of temporary credentials", "IQoJ…", default=None
        )
    )
    source_endpoint_url: HttpUrl | None = variable(
        "SOURCE_AWS_ENDPOINT_URL_S3",
        "the S3 server of the source bucket, where it is another one",
        "https://s3.us-east-1.amazonaws.com",
        default=None,
    )
    source_region: str | None = variable(
        "SOURCE_AWS_REGION",
        "the source bucket's region",
        "us-east-1",
        default=None,
        pattern=r"^[a-z0-9-]+$",
    )

    google_credentials: Annotated[Path, AfterValidator(absolute_path)] | None = variable(
        "GOOGLE_APPLICATION_CREDENTIALS",
        "the key file of a service account that may read a gs:// source",
        "/home/me/service_account.json",
        default=None,
    )
    gcs_endpoint: Annotated[str, BeforeValidator(with_scheme), AfterValidator(http_url)] = variable(
        "STORAGE_EMULATOR_HOST",
        "a server that stands in for Google Cloud Storage",
        "http://localhost:9023",
        default="https://storage.googleapis.com",
    )

    @model_validator(mode="after")
    def _source_keypair_is_whole(self) -> SourceSettings:
        if (self.source_access_key_id is None) != (self.source_secret_access_key is None):
            raise ValueError(
                "a source's keypair is SOURCE_AWS_ACCESS_KEY_ID and SOURCE_AWS_SECRET_ACCESS_KEY together. "
                "Set both, or neither to read the source with AWS_ACCESS_KEY_ID."
            )
        if self.source_session_token and not self.source_access_key_id:
            raise ValueError(
                "SOURCE_AWS_SESSION_TOKEN needs the keypair it belongs to: set SOURCE_AWS_ACCESS_KEY_ID and "
                "SOURCE_AWS_SECRET_ACCESS_KEY too, or unset it."
            )
        return self

    def source_storage(self) -> StorageSettings:
        """How to reach an s3:// source: as the bucket that is published to, but for what the SOURCE_ variables say.

        A token belongs to its keypair and a region to its server, so neither is inherited without them.
        """
        changes: dict[str, Any] = {}
        if self.source_access_key_id is not None:
            changes["access_key_id"] = self.source_access_key_id
            changes["secret_access_key"] = self.source_secret_access_key
            changes["session_token"] = self.source_session_token
        if self.source_endpoint_url is not None:
            changes["endpoint_url"] = self.source_endpoint_url
            changes["region"] = self.source_region
        elif self.source_region is not None:
            changes["region"] = self.source_region
        return self.model_copy(update=changes)

    def gcs_storage(self) -> StorageSettings:
        """How to reach a gs:// source through the XML API: signed where there is an HMAC keypair and nothing better.

        Google's access IDs begin with GOOG. Any other keypair is of another server, and is not shown to this one.
        """
        known = self.source_access_key_id or ""
        signs = known.startswith("GOOG") and self.google_credentials is None
        return self.model_copy(
            update={
                "access_key_id": self.source_access_key_id if signs else None,
                "secret_access_key": self.source_secret_access_key if signs else None,
                "session_token": None,
                "endpoint_url": self.gcs_endpoint,
                "region": "auto",
                "addressing_style": "path",
            }
        )


class CommandSettings(StorageSettings):
    """What `python -m weights` needs: the storage, and the bucket unless the command line names one."""

    model_bucket: BucketName | None = variable(
        "MODEL_BUCKET_NAME",
        "the private bucket that holds the models",
        "model-storage",
        default=None,
    )


class RunnerSettings(StorageSettings):
    """What the serving container needs beside the storage: which model, where images go, on which device."""

    model_paths: Annotated[tuple[str, ...], BeforeValidator(split_model_paths)] = variable(
        "MODEL_PATH",
        "the model's folder in the bucket, as published by scripts/prepare_model.py; or several of one architecture, "
        "separated by commas",
        "ByteDance/SDXL-Lightning",
    )
    model_folder: Annotated[Path, AfterValidator(absolute_path)] | None = variable(
        "MODEL_FOLDER",
        "a folder that `python -m weights pull` has left the model in, to be read instead of the bucket",
        "/src/model",
        default_factory=lambda: (
            BAKED_FOLDER if (BAKED_FOLDER / "manifest.json").is_file() else None
        ),
    )
    model_bucket: BucketName | None = variable(
        "MODEL_BUCKET_NAME",
        "the private bucket that holds the models",
        "model-storage",
        default=None,
        validate_default=True,
    )
    image_bucket: BucketName = variable(
        "PUBLIC_BUCKET_NAME", "the bucket that receives the generated images", "generated-images"
    )
    model_version: str | None = variable(
        "MODEL_VERSION",
        "pins one published version; without it, the one latest.json names",
        "0f3c… (32 hexadecimal digits; `python -m weights ls MODEL_PATH` lists them)",
        default=None,
        pattern=r"^[0-9a-f]{32}$",
    )
    image_prefix: Annotated[str, AfterValidator(key_prefix)] = variable(
        "IMAGE_PREFIX", "a folder in the image bucket to put images under", "sdxl", default=""
    )
    image_url_lifetime: int = variable(
        "IMAGE_URL_LIFETIME",
        "seconds for which a returned image URL works (AWS allows 7 days, Tigris 90)",
        "3600",
        default=3600,
        ge=1,
        le=TIGRIS_LONGEST_URL_LIFETIME,
    )
    public_base_url: HttpUrl | None = variable(
        "PUBLIC_BASE_URL",
        "set it when the image bucket is public: URLs are then this plus the key, unsigned",
        "https://images.example.com",
        default=None,
    )
    device: Literal["auto", "cuda", "cpu"] = variable(
        "DEVICE", "where to run; `auto` is cuda when there is a card", "cuda", default="auto"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = variable(
        "DTYPE",
        "the arithmetic; `auto` is bfloat16 or float16 by what the card can do, float32 on CPU",
        "float16",
        default="auto",
    )
    float8: Literal["off", "on"] = variable(
        "FLOAT8",
        "8-bit floats for the large layers, where the card computes them and the images bear it",
        "on",
        default="off",
    )
    compile_mode: Literal["auto", "on", "off"] = variable(
        "COMPILE",
        "compiled code: `auto` where it is published for exactly this kind of card, `on` also where it has to be "
        "compiled at the start, `off` never",
        "off",
        default="auto",
    )
    compiled_sha256: Annotated[tuple[str, ...], BeforeValidator(digests)] | None = variable(
        "COMPILED_SHA256",
        "the only compiled code to be run, by the SHA-256 that scripts/compile_model.py printed; several with commas",
        "9f86d081…",
        default=None,
    )
    batch_size: int | None = variable(
        "BATCH_SIZE",
        "how many images share the denoiser's passes; by default 8 on a CPU and 1 on a card, whose kernels would give "
        "an image other last bits in company",
        "4",
        default=None,
        ge=1,
        le=64,
    )
    batch_wait_ms: float = variable(
        "BATCH_WAIT_MS",
        "milliseconds that a request waits for others to share its passes when the device is free",
        "10",
        default=0.0,
        ge=0,
        le=60_000,
    )
    read_connections: int | None = variable(
        "MODEL_READ_CONNECTIONS",
        "pins how many connections read weights at once; without it, as many as pay",
        "16",
        default=None,
        ge=1,
        le=256,
    )
    reader: Literal["auto", "thread", "process"] = variable(
        "MODEL_READER",
        "where weights are read: in threads of the server, in a process beside it, or where it is fastest",
        "process",
        default="auto",
    )
    ring_mib: int = variable(
        "MODEL_RING_MIB",
        "MiB of pinned host memory that weights pass through on their way to a card",
        "512",
        default=512,
        ge=32,
        le=65536,
    )
    cache_folder: Annotated[Path, AfterValidator(absolute_path)] | None = variable(
        "MODEL_CACHE_DIR",
        "a folder on this machine's own disk that keeps weights for the next start, shared by all replicas here",
        "/var/cache/models",
        default=None,
    )
    cache_gb: float | None = variable(
        "MODEL_CACHE_GB",
        "how many GB the cache may take; the files used least recently make room",
        "100",
        default=None,
        gt=0,
    )
    refresh_seconds: float | None = variable(
        "MODEL_REFRESH_SECONDS",
        "how often to ask whether another version was published, and to serve it from then on",
        "60",
        default=None,
        ge=1,
    )
    cold_start_folder: Annotated[Path, AfterValidator(absolute_path)] | None = variable(
        "COLD_START_DIR",
        "a folder to leave the timeline of the start in, as cold-start.json and cold-start.svg",
        "/var/log/cold-start",
        default=None,
    )

    @property
    def model_path(self) -> str:
        """The first model's, which serves requests that name none."""
        return self.model_paths[0]

    @field_validator("model_bucket")
    @classmethod
    def _read_from_somewhere(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("model_folder", ...) is None:
            raise PydanticCustomError("missing", "is missing")
        return value

    @model_validator(mode="after")
    def _no_refresh_without_a_bucket(self) -> RunnerSettings:
        if self.refresh_seconds is not None and self.model_bucket is None:
            raise ValueError(
                "MODEL_REFRESH_SECONDS asks a bucket for other versions, and MODEL_BUCKET_NAME names none: set it, "
                "or unset MODEL_REFRESH_SECONDS."
            )
        return self

    @model_validator(mode="after")
    def _several_models_are_the_published_ones(self) -> RunnerSettings:
        if len(self.model_paths) > 1 and self.model_version is not None:
            raise ValueError(
                "MODEL_VERSION is a version of one model, and MODEL_PATH names several: unset it, or name one model."
            )
        if len(self.model_paths) > 1 and self.model_bucket is None:
            raise ValueError(
                "MODEL_PATH names several models, of which only one can be baked in: set MODEL_BUCKET_NAME to the "
                "bucket that holds the others, or name one model."
            )
        return self

    @model_validator(mode="after")
    def _no_refresh_of_a_pinned_version(self) -> RunnerSettings:
        if self.refresh_seconds is not None and self.model_version is not None:
            raise ValueError(
                "MODEL_REFRESH_SECONDS makes no sense with MODEL_VERSION, which pins one version: unset one of them."
            )
        return self

    @model_validator(mode="after")
    def _lifetime_within_the_provider_s_limit(self) -> RunnerSettings:
        host = urlsplit(self.endpoint_url).hostname if self.endpoint_url else None
        on_tigris = bool(host) and f".{host}".endswith(tuple(f".{name}" for name in TIGRIS_HOSTS))
        if not on_tigris and self.image_url_lifetime > AWS_LONGEST_URL_LIFETIME:
            raise ValueError(
                f"IMAGE_URL_LIFETIME={self.image_url_lifetime} is too long: a presigned URL lives at most "
                f"{AWS_LONGEST_URL_LIFETIME} seconds (7 days). Example: IMAGE_URL_LIFETIME=86400"
            )
        return self


SettingsType = TypeVar("SettingsType", bound=StorageSettings)


def load_storage_settings(environ: Mapping[str, str] | None = None) -> StorageSettings:
    """The storage part alone. Raises SettingsError."""
    return load(StorageSettings, os.environ if environ is None else environ)


def load_source_settings(environ: Mapping[str, str] | None = None) -> SourceSettings:
    """The storage to publish to, and the bucket a model may come from. Raises SettingsError."""
    return load(SourceSettings, os.environ if environ is None else environ)


def load_command_settings(environ: Mapping[str, str] | None = None) -> CommandSettings:
    """The storage and the models' bucket, for command lines. Raises SettingsError."""
    return load(CommandSettings, os.environ if environ is None else environ)


def load_runner_settings(environ: Mapping[str, str] | None = None) -> RunnerSettings:
    """Everything the serving container needs. Raises SettingsError, naming all that is wrong at once."""
    return load(RunnerSettings, os.environ if environ is None else environ)


def load(kind: type[SettingsType], environ: Mapping[str, str]) -> SettingsType:
    """The settings of a kind. Raises SettingsError, naming all that is wrong at once and no value."""
    values = {
        name: environ[name]
        for field in kind.model_fields.values()
        if isinstance(name := field.validation_alias, str) and environ.get(name)
    }
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(kind, detail) for detail in error.errors(include_input=False)]
    # Raised outside the handler: the ValidationError in a traceback would print the values, secrets included.
    lines = "\n".join(f"  - {problem}" for problem in problems)
    raise SettingsError(f"the environment is not complete or not valid:\n{lines}")


def _problem(kind: type[StorageSettings], detail: Any) -> str:
    """One line for one pydantic error; never the value, which may be a secret pasted into the wrong variable."""
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not detail["loc"]:  # a rule across several variables: its message names them
        return message
    name = str(detail["loc"][0])
    field = next(
        field for key, field in kind.model_fields.items() if name in (key, field.validation_alias)
    )
    what = "is missing" if detail["type"] == "missing" else _sentence(message)
    example = (field.examples or [""])[0]
    return f"{field.validation_alias} {what}. It is {field.description}. Example: {example}"


def _sentence(message: str) -> str:
    """Pydantic says "Input should be …"; a reader of environment variables wants "should be …"."""
    return message.removeprefix("Input ").removeprefix("String ")
