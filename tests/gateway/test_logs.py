"""Every line is one JSON object or one line of text, with the prediction it is about and without secrets."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.logs import Format, bind_prediction, bind_trace, configure

ROOT = Path(__file__).resolve().parents[2]

log = logging.getLogger("gateway.somewhere")


@pytest.fixture
def lines() -> Iterator[Callable[[Format], io.StringIO]]:
    """Configures logging for one test, and puts all of it back."""
    names = ("", "gateway", "images", "s3", "httpx", "httpcore")
    loggers = [logging.getLogger(name) for name in names]
    loggers += [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access")]
    before = [(a, a.level, a.handlers[:], a.propagate) for a in loggers]
    # `force` closes the handlers it removes; pytest's own are needed again.
    logging.getLogger().handlers.clear()

    def start(format: Format) -> io.StringIO:
        stream = io.StringIO()
        configure(format, stream)
        return stream

    yield start
    logging.captureWarnings(False)
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


Start = Callable[[Format], io.StringIO]


def parsed(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_with_time_level_logger_and_message(lines: Start) -> None:
    stream = lines("json")
    before = datetime.now(UTC)

    log.info("listens on %s:%d", "127.0.0.1", 5000)

    (line,) = parsed(stream)
    assert list(line) == ["timestamp", "level", "logger", "message"]
    assert (line["level"], line["logger"]) == ("info", "gateway.somewhere")
    assert line["message"] == "listens on 127.0.0.1:5000"
    assert before <= datetime.fromisoformat(line["timestamp"]) <= datetime.now(UTC)
    assert line["timestamp"].endswith("Z")


def test_an_exception_is_text_in_the_same_line(lines: Start) -> None:
    stream = lines("json")

    try:
        raise ValueError("the bucket is gone")
    except ValueError:
        log.exception("not recorded")

    (line,) = parsed(stream)
    assert line["level"] == "error"
    assert line["exception"].startswith("Traceback (most recent call last):")
    assert line["exception"].endswith("ValueError: the bucket is gone")


def test_what_concerns_a_prediction_carries_its_id_and_nothing_else_does(lines: Start) -> None:
    stream = lines("json")

    async def work(name: str) -> None:
        with bind_prediction(name), bind_trace("t" + name):
            log.info("begins")
            await asyncio.sleep(0)
            await asyncio.create_task(inner())
        log.info("over")

    async def inner() -> None:
        log.info("within")

    async def both() -> None:
        await asyncio.gather(work("one"), work("two"))

    asyncio.run(both())
    seen = parsed(stream)

    for name in ("one", "two"):
        about = [line for line in seen if line.get("prediction_id") == name]
        assert [line["message"] for line in about] == ["begins", "within"]
        assert [line["trace_id"] for line in about] == [f"t{name}"] * 2
    assert [line["message"] for line in seen if "prediction_id" not in line] == ["over"] * 2


def test_fields_given_beside_a_message_are_fields_of_the_line(lines: Start) -> None:
    stream = lines("json")

    log.warning("refused", extra={"status": 429, "color_message": "\x1b[1mrefused\x1b[0m"})

    (line,) = parsed(stream)
    assert line["status"] == 429
    assert "color_message" not in line


def test_the_gateway_and_its_rooms_are_heard_and_what_is_loud_is_not(lines: Start) -> None:
    stream = lines("json")

    for name in ("gateway.desk", "images.records", "uvicorn.error"):
        logging.getLogger(name).info("heard")
    for name in ("uvicorn.access", "httpx", "httpcore.http11", "botocore", "asyncio", "urllib3"):
        logging.getLogger(name).info("not heard")
    logging.getLogger("httpx").warning("heard")

    assert [line["message"] for line in parsed(stream)] == ["heard"] * 4


@pytest.mark.parametrize("format", ["json", "text"])
def test_what_a_caller_wrote_cannot_begin_a_line(lines: Start, format: Format) -> None:
    stream = lines(format)
    forged = 'x\n{"level": "critical"}\r\x1b[2Kall is well\u2028'

    with bind_prediction(forged):
        log.info("the input %s", forged)

    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize(
    ("before", "secret", "after"),
    [
        ("the key ", "gw_0aZ-_" + "b7" * 19, " was used"),
        ("Authorization: Bearer ", "r8_AbCdEf0123456789", " came"),
        ("signed with ", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", " at last"),
        ("GET https://b.example/a.png?X-Amz-Signature=", "0123456789abcdef", "&X-Amz-Expires=60"),
        ("GET https://b.example/a.png?X-Amz-Credential=", "AKIA%2F20261126", "&x=1"),
    ],
)
def test_a_secret_that_slipped_into_a_message_is_cut_out(
    lines: Start, format: Format, before: str, secret: str, after: str
) -> None:
    stream = lines(format)

    try:
        raise RuntimeError(f"{before}{secret}{after}")
    except RuntimeError:
        log.exception("%s%s%s", before, secret, after)

    assert secret[8:] not in stream.getvalue()
    assert stream.getvalue().count(after) >= 2
    if format == "json":
        assert len(parsed(stream)) == 1


def test_text_is_for_people_and_has_the_traceback_below(lines: Start) -> None:
    stream = lines("text")

    with bind_prediction("abc"):
        try:
            raise ValueError("no")
        except ValueError:
            log.warning("goes on", exc_info=True)

    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("Z WARNING gateway.somewhere: goes on prediction_id=abc")
    assert (rest[0], rest[-1]) == ("Traceback (most recent call last):", "ValueError: no")


def test_warnings_of_python_are_lines_too() -> None:
    code = (
        "import warnings; from gateway.logs import configure; configure('json');"
        "warnings.warn('old ways', stacklevel=1)"
    )

    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert told.stdout == ""
    line = json.loads(told.stderr)
    assert (line["logger"], line["level"]) == ("py.warnings", "warning")
    assert "old ways" in line["message"]
