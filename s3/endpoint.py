"""Where S3 requests go: the server, its Host header and the path of an object, and the proxy on the way there;
and whose certificates are believed.

It opens no connection and signs nothing. With an endpoint in the settings it needs the standard library alone; AWS's
own host names are left to boto3.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import SplitResult, quote, unquote, urlsplit

if TYPE_CHECKING:
    from settings import StorageSettings

Scheme = Literal["http", "https"]
Style = Literal["path", "virtual"]

_DEFAULT_PORTS: dict[Scheme, int] = {"http": 80, "https": 443}
_IPV4 = re.compile(r"\d{1,3}(\.\d{1,3}){3}")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PROBE = "some-bucket"  # a bucket's name that fits into a host name


@dataclass(frozen=True, slots=True)
class Place:
    """Where one object is asked for.

    `connect_host` is a name or an address, IPv6 without brackets. `host_header` has the port only where it is not the
    scheme's own. `path` is percent-encoded, as it is sent and as it is signed.
    """

    connect_host: str
    port: int
    host_header: str
    path: str


@dataclass(frozen=True)
class Endpoint:
    """An S3 server. `host` is in lower case, IPv6 without brackets; `base_path` percent-encoded, "" or "/…"."""

    scheme: Scheme
    host: str
    port: int
    base_path: str
    style: Style

    def place(self, bucket: str, key: str) -> Place:
        """Where to ask for `key` of `bucket`.

        A bucket that does not fit into a host name is named in the path, also in virtual style, as boto3 does it: one
        with capitals or underscores, and under https one with dots, since a certificate for *.host holds for a single
        label. So it is where the server is an IP address (there boto3 puts a bucket with dots before the address,
        a host that cannot exist). Raises UnicodeEncodeError for a key that UTF-8 cannot express.
        """
        if self.style == "virtual" and self._has_host_for(bucket):
            host = f"{bucket}.{self.host}"
            path = f"{self.base_path}/{_encoded(key)}"
        else:
            host = self.host
            path = f"{self.base_path}/{_encoded(bucket)}/{_encoded(key)}"
        header = f"[{host}]" if ":" in host else host
        if self.port != _DEFAULT_PORTS[self.scheme]:
            header = f"{header}:{self.port}"
        return Place(host, self.port, header, path)

    def _has_host_for(self, bucket: str) -> bool:
        if _is_address(self.host) or _is_address(bucket) or not 3 <= len(bucket) <= 63:
            return False
        labels = bucket.split(".")
        if len(labels) > 1 and self.scheme == "https":
            return False
        return all(_LABEL.fullmatch(label) for label in labels)


def endpoint_of(settings: StorageSettings) -> Endpoint:
    """The server that `s3.connect(settings)` would talk to, in the same style.

    Without an endpoint that is AWS, and boto3 is asked (and imported): it knows partitions, dual-stack, FIPS and
    acceleration. Raises SettingsError for an AWS profile that is not there.
    """
    if settings.endpoint_url is None:
        url, _ = boto3_target(settings)
        if (url.hostname or "").startswith(f"{_PROBE}."):
            url = url._replace(netloc=url.netloc.removeprefix(f"{_PROBE}."))
            return _endpoint(url, url.path.removesuffix(f"/{_PROBE}"), "virtual")
        return _endpoint(url, url.path.removesuffix(f"/{_PROBE}/{_PROBE}"), "path")
    url = urlsplit(settings.endpoint_url)
    style: Style = "virtual" if settings.addressing_style == "virtual" else "path"
    return _endpoint(url, _encoded(url.path.rstrip("/")), style)


def boto3_target(settings: StorageSettings) -> tuple[SplitResult, str]:
    """The URL boto3 would send a request for a sample object to, and the region it would sign it for.

    A presigned URL is asked for, since the client's own `meta.endpoint_url` is not what it uses with FIPS in
    us-east-1 (s3-fips.aws-global.amazonaws.com, which does not exist) or with acceleration.
    """
    from pydantic import SecretStr

    from s3.client import connect

    # A keypair of no one: asking the machine for its role here would take seconds where it has none.
    nobody = {"access_key_id": "nobody", "secret_access_key": SecretStr("nothing")}
    client = connect(settings.model_copy(update={**nobody, "session_token": None}))
    regions: list[str] = []
    client.meta.events.register(
        "before-sign.s3", lambda region_name, **_: regions.append(region_name)
    )
    url = client.generate_presigned_url("get_object", Params={"Bucket": _PROBE, "Key": _PROBE})
    return urlsplit(url), regions[-1]


def proxy_for(scheme: Scheme, host: str) -> tuple[str, int] | None:
    """Host and port of the proxy that the environment names for `host` (with or without its port), as boto3 sees it.

    HTTPS_PROXY or HTTP_PROXY, whatever their case, unless NO_PROXY excepts the host. Raises SettingsError where the
    variable is no plain http:// proxy.
    """
    proxy = _proxy(scheme, host)
    return None if proxy is None else (proxy.hostname or "", proxy.port or 80)


def proxy_authorization(scheme: Scheme, host: str) -> str | None:
    """The Proxy-Authorization header for that proxy, made of the user and password in its URL. A secret."""
    proxy = _proxy(scheme, host)
    if proxy is None or not proxy.username or not proxy.password:
        return None
    from base64 import b64encode

    pair = f"{unquote(proxy.username)}:{unquote(proxy.password)}"
    return f"Basic {b64encode(pair.encode()).decode()}"


def ca_bundle() -> str:
    """The file or folder of the authorities that are trusted, as boto3 finds it in the environment: AWS_CA_BUNDLE or
    REQUESTS_CA_BUNDLE where set, else certifi's."""
    named = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")
    if named:
        return named
    import certifi

    return certifi.where()


def _proxy(scheme: Scheme, host: str) -> SplitResult | None:
    variable = f"{scheme}_proxy"
    if not any(name.lower() == variable and value for name, value in os.environ.items()):
        return None
    # Imported only now: it takes 50 ms, and hardly any machine with a GPU is behind a proxy.
    from urllib.request import getproxies, proxy_bypass

    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"  # else the last part of an IPv6 address would be taken for a port
    value = getproxies().get(scheme)
    if not value or proxy_bypass(host):
        return None
    try:
        proxy = urlsplit(value if "://" in value else f"http://{value.removeprefix('//')}")
        is_usable = proxy.scheme == "http" and bool(proxy.hostname) and proxy.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        from settings import SettingsError

        # Without its value: it may hold a password.
        raise SettingsError(
            f"{variable.upper()} cannot be used: only a plain HTTP proxy can. Example: "
            f"{variable.upper()}=http://proxy.example.com:3128 (or name the S3 server in NO_PROXY)"
        )
    return proxy


def _endpoint(url: SplitResult, base_path: str, style: Style) -> Endpoint:
    scheme: Scheme = "http" if url.scheme == "http" else "https"
    return Endpoint(
        scheme, url.hostname or "", url.port or _DEFAULT_PORTS[scheme], base_path, style
    )


def _encoded(path: str) -> str:
    """Every byte but A-Za-z0-9-._~ and the slash, as the canonical URI of a signature has it: no normalisation."""
    return quote(path, safe="/")


def _is_address(host: str) -> bool:
    return ":" in host or _IPV4.fullmatch(host) is not None
