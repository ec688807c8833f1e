"""A key opens the door to its own name, and neither keys nor digests show anywhere they should not."""

from __future__ import annotations

import hashlib
import hmac
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import keys
from gateway.keys import Keys, digest_of, new_key, parse_keys

ROOT = Path(__file__).resolve().parents[2]
ALICE, BOB = "gw_alice-has-this-one", "gw_bob-has-another"
TWO = f"alice:{digest_of(ALICE)},bob:{digest_of(BOB)}"


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (f"Bearer {ALICE}", "alice"),
        (f"Bearer {BOB}", "bob"),
        (f"Token {BOB}", "bob"),
        (f"bearer {ALICE}", "alice"),
        (f"  BEARER   {ALICE} ", "alice"),
        (f"Bearer {ALICE}x", None),
        (f"Bearer {ALICE.upper()}", None),
        (f"Bearer {digest_of(ALICE)}", None),
        (f"Basic {ALICE}", None),
        (f"Bearer{ALICE}", None),
        (ALICE, None),
        ("Bearer", None),
        ("Bearer ", None),
        ("Bearer ключ\udcff", None),
        ("", None),
        (None, None),
    ],
)
def test_a_header_is_known_by_the_key_it_carries(header: str | None, name: str | None) -> None:
    assert parse_keys(TWO).find(header) == name


def test_every_digest_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = hmac.compare_digest

    def counting(given: str, known: str) -> bool:
        compared.append(known)
        return compare(given, known)

    monkeypatch.setattr(keys.hmac, "compare_digest", counting)
    known = parse_keys(TWO)

    for key in (ALICE, BOB, "gw_nobody"):
        known.find(f"Bearer {key}")

    assert compared == [digest_of(ALICE), digest_of(BOB)] * 3


def test_the_text_may_hold_spaces_and_capital_digits() -> None:
    known = parse_keys(f" alice : {digest_of(ALICE).upper()} , bob:{digest_of(BOB)} ")

    assert known.names == ("alice", "bob")
    assert known.find(f"Bearer {ALICE}") == "alice"


@pytest.mark.parametrize("value", ["", "  "])
def test_empty_text_is_no_keys(value: str) -> None:
    known = parse_keys(value)

    assert len(known) == 0
    assert known.find("Bearer ") is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (ALICE, "must be name:sha256 for each key.*part 1 has no colon"),
        (TWO + ",", "part 3 has no colon"),
        (f":{digest_of(ALICE)}", "has a bad name in part 1"),
        (f"al ice:{digest_of(ALICE)}", "has a bad name in part 1"),
        (f'{TWO},"c":{digest_of("c")}', "has a bad name in part 3"),
        (f"alice:{ALICE}", "must hold a SHA-256 after alice.*not the key itself"),
        (f"alice:{digest_of(ALICE)[1:]}", "must hold a SHA-256 after alice"),
        (f"{TWO},alice:{digest_of('c')}", "must not name a key twice: alice"),
        (f"{TWO},carol:{digest_of(BOB)}", "must not hold one key under two names: carol"),
    ],
)
def test_text_that_cannot_be_keys_is_refused_without_repeating_it(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_keys(value)

    assert ALICE not in str(caught.value)
    assert digest_of(ALICE) not in str(caught.value)


def test_a_repr_shows_names_only() -> None:
    known = parse_keys(TWO)

    assert repr(known) == str(known) == "Keys(alice, bob)"


def test_keys_do_not_change_with_what_they_were_made_of() -> None:
    digests = {keys.KeyName("alice"): digest_of(ALICE)}
    known = Keys(digests)

    digests.clear()

    assert known.find(f"Bearer {ALICE}") == "alice"


def test_new_keys_hold_256_random_bits() -> None:
    made = {new_key() for _ in range(100)}

    assert len(made) == 100
    # 32 bytes in base64, without padding.
    assert {len(key) for key in made} == {len("gw_") + 43}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway.keys", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_a_key_that_its_line_lets_in() -> None:
    done = run("new", "alice-2026")
    indented = [line.strip() for line in done.stdout.splitlines() if line.startswith("    ")]
    key, part = indented

    assert done.returncode == 0
    assert part == f"alice-2026:{hashlib.sha256(key.encode()).hexdigest()}"
    assert parse_keys(part).find(f"Bearer {key}") == "alice-2026"
    assert done.stdout.count(key) == 1


@pytest.mark.parametrize("arguments", [["new", "al,ice"], ["new", ""], ["new"], []])
def test_the_command_makes_no_key_without_a_good_name(arguments: list[str]) -> None:
    done = run(*arguments)

    assert done.returncode == 2
    assert "usage: python -m gateway.keys" in done.stderr
    assert done.stdout == ""
