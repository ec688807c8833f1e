"""A request goes where boto3 would send it: its own client, asked for the same object, is the judge."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.auth import _host_from_url
from botocore.utils import get_environ_proxies
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from s3 import connect
from s3.endpoint import Endpoint, endpoint_of, proxy_authorization, proxy_for
from s3.signing import region_of
from settings import SettingsError, StorageSettings

ROOT = Path(__file__).resolve().parents[2]
BUCKETS = ("bucket", "my.bucket", "My_Bucket", "-bucket-", "a.b..c", "192.168.5.4", "a--b")
KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


def storage(**values: Any) -> StorageSettings:
    return StorageSettings(access_key_id="tid_key", secret_access_key="tsec_secret", **values)


class Boto3Client:
    """A client as the product makes it, whose requests end just before they would be sent."""

    def __init__(self, settings: StorageSettings) -> None:
        self._client: Any = connect(settings)
        self._sent: list[str] = []
        self._regions: list[str] = []
        events = self._client.meta.events
        events.register(
            "before-sign.s3", lambda region_name, **_: self._regions.append(region_name)
        )
        events.register("before-send.s3", self._answer)

    def get(self, bucket: str, key: str) -> tuple[str, str]:
        """The URL that a GET of the object goes to, and the region it is signed for."""
        self._client.get_object(Bucket=bucket, Key=key)
        return self._sent.pop(), self._regions.pop()

    def _answer(self, request: Any, **_: Any) -> Any:
        self._sent.append(request.url)
        return SimpleNamespace(status_code=200, headers={}, content=b"", raw=None)


def url_of(endpoint: Endpoint, bucket: str, key: str) -> str:
    place = endpoint.place(bucket, key)
    return f"{endpoint.scheme}://{place.host_header}{place.path}"


def normal(url: str) -> str:
    """The URL with the host as it appears in a Host header."""
    parts = urlsplit(url)
    return parts._replace(netloc=_host_from_url(url)).geturl()


@pytest.mark.parametrize("style", ["auto", "path", "virtual"])
@pytest.mark.parametrize(
    "endpoint_url",
    [
        None,
        "https://t3.storage.dev",
        "https://T3.Storage.Dev:443",
        "http://minio:9000",
        "http://minio:80",
        "https://host:80",
        "http://127.0.0.1:5000",
        "http://[::1]:5000",
        "https://[2001:db8::1]",
        "https://host/base/path",
    ],
)
def test_every_bucket_is_asked_where_boto3_asks(endpoint_url: str | None, style: str) -> None:
    settings = storage(endpoint_url=endpoint_url, addressing_style=style)
    boto3_client = Boto3Client(settings)
    endpoint = endpoint_of(settings)

    for bucket in BUCKETS:
        if (
            endpoint_url
            and "." in bucket
            and urlsplit(endpoint_url).hostname in ("127.0.0.1", "::1")
        ):
            continue  # see the next test
        expected, _ = boto3_client.get(bucket, "a/b.txt")
        assert url_of(endpoint, bucket, "a/b.txt") == normal(expected)


@pytest.mark.parametrize("style", ["path", "virtual"])
def test_an_endpoints_own_path_is_encoded_as_boto3_encodes_it_in_path_style(style: str) -> None:
    """In virtual style boto3 sends such a path as it stands, which is no valid request."""
    url = "http://host:8080/a b/ü+%41@"
    expected, _ = Boto3Client(storage(endpoint_url=url)).get("bucket", "key")

    place = endpoint_of(storage(endpoint_url=url, addressing_style=style)).place("bucket", "key")

    in_path_style = urlsplit(expected).path
    assert place.path == (
        in_path_style if style == "path" else in_path_style.replace("/bucket/", "/")
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_bucket_never_stands_before_an_address(host: str) -> None:
    settings = storage(endpoint_url=f"http://{host}:5000", addressing_style="virtual")

    place = endpoint_of(settings).place("my.bucket", "key")

    assert (place.host_header, place.path) == (f"{host}:5000", "/my.bucket/key")


@functools.cache
def clients() -> dict[StorageSettings, Boto3Client]:
    settings = (
        storage(endpoint_url="http://localhost:9000"),
        storage(endpoint_url="https://t3.storage.dev", addressing_style="virtual"),
    )
    return {each: Boto3Client(each) for each in settings}


@hypothesis_settings(deadline=None, derandomize=True, database=None)
@given(key=KEYS)
@example("a b+c%d%2Fe/ü/漢字/😀//x~y-z_.txt")
@example("/leading//and trailing/")
@example("a/../b/./c")
@example("?query#fragment&a=b;c:d@e!$'()*,[]\\^`{|}\"<>")
@example("\x00\n\r\t\x7f")
def test_every_key_is_encoded_as_boto3_encodes_it(key: str) -> None:
    for settings, boto3_client in clients().items():
        expected, _ = boto3_client.get("bucket", key)

        place = endpoint_of(settings).place("bucket", key)

        # Not through urlsplit, which takes some characters for something else, or away.
        assert expected.endswith(place.path)
        assert expected == f"{urlsplit(expected).scheme}://{place.host_header}{place.path}"


@pytest.mark.parametrize(
    ("environment", "region", "style"),
    [
        ({}, None, "auto"),
        ({}, "us-east-1", "auto"),
        ({}, "eu-west-3", "auto"),
        ({}, "cn-north-1", "auto"),
        ({}, "us-gov-west-1", "auto"),
        ({}, "aws-global", "auto"),
        ({}, "fips-us-east-1", "auto"),
        ({"AWS_DEFAULT_REGION": "ap-south-1"}, None, "auto"),
        ({"AWS_PROFILE": "paris"}, None, "auto"),
        ({"AWS_PROFILE": "fast"}, None, "auto"),
        ({"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "eu-west-3", "auto"),
        ({"AWS_USE_FIPS_ENDPOINT": "true"}, "us-east-1", "auto"),
        (
            {"AWS_USE_FIPS_ENDPOINT": "true", "AWS_USE_DUALSTACK_ENDPOINT": "true"},
            "us-gov-west-1",
            "auto",
        ),
        ({"AWS_ENDPOINT_URL": "http://host:1/base"}, None, "auto"),
        ({}, None, "path"),
        ({}, "cn-north-1", "path"),
        ({"AWS_USE_FIPS_ENDPOINT": "true"}, "us-east-1", "path"),
    ],
)
def test_aws_itself_is_where_and_what_boto3_makes_of_the_machines_settings(
    environment: dict[str, str],
    region: str | None,
    style: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "config").write_text(
        "[profile paris]\nregion = eu-west-3\n"
        "[profile fast]\nregion = eu-north-1\ns3 =\n  use_accelerate_endpoint = true\n"
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = storage(region=region, addressing_style=style)

    expected, signed_for = Boto3Client(settings).get("bucket", "a/b c.txt")

    assert url_of(endpoint_of(settings), "bucket", "a/b c.txt") == normal(expected)
    assert region_of(settings) == signed_for


@pytest.mark.parametrize(("region", "expected"), [(None, "auto"), ("eu-west-3", "eu-west-3")])
def test_an_endpoint_of_ones_own_is_signed_for_as_boto3_does(
    region: str | None, expected: str
) -> None:
    settings = storage(endpoint_url="http://host:9000", region=region)

    _, signed_for = Boto3Client(settings).get("bucket", "key")

    assert region_of(settings) == signed_for == expected


def test_aws_is_found_without_asking_the_machine_for_its_role(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A credential process that runs leaves a file behind."""
    (tmp_path / "config").write_text(
        f"[default]\nregion = eu-west-3\ncredential_process = touch {tmp_path / 'asked'}\n"
    )

    assert endpoint_of(StorageSettings()).host == "s3.eu-west-3.amazonaws.com"
    assert not (tmp_path / "asked").exists()


