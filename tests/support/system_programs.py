"""`@pytest.mark.system_program("curl")`: a test that needs a program which pip cannot install.

Missing on a person's machine, the test is skipped and says what it needed. Where
REQUIRE_SYSTEM_PROGRAMS=1, as in .ci/run, the same test fails instead: nothing is skipped unseen.
tests/conftest.py imports the hook, so this holds for every test.
"""

from __future__ import annotations

import os
import shutil

import pytest


def missing_programs(item: pytest.Item) -> list[str]:
    names = [name for mark in item.iter_markers("system_program") for name in mark.args]
    return [name for name in names if shutil.which(name) is None]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = missing_programs(item)
    if not missing:
        return
    reason = f"needs {', '.join(missing)}, not found on PATH"
    if os.environ.get("REQUIRE_SYSTEM_PROGRAMS") == "1":
        pytest.fail(f"{reason}, and REQUIRE_SYSTEM_PROGRAMS=1", pytrace=False)
    pytest.skip(reason)
