"""What is kept of one prediction, as a document: its fields, its name in the bucket, and its bytes.

It moves nothing (records.py does), and holds nothing secret: no key of a caller, no webhook's secret.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
)

from images.errors import RecordError

FORMAT: Final = "lightning-in-a-bucket/prediction/1"
LARGEST_RECORD = 8 * 1024 * 1024  # bytes; an input may hold an image
LONGEST_NAME = 64
PROBLEM_LENGTH = 300  # characters

Status = Literal["starting", "processing", "succeeded", "failed", "canceled"]
Outcome = Literal["succeeded", "failed", "canceled"]

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-](?:\.?[A-Za-z0-9_-])*")
_LAST_MILLISECOND = 10**13 - 1  # of the year 2286


def _without_credentials(url: str) -> str:
    # A record outlives its request and is read by whoever may read the images.
    if "@" in urlsplit(url).netloc:
        raise ValueError("must not hold a user name or password")
    return url


def _in_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]


class _Document(BaseModel):
    """Fields that a newer release added are kept as they are and written back."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Webhook(_Document):
    """Where a prediction's caller wants to be told, and of what; the secret that signs it stays in the settings."""

    url: Annotated[str, AfterValidator(_without_credentials)]
    events_filter: tuple[str, ...] | None = None
    sent_at: Moment | None = None
    """When the caller was told of the end; None: not yet."""
    gave_up_at: Moment | None = None
    """When telling of the end was given up, for good."""
    tried_until: Moment | None = None
    """Until then a replica tries again and again to tell of the end: others need not."""

    def untold(self) -> Webhook:
        """The same for another end, of which nobody was told."""
        return self.model_copy(update={"sent_at": None, "gave_up_at": None, "tried_until": None})


class PredictionRecord(_Document):
    """One prediction as the bucket keeps it. Make a new one with `PredictionRecord.of`."""

    format: Literal["lightning-in-a-bucket/prediction/1"] = FORMAT
    id: str = Field(min_length=1)
    input: dict[str, JsonValue]
    input_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    webhook: Webhook | None = None
    status: Status = "starting"
    output: JsonValue = None
    error: str | None = None
    metrics: dict[str, JsonValue] = {}
    logs: str = ""
    created_at: Moment
    started_at: Moment | None = None
    completed_at: Moment | None = None
    owner: str = ""
    """The replica that works on it, or did."""
    claim: str = ""
    """Random, new with every claim: two claims by one replica are two."""
    attempts: int = Field(0, ge=0)
    """How often it was claimed and not given back: more than once when a replica died over it."""
    reruns: int = Field(0, ge=0)
    """How often it was begun anew after an end that let it (`may_run_again`): each of them is an end of its own."""
    lease_seconds: float = Field(0, ge=0, allow_inf_nan=False)
    """How long after the record was last written others take its owner to be alive."""
    background: bool = False
    """It goes on without its caller, so whoever takes it over generates it. Otherwise nobody waits for it any more."""
    cancel_requested: bool = False
    """Somebody wants it canceled who is not its owner; the owner sees it when it renews its lease."""
    may_run_again: bool = False
    """It ended undone for no fault of its own (its caller left, its server stopped): the next who asks generates it."""

    @classmethod
    def of(
        cls,
        prediction_id: str,
        input: dict[str, JsonValue],
        *,
        created_at: datetime,
        webhook: Webhook | None = None,
        background: bool = False,
    ) -> PredictionRecord:
        """A prediction nobody has claimed. Raises RecordError for what cannot be kept."""
        try:
            return cls(
                id=prediction_id,
                input=input,
                input_sha256=input_digest(input),
                created_at=created_at,
                webhook=webhook,
                background=background,
            )
        except (ValueError, TypeError, RecursionError) as error:
            raise RecordError(f"the prediction cannot be recorded: {_problem(error)}") from None

    @property
    def finished(self) -> bool:
        return self.status in ("succeeded", "failed", "canceled")

    @property
    def webhook_due(self) -> bool:
        """Finished, and its caller not told: by its owner in a moment, or by another where that one has died."""
        webhook = self.webhook
        if not self.finished or webhook is None or webhook.sent_at or webhook.gave_up_at:
            return False
        return webhook.events_filter is None or "completed" in webhook.events_filter

    @property
    def settled(self) -> bool:
        """Nothing of it changes any more, and nobody has to be told."""
        return self.finished and not self.may_run_again and not self.webhook_due

    @property
    def name(self) -> str:
        return record_name(self.id)

    @property
    def place_in_time(self) -> str:
        """A text that sorts newest first, as S3 lists in ascending order: the inverted time and the name."""
        milliseconds = int(self.created_at.timestamp() * 1000)
        return f"{_LAST_MILLISECOND - milliseconds:013d}-{self.name}"

    def changed(self, **changes: Any) -> PredictionRecord:
        """The same record with other values, checked like any. Raises RecordError."""
        try:
            return type(self).model_validate({**dict(self), **changes})
        except ValueError as error:
            raise RecordError(
                f"the record of prediction {self.name} cannot hold that: {_problem(error)}"
            ) from None

    def dump(self) -> bytes:
        """Raises RecordError for what is no JSON (NaN, half a character) or is too large."""
        try:
            content = self.model_dump(mode="json")
            data = json.dumps(content, allow_nan=False, ensure_ascii=False).encode()
        except ValueError as error:
            raise RecordError(
                f"the record of prediction {self.name} is no JSON: {_problem(error)}"
            ) from None
        if len(data) > LARGEST_RECORD:
            raise RecordError(
                f"the record of prediction {self.name} has {len(data)} bytes, and {LARGEST_RECORD} are the most: "
                "send a smaller input, or URLs instead of what they lead to"
            )
        return data


