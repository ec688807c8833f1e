"""How the gateway's own log lines look: JSON for machines or text for people, on stderr, with the prediction's id.

Modules log with the standard library and know nothing of this. Cog's lines are passed through elsewhere, as they are.
"""

import logging
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.processors import (
    EventRenamer,
    JSONRenderer,
    TimeStamper,
    format_exc_info,
)
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name

Format = Literal["json", "text"]
_Line = MutableMapping[str, Any]

_TALKATIVE = ("gateway", "images", "s3", "uvicorn")

# A net below the care that messages are written with: keys of callers, tokens, and what makes a URL presigned.
_SECRETS = re.compile(
    r"""(gw_|whsec_)[A-Za-z0-9+/=_-]{8,}"""
    r"""|((?:Bearer|Token)\s+)[^\s"'\\]+"""
    r"""|(X-Amz-(?:Signature|Credential|Security-Token)=)[^\s&"'\\]+""",
    re.IGNORECASE,
)
# What a terminal or a reader by lines would take for something else than text.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _Formatter(ProcessorFormatter):
    def format(self, record: logging.LogRecord) -> str:
        return _without_secrets(super().format(record))


def configure(format: Format, stream: TextIO | None = None) -> None:
    """Take over the standard library's logging, for the whole process; to be called before anything is logged."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        _Formatter(
            foreign_pre_chain=[
                merge_contextvars,
                add_logger_name,
                add_log_level,
                ExtraAdder(),
                TimeStamper(fmt="iso", utc=True),
            ],
            processors=[
                ProcessorFormatter.remove_processors_meta,
                format_exc_info,
                EventRenamer("message"),
                _in_order,
                JSONRenderer(default=str) if format == "json" else _as_text,
            ],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.INFO)
    # Its lines are metrics here; and httpx tells of each webhook, at INFO.
    for name in ("uvicorn.access", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.captureWarnings(True)


@contextmanager
def bind_prediction(prediction_id: str) -> Iterator[None]:
    """What is logged inside carries the id; also in tasks that are started inside, for as long as they run."""
    with bound_contextvars(prediction_id=prediction_id):
        yield


@contextmanager
def bind_trace(trace_id: str) -> Iterator[None]:
    """What is logged inside names its trace."""
    with bound_contextvars(trace_id=trace_id):
        yield


def _in_order(_: Any, __: str, line: _Line) -> _Line:
    """What every line has comes first, the long part last."""
    line.pop("color_message", None)  # uvicorn's, of the same words
    first = {
        name: line.pop(name)
        for name in ("timestamp", "level", "logger", "message", "prediction_id", "trace_id")
        if name in line
    }
    exception = {"exception": line.pop("exception")} if "exception" in line else {}
    return {**first, **line, **exception}


def _as_text(_: Any, __: str, line: _Line) -> str:
    """One line of text, whatever the message holds: only a traceback may add more."""
    exception = line.pop("exception", "")
    time, level, logger, message = (
        line.pop(name) for name in ("timestamp", "level", "logger", "message")
    )
    fields = "".join(f" {name}={_plain(value)}" for name, value in line.items())
    text = f"{time} {level.upper():7} {logger}: {_plain(message)}{fields}"
    return "\n".join([text, *(_plain(row) for row in exception.splitlines())])


def _plain(value: object) -> str:
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], str(value))


def _without_secrets(text: str) -> str:
    return _SECRETS.sub(lambda found: "".join(part or "" for part in found.groups()) + "...", text)
