"""The gateway's heap lies in huge pages where the system has them, and what it starts has its memory as ever."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gateway import huge_pages
from gateway.huge_pages import SETTINGS, restart_in_huge_pages
from tests.support.cog_server import REPOSITORY
from tests.support.gateway_server import GatewayServer

needs_huge_pages = pytest.mark.skipif(
    not huge_pages._can_gain(), reason="needs Linux with huge pages and glibc 2.35"
)
# What it is, and what one that it starts would be.
PROGRAM = """
import json, os, sys
from gateway.huge_pages import restart_in_huge_pages
restart_in_huge_pages()
print(json.dumps({
    "pid": os.getpid(), "arguments": sys.argv, "prefix": sys.prefix, "environment": dict(os.environ),
    "maps": open("/proc/self/smaps").read(),
}))
"""


def asks_for_huge_pages(smaps: str) -> bool:
    """Of the heap."""
    found = re.search(r"\[heap\]\n(?:.*\n)*?VmFlags: (.*)\n", smaps)
    assert found
    return "hg" in found.group(1).split()


def told(**more: str) -> dict[str, object]:
    environment = {
        **{name: value for name, value in os.environ.items() if name not in SETTINGS},
        "PYTHONPATH": str(REPOSITORY),
        **more,
    }
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "one", "two words"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        out, _ = process.communicate(timeout=60)
        answer: dict[str, object] = json.loads(out)
        answer["is_same"] = answer["pid"] == process.pid
        assert answer["arguments"] == ["-c", "one", "two words"]
        assert answer["prefix"] == sys.prefix
        assert answer["environment"] == environment
        return answer


@needs_huge_pages
def test_it_goes_on_as_the_same_process_with_the_same_environment() -> None:
    answer = told()
    assert answer["is_same"]
    assert asks_for_huge_pages(str(answer["maps"]))


@needs_huge_pages
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTHONMALLOC", "pymalloc"),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2"),
        ("LD_PRELOAD", ""),
        ("PYTHONDEVMODE", "1"),
    ],
)
def test_an_owner_who_has_chosen_knows_better(name: str, value: str) -> None:
    assert not asks_for_huge_pages(str(told(**{name: value})["maps"]))


@pytest.fixture
def restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is executed where all is as it should be, but for what a test changes."""
    executed: list[str] = []

    def execute(path: str, *_: object) -> None:
        executed.append(path)
        raise PermissionError

    for name in ("LD_PRELOAD", "PYTHONDEVMODE", *SETTINGS):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.41")
    monkeypatch.setattr(os, "execve", execute)
    return executed


def test_a_restart_that_is_refused_changes_nothing(restarts: list[str]) -> None:
    before = dict(os.environ)
    restart_in_huge_pages()
    assert restarts == [sys.executable]
    assert dict(os.environ) == before


@pytest.mark.parametrize("allowed", ["[always] madvise never", "always madvise [never]", None])
def test_where_asking_for_them_changes_nothing_it_stays_as_it_is(
    allowed: str | None, tmp_path: Path, restarts: list[str]
) -> None:
    if allowed is None:
        (tmp_path / "enabled").unlink()
    else:
        (tmp_path / "enabled").write_text(f"{allowed}\n")
    restart_in_huge_pages()
    assert not restarts


@pytest.mark.parametrize("version", ["glibc 2.34", "glibc 2.x", "musl 1.2.5", "", None])
def test_another_c_library_has_no_such_setting(
    version: str | None, restarts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "confstr", lambda _: version)
    restart_in_huge_pages()
    assert not restarts


@needs_huge_pages
def test_cogs_server_has_its_memory_as_ever(
    gateway_environment: dict[str, str], runner_folder: Path
) -> None:
    with GatewayServer(gateway_environment, runner_folder) as gateway:
        (cog,) = (
            child
            for child in psutil.Process(gateway.process.pid).children()
            if "cog.server.http" in child.cmdline()
        )
        mine = Path(f"/proc/{gateway.process.pid}/smaps").read_text()
        assert asks_for_huge_pages(mine)
        assert not SETTINGS.keys() & cog.environ().keys()
        assert not asks_for_huge_pages(Path(f"/proc/{cog.pid}/smaps").read_text())