def test_a_missing_profile_is_said_as_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nowhere")

    with pytest.raises(SettingsError, match=r"AWS_PROFILE is wrong: .*nowhere"):
        endpoint_of(StorageSettings())


def test_the_connection_goes_to_the_bare_address() -> None:
    endpoint = endpoint_of(storage(endpoint_url="http://[::1]:5000"))

    place = endpoint.place("bucket", "key")

    assert (place.connect_host, place.port, place.host_header) == ("::1", 5000, "[::1]:5000")


def test_no_proxy_is_found_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")

    assert proxy_for("https", "host") is None
    assert proxy_authorization("https", "host") is None


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("http://proxy.example:3128", ("proxy.example", 3128)),
        ("http://proxy.example:3128/", ("proxy.example", 3128)),
        ("proxy.example:3128", ("proxy.example", 3128)),
        ("//proxy.example:3128", ("proxy.example", 3128)),
        ("http://proxy.example", ("proxy.example", 80)),
        ("http://[::1]:3128", ("::1", 3128)),
    ],
)
def test_the_environments_proxy_is_used(
    variable: str, value: str, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    assert proxy_for("https", "t3.storage.dev") == expected


@pytest.mark.parametrize(
    "no_proxy",
    ["", "*", "storage.dev", ".storage.dev", "dev,example.com", "storage.de", "t3.storage.dev:8443",
     "127.0.0.1", "[::1]", "::1"],
)  # fmt: skip
@pytest.mark.parametrize("host", ["t3.storage.dev", "t3.storage.dev:8443", "127.0.0.1", "[::1]"])
def test_no_proxy_excepts_what_it_excepts_for_boto3(
    no_proxy: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)

    goes_by_proxy = "https" in get_environ_proxies(f"https://{host}/bucket/key")

    assert (proxy_for("https", host) is not None) == goes_by_proxy
    assert (proxy_for("https", host.strip("[]")) is not None) == goes_by_proxy


def test_a_proxys_password_goes_into_its_header_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://Aladdin:open%20sesame@proxy:3128")

    assert proxy_for("https", "host") == ("proxy", 3128)
    # The example of RFC 7617
    assert proxy_authorization("https", "host") == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="


@pytest.mark.parametrize(
    "value",
    ["https://user:hunter2@proxy", "socks5://user:hunter2@proxy:1080", "http://user:hunter2@:1",
     "http://user:hunter2@proxy:notaport", "http://user:hunter2@[proxy"],
)  # fmt: skip
def test_an_unusable_proxy_is_named_without_its_password(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", value)

    with pytest.raises(SettingsError, match="HTTPS_PROXY cannot be used") as caught:
        proxy_for("https", "host")

    assert "hunter2" not in str(caught.value)


def test_signing_for_an_endpoint_of_ones_own_imports_nothing_of_weight() -> None:
    code = f"""
import json, sys, types
sys.path.insert(0, {str(ROOT)!r})
weights = types.ModuleType("weights")  # what the package itself imports is not the question here
weights.__path__ = [{str(ROOT / "weights")!r}]
sys.modules["weights"] = weights
from s3.endpoint import endpoint_of, proxy_for
from s3.signing import Signer, credentials_of, region_of
class Secret:
    def get_secret_value(self): return "secret"
class Settings:
    access_key_id, secret_access_key, session_token = "key", Secret(), None
    endpoint_url, region, addressing_style = "https://host", None, "auto"
place = endpoint_of(Settings).place("bucket", "key")
proxy_for("https", place.connect_host)
Signer(credentials_of(Settings), region_of(Settings)).headers("GET", place.host_header, place.path, "", {{}})
print(json.dumps([*sys.modules]))
"""

    loaded = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )

    heavy = {
        "boto3",
        "botocore",
        "urllib3",
        "urllib.request",
        "http.client",
        "pydantic",
        "settings",
    }
    assert heavy.isdisjoint(json.loads(loaded.stdout))
