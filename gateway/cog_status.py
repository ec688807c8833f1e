"""In which state Cog's server is, in the gateway's words, for everybody who answers callers or counts."""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from gateway.cog_health import Setup


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    """It serves, and every slot of it is taken."""
    SETUP_FAILED = "setup_failed"
    """It is started again after a pause."""
    DEAD = "dead"
    """It is started again after a pause."""
    STOPPING = "stopping"
    """It finishes what it runs and takes nothing new."""
    STOPPED = "stopped"
    """It will not come back."""


@dataclass(frozen=True)
class Status:
    """All there is to know at one moment; a change makes a new one."""

    state: State
    since: datetime
    reason: str | None = None
    """Why it does not serve, or why its last life ended; kept until it serves again."""
    setup: Setup | None = None
    """How the last setup went that came to an end."""
    restarts: int = 0
    """How often it was started again, for whatever cause."""

    @property
    def serving(self) -> bool:
        return self.state in (State.READY, State.BUSY)
