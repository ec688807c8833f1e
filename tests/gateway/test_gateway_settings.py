"""What `python -m gateway` says of a wrong environment, what it never says, and what a right one changes."""

from __future__ import annotations

import os
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

from demo.s3 import EmbeddedS3
from gateway.keys import PREFIX, digest_of
from gateway.settings import load_gateway_settings
from settings import SettingsError
from tests.conftest import Buckets
from tests.support.cog_server import REPOSITORY
from tests.support.gateway_server import TIMEOUT_S, GatewayServer, small_runner

# Not a random one: tests are named for it, and two processes have to find the same.
KEY = PREFIX + "k" * 43
COMPLETE = {
    "AWS_ACCESS_KEY_ID": "tid_AzureDiamond",
    "AWS_SECRET_ACCESS_KEY": "tsec_hunter2",
    "AWS_ENDPOINT_URL_S3": "https://t3.storage.dev",
    "AWS_REGION": "auto",
    "MODEL_PATH": "ByteDance/SDXL-Lightning",
    "MODEL_BUCKET_NAME": "model-storage",
    "PUBLIC_BUCKET_NAME": "generated-images",
    "API_KEYS": f"alice:{digest_of(KEY)}",
}
SECRET = "aHVudGVyMiBodW50ZXIyIGh1bnRlcjIgaHVudGVyMg=="


def refusal(**changes: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_gateway_settings({**COMPLETE, **changes})
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("PORT", "http", "integer"),
        ("PORT", "65536", "less than or equal to 65535"),
        ("PORT", "-1", "greater than or equal to 0"),
        ("API_KEYS", "alice", "part 1 has no colon"),
        ("API_KEYS", f"alice:{digest_of(KEY)},", "part 2 has no colon"),
        ("API_KEYS", f"al ice:{digest_of(KEY)}", "bad name in part 1"),
        ("API_KEYS", f"alice:{KEY}", "SHA-256 after alice"),
        ("API_KEYS", f"alice:{digest_of(KEY)},alice:{digest_of('other')}", "twice: alice"),
        ("API_KEYS", f"alice:{digest_of(KEY)},bob:{digest_of(KEY)}", "bob is the second"),
        ("ALLOW_ANONYMOUS", "maybe", "must be 1 or 0"),
        ("RATE_LIMIT_PER_MINUTE", "often", "number"),
        ("RATE_LIMIT_PER_MINUTE", "0", "greater than 0"),
        ("RATE_LIMIT_PER_MINUTE", "-5", "greater than 0"),
        ("RATE_LIMIT_PER_MINUTE", "nan", "finite"),
        ("RATE_LIMIT_PER_MINUTE", "inf", "finite"),
        ("RATE_LIMIT_BURST", "0", "greater than or equal to 1"),
        ("RATE_LIMIT_BURST", "1.5", "integer"),
        ("QUEUE_SIZE", "-1", "greater than or equal to 0"),
        ("QUEUE_SIZE", "100001", "less than or equal to 100000"),
        ("COG_MAX_CONCURRENCY", "0", "greater than or equal to 1"),
        ("COG_MAX_CONCURRENCY", "1025", "less than or equal to 1024"),
        ("PREDICTION_TIMEOUT_SECONDS", "0", "greater than 0"),
        ("PREDICTION_TIMEOUT_SECONDS", "86401", "less than or equal to 86400"),
        ("MAX_BODY_BYTES", "1023", "greater than or equal to 1024"),
        ("MAX_BODY_BYTES", "1MB", "integer"),
        ("BODY_TIMEOUT_SECONDS", "0", "greater than 0"),
        ("BODY_TIMEOUT_SECONDS", "inf", "finite"),
        ("SHUTDOWN_GRACE_SECONDS", "-1", "greater than or equal to 0"),
        ("SHUTDOWN_GRACE_SECONDS", "inf", "finite"),
        ("ALLOW_PRIVATE_HOSTS", "10.0.0.0/33", "'10.0.0.0/33'"),
        ("ALLOW_PRIVATE_HOSTS", "https://hooks.internal", "'https://hooks.internal'"),
        ("ALLOW_PRIVATE_HOSTS", "hooks.internal:8080", "without scheme or port"),
        ("ALLOW_PRIVATE_HOSTS", "127.1", "without scheme or port"),
        ("CORS_ORIGINS", "app.example.com", "'app.example.com' is none"),
        ("CORS_ORIGINS", "https://app.example.com/path", "is none"),
        ("CORS_ORIGINS", "https://[::1", "is none"),
        ("WEBHOOK_SIGNING_SECRET", "hunter2", "must be whsec_"),
        ("WEBHOOK_SIGNING_SECRET", "whsec_not base64!", "base64 after whsec_"),
        ("WEBHOOK_SIGNING_SECRET", "whsec_aHVudGVyMg==", "24 to 64 bytes"),
        ("WEBHOOK_AUTH_TOKEN", "two words", "printable ASCII"),
        ("METRICS_WITHOUT_KEY", "2", "must be 1 or 0"),
        ("LOG_FORMAT", "xml", "'json' or 'text'"),
    ],
)
def test_a_wrong_variable_is_named_with_what_is_wrong_and_an_example(
    name: str, value: str, hint: str
) -> None:
    message = refusal(**{name: value})
    (line,) = [line for line in message.splitlines() if name in line]
    assert hint in line
    assert f"Example: {name}=" in line


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("API_KEYS", KEY, KEY),
        ("API_KEYS", f"alice:{KEY}", KEY),
        ("WEBHOOK_SIGNING_SECRET", SECRET, SECRET),
        ("WEBHOOK_SIGNING_SECRET", f"whsec_{SECRET}!", SECRET),
        ("WEBHOOK_AUTH_TOKEN", f"{SECRET} {SECRET}", SECRET),
        ("PORT", SECRET, SECRET),
        ("LOG_FORMAT", SECRET, SECRET),
        ("QUEUE_SIZE", SECRET, SECRET),
    ],
)
def test_no_value_that_may_be_a_secret_is_repeated(name: str, value: str, secret: str) -> None:
    assert secret not in refusal(**{name: value})