def parse_record(data: bytes, prediction_id: str | None, url: str) -> PredictionRecord:
    """The record in `data`, which was read from `url`, of that id (None: of whichever its name belongs to).

    Raises RecordError, which names the object and quotes none of it.
    """
    try:
        record = PredictionRecord.model_validate(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"{url} is no prediction's record of the format {FORMAT}: {_problem(error)}. Something else wrote or "
            "damaged it: look at it and move it away, or use another id"
        ) from None
    if prediction_id is not None and record.id != prediction_id:
        raise RecordError(
            f"{url} holds another prediction's record than the one it is named for. Something else wrote it, or "
            "the storage takes A and a for one letter: move it away, or use another id"
        )
    return record


def time_of(place: str) -> datetime | None:
    """When what has this place in time was claimed; None for what is none, or of no year that there is."""
    milliseconds = place.partition("-")[0]
    try:
        return datetime.fromtimestamp((_LAST_MILLISECOND - int(milliseconds)) / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def record_name(prediction_id: str) -> str:
    """The id itself where it is plain (letters, digits, _ - and single dots inside, at most 64), else its SHA-256.

    Different ids have different names: a hashed one is longer than any that is plain.
    """
    if len(prediction_id) <= LONGEST_NAME and _PLAIN_NAME.fullmatch(prediction_id):
        return prediction_id
    digest = hashlib.sha256(prediction_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"sha256-{digest}"


def input_digest(input: dict[str, JsonValue]) -> str:
    """SHA-256 of the input as JSON, whatever the order of its fields. Raises ValueError for what is no JSON."""
    # Half a surrogate pair is no text either: JSON can spell it, and many readers of it refuse it.
    text = json.dumps(
        input, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":")
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _problem(error: Exception) -> str:
    """What is wrong, without the values: an input is the caller's own business."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place or 'the whole'}: {first['msg']}"[:PROBLEM_LENGTH]
    return (str(error) or type(error).__name__)[:PROBLEM_LENGTH]
