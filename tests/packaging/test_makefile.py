"""What `make` says to a person whose machine is not ready for it. Installing is .ci/run's to prove."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.system_program("make")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_make_alone_lists_the_two_commands() -> None:
    listed = make()

    assert listed.returncode == 0
    assert "make demo" in listed.stdout
    assert "make test" in listed.stdout


def test_this_python_is_good_enough() -> None:
    assert make("python", f"PYTHON={sys.executable}").returncode == 0


@pytest.mark.parametrize("python", ["/no/such/python", "false", ""])
def test_without_a_python_that_is_new_enough_it_says_which_and_what_to_do(python: str) -> None:
    refused = make("python", f"PYTHON={python}")

    assert refused.returncode != 0
    assert "Python 3.11 or newer is needed" in refused.stderr
    assert "make PYTHON=/path/to/python3.11" in refused.stderr


def test_a_python_without_venv_is_told_which_package_it_lacks(tmp_path: Path) -> None:
    incomplete = tmp_path / "python"
    incomplete.write_text(
        '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n' + f'exec "{sys.executable}" "$@"\n'
    )
    incomplete.chmod(0o755)

    refused = make("python", f"PYTHON={incomplete}")

    assert refused.returncode != 0
    assert f"sudo apt-get install python3.{sys.version_info.minor}-venv" in refused.stderr
