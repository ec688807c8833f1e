"""What the text of an environment variable may be: each check returns the value in order, or raises ValueError.

Messages continue the variable's name ("MODEL_PATH must not be empty"). Which variables there are is settings.py's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr


def check_bucket_name(value: str) -> str:
    """Return the name if it can be a bucket's, else raise ValueError."""
    if "/" in value or ":" in value:
        raise ValueError("must be the bucket's bare name, without s3:// or a path")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]", value):
        raise ValueError("is not a bucket name: 3 to 63 letters, digits, dots and hyphens")
    return value


def key_prefix(value: str) -> str:
    value = value.strip("/")
    if any(part in ("", ".", "..") for part in value.split("/")) and value:
        raise ValueError("must be a plain path, without empty, '.' or '..' parts")
    if any(ord(character) < 32 or character == "\\" for character in value):
        raise ValueError("must not contain control characters or backslashes")
    return value


def check_model_path(value: str) -> str:
    """Return a model's path without slashes at its ends if it is a plain one, else raise ValueError."""
    if not key_prefix(value):
        raise ValueError("must not be empty")
    return key_prefix(value)


def split_model_paths(value: str) -> tuple[str, ...]:
    paths = tuple(check_model_path(path.strip()) for path in value.split(","))
    if len(set(paths)) < len(paths):
        raise ValueError("must not name a model twice")
    return paths


def http_url(value: str) -> str:
    try:
        url = urlsplit(value)
        port_is_valid = url.port is None or url.port > 0
    except ValueError:
        port_is_valid = False
    if (
        not port_is_valid
        or url.scheme not in ("http", "https")
        or not re.fullmatch(r"[A-Za-z0-9.-]+|[0-9a-f:.]+", url.hostname or "")
    ):
        raise ValueError("must be a URL such as https://host or http://host:port")
    if url.username or url.password or url.query or url.fragment:
        raise ValueError("must not carry a user, a password, a query or a fragment")
    return value.rstrip("/")


def with_scheme(value: Any) -> Any:
    """An emulator's address is often written without one."""
    return f"http://{value}" if isinstance(value, str) and "://" not in value else value


def absolute_path(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError("must be an absolute path")
    return value


def digests(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = tuple(part.strip().lower() for part in value.split(","))
    if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in found):
        raise ValueError("must be SHA-256s: 64 hexadecimal digits each, with commas between them")
    return found


def without_spaces(value: str) -> str:
    if not value.isprintable() or " " in value:
        raise ValueError("contains a space or a control character: was it pasted whole?")
    return value


def secret_without_spaces(value: SecretStr) -> SecretStr:
    without_spaces(value.get_secret_value())
    return value
