"""Child processes of the demo, and how they end: every one of them, whatever ends the demo.

Each child leads a session of its own, so that Ctrl-C reaches the demo alone, which then stops its children in order.
"""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

TAIL_LINES = 40
_STOP_TIMEOUT_S = 15.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# What would change what the demo shows, or hand a child a right that the demo did not give it.
_NOT_INHERITED = (
    *("AWS_", "COG_", "IMAGE_", "MODEL_", "PUBLIC_", "S3_"),
    *("ALLOW_", "API_KEYS", "BODY_", "CORS_", "LOG_FORMAT", "MAX_BODY_", "METRICS_", "OTEL_"),
    *("PREDICTION_", "QUEUE_", "RATE_", "SHUTDOWN_", "WEBHOOK_"),
)
_NO_AMBIENT_CREDENTIALS = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


class DemoError(Exception):
    """The demo cannot go on; the message is all that its reader needs."""


class Interruption(BaseException):
    """Ctrl-C, SIGTERM or a closed terminal; raised in the main thread."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Signals:
    """Turns the first signal that asks for an end into `Interruption`; later ones must not cut short the tidying up."""

    def __init__(self) -> None:
        self._deferred = False
        self._pending: int | None = None
        self._raised = False

    def listen(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def ignore(self) -> None:
        """From now on every signal is too late: an end is under way."""
        self._raised = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let nothing interrupt the block; what came meanwhile is raised at its end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._pending is not None:
            self._raise(self._pending)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._raised:
            return
        if self._deferred:
            self._pending = number
        else:
            self._raise(number)

    def _raise(self, number: int) -> None:
        self._raised = True
        raise Interruption(number)


class Child:
    """A child process that writes to a log file; `stop()` ends it and all that it started."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        self._log = log
        self._stopped = False
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        return self._process.wait()

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        """The last lines of what it wrote."""
        return "\n".join(self.log().splitlines()[-TAIL_LINES:])

    def stop(self) -> None:
        if self._stopped:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
        # Its own children are in its group, and outlive it if it was killed.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stopped = True


def inherited_environment() -> dict[str, str]:
    """This process's environment without any setting of ours or AWS's, and with loopback never sent to a proxy."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_INHERITED) and name != "PORT"
    }
    local = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))
    return environment | _NO_AMBIENT_CREDENTIALS | {"NO_PROXY": local, "no_proxy": local}


def free_port() -> int:
    """A port that the system just gave out; Cog cannot choose one itself and say which."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
