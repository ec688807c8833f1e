"""What tests of S3's clients and signatures share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.aws_environment import forget_this_machine


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Neither this machine's AWS settings, nor its proxies, nor a search for its role."""
    forget_this_machine(monkeypatch, tmp_path)
    return monkeypatch
