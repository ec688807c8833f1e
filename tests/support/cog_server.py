"""The real Cog server as a child process: start it, ask it, read its log, stop all of it.

It sees only the environment a test gives it. What is asked and what must come back is the tests' business.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RUNNER = "predict.py:Runner"
INHERITED = ("PATH", "HOME", "LANG", "OMP_NUM_THREADS", "TMPDIR", "COVERAGE_PROCESS_START")
# Keys in the home directory of whoever runs the tests, or of the machine they run on, must not make one pass.
NO_AMBIENT_CREDENTIALS = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
TAIL_LINES = 80
STOP_SECONDS = 20.0
SLOT_SECONDS = 5.0

_running: list[CogServer] = []


@dataclass(frozen=True)
class Response:
    """One answer of the server; `body` is the parsed JSON, or the text when it is not JSON."""

    status: int
    headers: Mapping[str, str]
    body: Any


class ServerDiedError(AssertionError):
    """The server ended, or did not finish starting in time; the message carries its log."""


class CogServer:
    """`with CogServer(environment) as server:` runs a Cog server until the block ends.

    Entering waits until the health check says READY or SETUP_FAILED: both are answers, and a test of a wrong
    bucket wants the second. `environment` is everything the runner sees beside PATH, HOME, LANG and
    OMP_NUM_THREADS: no credential or setting from outside can make a test pass.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        cwd: Path = REPOSITORY,
        *,
        runner: str = RUNNER,
        concurrency: int = 2,
        setup_timeout: float = 120.0,
    ) -> None:
        self.environment = dict(environment)
        self.cwd = cwd
        self.runner = runner
        self.concurrency = concurrency
        self.setup_timeout = setup_timeout
        self.port = 0
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._lines: list[str] = []
        self._lines_changed = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def logs(self) -> str:
        """Everything server and runner have printed up to now, stdout and stderr together."""
        with self._lines_changed:
            return "".join(self._lines)

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def __enter__(self) -> Self:
        try:
            self._start()
            self._wait_until_settled()
        except BaseException:
            self.stop()
            raise
        _running.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _running.remove(self)
        self.stop()
        if error is not None:
            print(f"--- the Cog server's last lines ---\n{self.tail()}", file=sys.stderr)

    def health(self) -> dict[str, Any]:
        """The body of /health-check: `status`, `setup` (status, logs, times) and `version`."""
        body = self.request("GET", "/health-check").body
        assert isinstance(body, dict), f"/health-check answered {body!r}"
        return body

    def predict(
        self,
        input: Mapping[str, Any] | None = None,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 120.0,
        **fields: Any,
    ) -> Response:
        """PUT /predictions/<id> where an id is given, POST /predictions where not.

        `fields` go beside `input` in the body (`webhook`, `context`, ...). Cog gives a slot back a moment after the
        answer that it was taken for, so a 409 is asked again for up to SLOT_SECONDS.
        """
        method, path = ("POST", "/predictions") if id is None else ("PUT", f"/predictions/{id}")
        body = {"input": dict(input or {}), **fields}
        deadline = time.monotonic() + SLOT_SECONDS
        while True:
            response = self.request(method, path, body, headers, timeout=timeout)
            if response.status != HTTPStatus.CONFLICT or time.monotonic() > deadline:
                return response
            time.sleep(0.05)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 30.0,
    ) -> Response:
        """Any request; a `body` of bytes is sent as it is, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        payload = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(
                method, path, payload, {"Content-Type": "application/json", **(headers or {})}
            )
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
        finally:
            connection.close()
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = text
        names = {name.lower(): value for name, value in answer.getheaders()}
        return Response(answer.status, names, parsed)

    def wait_for_log(self, text: str, timeout: float = 30.0) -> None:
        """Return as soon as `text` stands in the log; fail with the log's tail when it never does."""
        with self._lines_changed:
            found = self._lines_changed.wait_for(
                lambda: any(text in line for line in self._lines), timeout
            )
        if not found:
            raise AssertionError(f"the log never said {text!r}; its last lines:\n{self.tail()}")

    def tail(self, lines: int = TAIL_LINES) -> str:
        with self._lines_changed:
            return "".join(self._lines[-lines:])

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """SIGTERM, then SIGKILL to whatever is left of the process group. Twice does nothing more."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._say(f"[tests] the server did not stop within {timeout:g} s of SIGTERM\n")
        # The worker is the server's child and in the same group: it outlives a server that was killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._reader is not None:
            self._reader.join(timeout)
        if process.stdout is not None:
            process.stdout.close()
        self._process = None

    def _start(self) -> None:
        self.port = _free_port()
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        # The server starts its worker as bare `python`: another one than ours would lack the packages.
        here = str(Path(sys.executable).parent)
        environment["PATH"] = os.pathsep.join([here, environment.get("PATH", os.defpath)])
        environment |= {
            "COG_PREDICT_TYPE_STUB": self.runner,
            "COG_MAX_CONCURRENCY": str(self.concurrency),
            "COG_SETUP_TIMEOUT": str(int(self.setup_timeout)),
            "PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
            **NO_AMBIENT_CREDENTIALS,
        }
        environment |= self.environment
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"],
            cwd=self.cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._collect, name="cog-log", daemon=True)
        self._reader.start()

    def _collect(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        for line in process.stdout:
            self._say(line)

    def _say(self, line: str) -> None:
        with self._lines_changed:
            self._lines.append(line)
            self._lines_changed.notify_all()

    def _wait_until_settled(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.setup_timeout + 10
        status = "not answering"
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                if self._reader is not None:
                    self._reader.join(5)
                raise ServerDiedError(
                    f"the Cog server ended with {self._process.returncode} while starting:\n{self.tail()}"
                )
            with contextlib.suppress(OSError, http.client.HTTPException):
                status = self.health()["status"]
            if status not in ("not answering", "UNKNOWN", "STARTING"):
                return
            time.sleep(0.05)  # there is nothing to wait on: the state can only be polled
        raise ServerDiedError(
            f"the Cog server was still {status} after {self.setup_timeout:g} s:\n{self.tail()}"
        )


def _free_port() -> int:
    """A port the system just gave out and took back; Cog has no way to say which one it chose itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Import this into a conftest.py: a failed test then shows the log of every server still running."""
    report = yield
    if report.failed:
        for server in _running:
            report.sections.append((f"Cog server at {server.url}", server.tail()))
    return report