def test_what_it_was_told_is_hidden_from_whoever_prints_it() -> None:
    secret = f"whsec_{SECRET}"
    settings = load_gateway_settings(
        {**COMPLETE, "WEBHOOK_SIGNING_SECRET": secret, "WEBHOOK_AUTH_TOKEN": "a-token"}
    )
    for text in (repr(settings), str(settings)):
        for hidden in (secret, "a-token", "tsec_hunter2", COMPLETE["API_KEYS"].partition(":")[2]):
            assert hidden not in text


def test_without_keys_it_listens_to_this_machine_alone_unless_it_is_told_otherwise() -> None:
    for host in ("", "0.0.0.0", "::", "10.1.2.3", "127.0.0.1.example.com"):  # noqa: S104
        message = refusal(API_KEYS="", HOST=host)
        assert "API_KEYS is missing" in message
        assert "ALLOW_ANONYMOUS=1" in message
    for host in ("127.0.0.1", "::1", "localhost"):
        assert load_gateway_settings({**COMPLETE, "API_KEYS": "", "HOST": host}).host == host
    told = load_gateway_settings({**COMPLETE, "API_KEYS": "", "ALLOW_ANONYMOUS": "1"})
    assert (len(told.keys), told.host) == (0, "0.0.0.0")  # noqa: S104


def test_a_burst_is_a_tenth_of_a_minute_s_unless_it_is_told() -> None:
    for changes, burst in (
        ({"RATE_LIMIT_PER_MINUTE": "60"}, 6),
        ({"RATE_LIMIT_PER_MINUTE": "3"}, 1),
        ({"RATE_LIMIT_PER_MINUTE": "3", "RATE_LIMIT_BURST": "9"}, 9),
    ):
        rate = load_gateway_settings({**COMPLETE, **changes}).rate
        assert rate is not None
        assert rate.burst == burst
    assert load_gateway_settings(COMPLETE).rate is None


