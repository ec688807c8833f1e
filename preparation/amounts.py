"""Bytes and seconds as a person reads them: what every line about progress, and every report, is made of."""

from __future__ import annotations

_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
# Just under a unit, three digits round up to it: 999.7 MB is "1 GB" and not "1e+03 MB".
_ROUNDED_UP = 0.9995
_TIMED_FROM = 0.1  # seconds


def human_size(size: float) -> str:
    """Decimal units, as the Hub shows them: 5135149760 is "5.14 GB"."""
    for unit, scale in _UNITS:
        if size >= scale * _ROUNDED_UP:
            return f"{size / scale:.3g} {unit}"
    return f"{int(size)} B"


def part_of(done: float, total: float) -> str:
    """Both in the unit of the whole, and as exact as that is shown: "0.05 of 6.94 GB"."""
    whole, unit = human_size(total).split()
    scale = dict(_UNITS).get(unit, 1)
    decimals = len(whole.partition(".")[2])
    return f"{done / scale:.{decimals}f} of {whole} {unit}"


def clock(seconds: float) -> str:
    """Whole seconds, as a clock shows them: "0:07", "12:40", "1:02:33"."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def human_time(seconds: float) -> str:
    """How long something took: "9.3 s", from a minute on as a clock shows it."""
    return f"{seconds:.1f} s" if seconds < 59.95 else clock(round(seconds))


def outcome(done: float, seconds: float) -> str:
    """What a finished stage was: "6.94 GB in 1:12, 96.4 MB/s"; no rate where it took no time worth the name."""
    rate = f", {human_size(done / seconds)}/s" if done > 0 and seconds >= _TIMED_FROM else ""
    return f"{human_size(done)} in {human_time(seconds)}{rate}"


def standing(done: float, total: float, rate: float | None, left: float | None) -> list[str]:
    """How far a stage is, in parts: "2.98 of 6.94 GB", "35.3 MB/s", "1:52 left", without what is None."""
    parts = [part_of(done, total) if done <= total else human_size(done)]
    if rate is not None:
        parts.append(f"{human_size(rate)}/s")
    if left is not None:
        parts.append(f"{clock(left)} left")
    return parts
