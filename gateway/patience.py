"""How long whoever runs Cog's server waits for it, and when it gives up: every number of that kind, and why."""

from dataclasses import dataclass

from gateway.cog_status import State


@dataclass(frozen=True)
class Patience:
    """How long each thing may take, in seconds, and how often it may fail."""

    poll_starting_s: float = 0.2
    poll_s: float = 1.0
    # Cog asks its worker on every check and answers "timed out" after 10 s itself.
    answer_within_s: float = 12.0
    silent_s: float = 30.0
    # The interpreter's start, on a cold disk.
    first_answer_s: float = 120.0
    # A fault of one request or of a driver: at once, then more slowly; the platform's turn after that.
    deaths_in_row: int = 5
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    # A network heals, a wrong key does not: tried ten times over some ten minutes, with the reason on show meanwhile.
    # Then it is given up too, as what ails this machine (its card, its disk) may be well on another.
    setup_failures_in_row: int = 10
    setup_first_pause_s: float = 5.0
    setup_longest_pause_s: float = 120.0
    # A life that served this long was a good one: what ends it starts a new row.
    good_life_s: float = 120.0
    # For the answers that tell callers of a dead worker to get out.
    last_words_s: float = 5.0

    def allowed_in_row(self, state: State) -> int:
        return self.setup_failures_in_row if state is State.SETUP_FAILED else self.deaths_in_row

    def pause_s(self, state: State, in_row: int) -> float:
        """The wait before it is started again, after the `in_row`-th of its kind (from 1)."""
        first, longest = self.first_pause_s, self.longest_pause_s
        if state is State.SETUP_FAILED:
            first, longest = self.setup_first_pause_s, self.setup_longest_pause_s
        return float(min(first * 2 ** (in_row - 1), longest))