def run(environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway"],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_started(tmp_path: Path) -> None:
    wrong = {"QUEUE_SIZE": "many", "API_KEYS": KEY, "WEBHOOK_SIGNING_SECRET": SECRET}
    ended = run({**COMPLETE, **wrong, "PUBLIC_BUCKET_NAME": ""}, tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    for name in (*wrong, "PUBLIC_BUCKET_NAME"):
        assert f"- {name} " in ended.stderr
    assert KEY not in ended.stderr
    assert SECRET not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_key_and_a_public_address_is_an_exit_with_words(tmp_path: Path) -> None:
    ended = run({**COMPLETE, "API_KEYS": ""}, tmp_path)
    assert ended.returncode == 2
    assert "API_KEYS is missing, and HOST is 0.0.0.0" in ended.stderr


def test_a_profile_that_is_not_there_is_an_exit_with_words(tmp_path: Path) -> None:
    ambient = {
        **COMPLETE,
        "HOST": "127.0.0.1",
        "PORT": "0",
        "AWS_PROFILE": "nobody",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del ambient[name]
    ended = run(ambient, tmp_path)
    assert ended.returncode == 2
    assert "AWS_PROFILE" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_is_open_where_the_environment_says_so(
    s3: EmbeddedS3, buckets: Buckets, tmp_path: Path
) -> None:
    environment = {
        **s3.environment(),
        "PUBLIC_BUCKET_NAME": buckets.images,
        "HOST": "0.0.0.0",  # noqa: S104
        "ALLOW_ANONYMOUS": "1",
        "COG_MAX_CONCURRENCY": "1",
        "RATE_LIMIT_PER_MINUTE": "1",
        "RATE_LIMIT_BURST": "2",
        "LOG_FORMAT": "json",
    }
    with GatewayServer(environment, small_runner(tmp_path / "runner")) as gateway:
        asked = [gateway.put(f"{number}", {"prompt": "x"}) for number in range(3)]
        other = gateway.put("4", {"prompt": "x"}, headers={"X-Forwarded-For": "203.0.113.7"})
        told = gateway.get("/status").json()
        cors = gateway.get("/live", headers={"Origin": "https://app.example.com"})
        metrics = gateway.get("/metrics")
        preflight = httpx.options(
            gateway.url + "/predictions",
            headers={"Origin": "https://a.example", "Access-Control-Request-Method": "POST"},
        )

    assert [answer.status_code for answer in asked] == [200, 200, 429]
    assert other.is_success  # a proxy on this machine says for whom it asks
    assert told["needs_key"] is False
    assert told["model"] == {"path": "test/runner"}
    assert "access-control-allow-origin" not in cors.headers
    assert preflight.status_code == HTTPStatus.METHOD_NOT_ALLOWED
    assert metrics.is_success
    assert all(line.startswith("{") for line in gateway.logs.splitlines())


def test_metrics_may_be_read_without_a_key_where_that_is_said(
    s3: EmbeddedS3, buckets: Buckets, tmp_path: Path
) -> None:
    environment = {
        **s3.environment(),
        "PUBLIC_BUCKET_NAME": buckets.images,
        "API_KEYS": COMPLETE["API_KEYS"],
        "METRICS_WITHOUT_KEY": "1",
    }
    runner = small_runner(tmp_path / "runner")
    with GatewayServer(environment, runner, wait_until_ready=False) as gateway:
        metrics = gateway.get("/metrics")
        assert gateway.get("/predictions").status_code == HTTPStatus.UNAUTHORIZED
    assert metrics.is_success
    assert "gateway_http_requests_total" in metrics.text
    assert KEY not in metrics.text
