"""scripts/prepare_model.py before a person: its real stages on a real terminal, while a download is held up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.preparation.conftest import BASE, FINETUNE, LIGHTNING, SCRIPT, Models
from tests.support.hub import LoopbackHub
from tests.support.screen import PseudoTerminal, Screen
from weights import Bucket

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def terminal() -> Iterator[PseudoTerminal]:
    with PseudoTerminal(80) as opened:
        yield opened


@pytest.fixture
def start(
    loopback_hub: LoopbackHub,
    environment: dict[str, str],
    terminal: PseudoTerminal,
    tmp_path: Path,
) -> Iterator[Start]:
    """Run the script with its standard error on the terminal, up to where the Hub holds a large file back."""
    children: list[subprocess.Popen[str]] = []
    unset = ("COLUMNS", "LINES", "NO_COLOR", "TMUX", "XTERM_VERSION")

    def started(*arguments: str | Path) -> subprocess.Popen[str]:
        loopback_hub.hold("/lfs/")
        child = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments, "--destdir", tmp_path / "prepared"],
            env={
                **{name: value for name, value in environment.items() if name not in unset},
                "TERM": "xterm-256color",
            },
            stdout=subprocess.PIPE,
            stderr=terminal.device,
            text=True,
        )
        children.append(child)
        loopback_hub.wait_until_held()
        return child

    yield started
    loopback_hub.release()
    for child in children:
        child.kill()
        child.wait()


def stands(*words: str) -> Callable[[Screen], bool]:
    """The lines of the screen begin with these."""
    return lambda screen: [line[2:].partition(" ")[0] for line in screen.lines] == list(words)


def test_all_stages_of_a_preparation_are_one_display_and_json_stays_alone_on_standard_output(
    loopback_hub: LoopbackHub,
    start: Start,
    terminal: PseudoTerminal,
    bucket: Bucket,
    models: Models,
) -> None:
    loopback_hub.add(FINETUNE, models.finetune)
    child = start(FINETUNE, bucket.name, "--json")
    lines = terminal.wait_for(stands("Download", "Check", "Try", "Hash", "Upload", "Total"))
    assert "━" in lines[0]
    assert lines[1].split()[1:] == lines[3].split()[1:]  # as many bytes to check as to hash
    assert lines[4].startswith("  Upload    up to ")
    loopback_hub.release()
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    assert json.loads(out)["model"] == FINETUNE
    lines = terminal.settle()
    assert [line[:10] for line in lines] == [
        *("✓ Download", "✓ Check   ", "✓ Try VAE ", "✓ Hash    ", "✓ Upload  ", "  Total   "),
    ]
    assert (terminal.screen.row, terminal.screen.column) == (6, 0)


def test_models_of_a_truss_config_are_shown_one_after_another(
    lightning_hub: LoopbackHub,
    start: Start,
    terminal: PseudoTerminal,
    bucket: Bucket,
    tmp_path: Path,
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model_cache: [{{repo_id: {LIGHTNING}}}, {{repo_id: {BASE}}}]")
    child = start(config, bucket.name, "--from-truss")
    lines = terminal.wait_for(
        stands("Download", "Check", "Convert", "Try", "Hash", "Upload", "Total")
    )
    assert lines[-1].endswith("1 more model to come")
    lightning_hub.release()
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0, terminal.settle()
    assert f"{BASE} (2 of 2)" in out
    names = [line[2:].partition(" ")[0] for line in terminal.settle()]
    assert names == [
        *("Download", "Check", "Convert", "Try", "Hash", "Upload"),
        *("Download", "Check", "Try", "Hash", "Upload", "Total"),
    ]


def test_interrupted_preparation_leaves_whole_lines(
    loopback_hub: LoopbackHub,
    start: Start,
    terminal: PseudoTerminal,
    bucket: Bucket,
    models: Models,
) -> None:
    loopback_hub.add(FINETUNE, models.finetune)
    child = start(FINETUNE, bucket.name)
    terminal.wait_for(stands("Download", "Check", "Try", "Hash", "Upload", "Total"))
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    stage, *others = terminal.settle()
    assert stage.startswith("✗ Download")
    assert others == ["", "Interrupted. Run the same command again: finished files are kept."]
    assert terminal.screen.column == 0
