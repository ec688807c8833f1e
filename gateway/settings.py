"""What the door itself is told by the environment, beside what the model needs.

`settings.py` has the model's variables and the way in which all are read and refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, ConfigDict, SecretStr, model_validator

from gateway.addresses import Allowed, parse_allowed
from gateway.keys import Keys, parse_keys
from gateway.rates import Rate
from gateway.webhooks import check_auth_token, check_secret
from settings import RunnerSettings, load, variable

MEBIBYTE = 1024 * 1024
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _keys(value: object) -> Keys:
    return value if isinstance(value, Keys) else parse_keys(str(value))


def _allowed(value: object) -> Allowed:
    return value if isinstance(value, Allowed) else parse_allowed(str(value))


def _yes(value: object) -> object:
    """A switch, as people write it."""
    if isinstance(value, str):
        if value.strip().lower() in ("1", "true", "yes", "on"):
            return True
        if value.strip().lower() in ("0", "false", "no", "off"):
            return False
        raise ValueError("must be 1 or 0")
    return value


def _origins(value: object) -> object:
    """Origins with commas between them, or * for all."""
    if not isinstance(value, str):
        return value
    origins = tuple(part.strip().rstrip("/") for part in value.split(",") if part.strip())
    for origin in origins:
        try:
            parts = urlsplit(origin)
        except ValueError:  # an IPv6 address without its end
            parts = urlsplit("")
        whole = f"{parts.scheme}://{parts.netloc}"
        if origin != "*" and (parts.scheme not in ("http", "https") or origin != whole):
            raise ValueError(
                f"must be origins with commas between them, such as https://app.example.com, or *: {origin!r} is none"
            )
    return origins


Switch = Annotated[bool, BeforeValidator(_yes)]


def _signing_secret(value: SecretStr) -> SecretStr:
    check_secret(value.get_secret_value())
    return value


def _auth_token(value: SecretStr) -> SecretStr:
    check_auth_token(value.get_secret_value())
    return value


class GatewaySettings(RunnerSettings):
    """Everything `python -m gateway` needs, the model's own settings among it."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    host: str = variable("HOST", "the address to listen on", "127.0.0.1", default="0.0.0.0")  # noqa: S104
    port: int = variable("PORT", "the port to listen on", "5000", default=5000, ge=0, le=65535)
    keys: Annotated[Keys, BeforeValidator(_keys)] = variable(
        "API_KEYS",
        "who may come in: a name and the SHA-256 of a key for each, as `python -m gateway.keys new NAME` prints them",
        "alice:9f86d081…,bob:60303ae2…",
        default=Keys({}),
    )
    allow_anonymous: Switch = variable(
        "ALLOW_ANONYMOUS", "1 lets everybody in who can reach the port", "1", default=False
    )
    rate_per_minute: float | None = variable(
        "RATE_LIMIT_PER_MINUTE",
        "how many predictions a minute each key may ask for, or each address where there are no keys",
        "60",
        default=None,
        gt=0,
        allow_inf_nan=False,
    )
    rate_burst: int | None = variable(
        "RATE_LIMIT_BURST",
        "how many of them may come at once; by default a tenth of a minute's, and one at least",
        "10",
        default=None,
        ge=1,
    )
    queue_size: int = variable(
        "QUEUE_SIZE",
        "how many predictions may wait for a free slot; more are refused with 429",
        "64",
        default=64,
        ge=0,
        le=100_000,
    )
    slots: int = variable(
        "COG_MAX_CONCURRENCY",
        "how many predictions Cog's server has in hand at once",
        "16",
        default=16,
        ge=1,
        le=1024,
    )
    prediction_seconds: float = variable(
        "PREDICTION_TIMEOUT_SECONDS",
        "how long a prediction may take, its wait for a free slot included",
        "600",
        default=600.0,
        gt=0,
        le=86_400,
    )
    most_body_bytes: int = variable(
        "MAX_BODY_BYTES", "the largest body of a request", "1048576", default=MEBIBYTE, ge=1024
    )
    body_seconds: float = variable(
        "BODY_TIMEOUT_SECONDS",
        "how long a body may take to arrive",
        "30",
        default=30.0,
        gt=0,
        allow_inf_nan=False,
    )
    grace_seconds: float = variable(
        "SHUTDOWN_GRACE_SECONDS",
        "how long what runs may take to finish after SIGTERM; less than the platform waits before it kills",
        "25",
        default=25.0,
        ge=0,
        allow_inf_nan=False,
    )
    allowed_hosts: Annotated[Allowed, BeforeValidator(_allowed)] = variable(
        "ALLOW_PRIVATE_HOSTS",
        "hosts and networks that webhooks may reach although they are not on the internet",
        "hooks.internal,10.0.0.0/8",
        default=Allowed(),
    )
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_origins)] = variable(
        "CORS_ORIGINS",
        "the origins whose pages may call this server from a browser, or * for all",
        "https://app.example.com",
        default=(),
    )
    webhook_signing_secret: Annotated[SecretStr, AfterValidator(_signing_secret)] | None = variable(
        "WEBHOOK_SIGNING_SECRET",
        "what webhooks are signed with, as Standard Webhooks has it",
        "whsec_…",
        default=None,
    )
    webhook_auth_token: Annotated[SecretStr, AfterValidator(_auth_token)] | None = variable(
        "WEBHOOK_AUTH_TOKEN",
        "a bearer token that webhooks carry, as Cog's do",
        "whatever-the-receiver-knows",
        default=None,
    )
    metrics_without_key: Switch = variable(
        "METRICS_WITHOUT_KEY", "1 lets /metrics be read without a key", "1", default=False
    )
    log_format: Literal["json", "text"] = variable(
        "LOG_FORMAT", "how the gateway's own log lines look", "text", default="json"
    )

    @property
    def rate(self) -> Rate | None:
        if self.rate_per_minute is None:
            return None
        return Rate(self.rate_per_minute, self.rate_burst or max(1, int(self.rate_per_minute / 10)))

    @model_validator(mode="after")
    def _no_open_door_by_accident(self) -> GatewaySettings:
        if not len(self.keys) and not self.allow_anonymous and self.host not in LOOPBACK:
            raise ValueError(
                f"API_KEYS is missing, and HOST is {self.host}: anybody who reaches the port could spend the card. Run "
                "`python -m gateway.keys new NAME` and set API_KEYS to what it prints; or set HOST=127.0.0.1; or, "
                "where something else keeps strangers out, ALLOW_ANONYMOUS=1."
            )
        return self


# Nothing that Cog's server, the model's code in it, or a crash report of either has a use for.
DOOR_SECRETS = ("API_KEYS", "WEBHOOK_AUTH_TOKEN", "WEBHOOK_SIGNING_SECRET")


def load_gateway_settings(environ: Mapping[str, str] | None = None) -> GatewaySettings:
    """Raises SettingsError, naming all that is wrong at once."""
    return load(GatewaySettings, os.environ if environ is None else environ)
