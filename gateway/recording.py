"""What a prediction came to, on its way into its record: for some seconds while its caller waits, and then beside."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.prediction import Prediction
from images.errors import ImagesError, LostLeaseError
from images.records import Claimed

if TYPE_CHECKING:
    from gateway.desk import Desk

PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0)
# All in all less than what others wait before they end what nobody has come back for (sweep.py).
LATER_PAUSES_S = (5.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)

_log = logging.getLogger(__name__)


class Recording:
    """Of a prediction that this gateway has claimed and that is finished."""

    def __init__(
        self, desk: Desk, prediction: Prediction, claimed: Claimed, *, may_run_again: bool
    ) -> None:
        self._desk = desk
        self._prediction = prediction
        self._claimed = claimed
        self._may_run_again = may_run_again

    async def within_patience(self) -> bool:
        """Whether it is recorded by now. Raises LostLeaseError."""
        for pause in PAUSES_S:
            if pause:  # a sleep of no length lets everybody else go first
                await asyncio.sleep(pause)
            try:
                await self._write()
            except LostLeaseError:
                raise
            except ImagesError as error:
                problem_met = error
            else:
                return True
        _log.error("the result is not recorded yet, which is tried again: %s", problem_met)
        return False

    async def later(self, then: Callable[[], None]) -> None:
        """Go on for some minutes, until it is. `then` is for what may be told of an end that is recorded.

        After that, as when another has the prediction meanwhile, it is made anew, or ended, by whoever looks for it.
        """
        for pause in LATER_PAUSES_S:
            await asyncio.sleep(pause)
            try:
                await self._write()
            except LostLeaseError as error:
                _log.warning("%s", error)
                return
            except ImagesError as error:
                problem_met = error
            except Exception:  # noqa: BLE001 - nobody waits for this task, who could tell
                _log.exception("unexpected error; the result is not recorded")
                return
            else:
                _log.info("the result is recorded after all")
                then()
                return
        _log.error("the result is not recorded, and would be made again: %s", problem_met)

    async def _write(self) -> None:
        prediction = self._prediction
        with self._desk.tracing.step("record"):
            await self._desk.ledger.finish(
                self._claimed,
                prediction.status,
                output=prediction.output,
                error=prediction.error,
                metrics=prediction.metrics,
                logs=prediction.logs,
                started_at=prediction.started_at,
                completed_at=prediction.completed_at,
                may_run_again=self._may_run_again,
            )
