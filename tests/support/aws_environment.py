"""An environment in which this machine's own AWS settings and proxies do not exist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def forget_this_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No variables, no search for a role; the files of AWS's settings are `config` and `credentials` in `folder`."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
