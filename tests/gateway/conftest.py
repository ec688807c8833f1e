"""The folder of the runner of a few lines, which tests of the whole gateway share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.gateway_server import small_runner


@pytest.fixture(scope="session")
def runner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runner(tmp_path_factory.mktemp("runner"))
