"""How a prompt says which of its words count for more or less: compel's notation, read strictly. Imports no torch.

compel (https://github.com/damian0815/compel) has a parser of its own, which is not used: it never refuses anything but
hands a parenthesis that is not closed to the text encoder, respells punctuation inside parentheses, leaves the
backslash in `C\\+\\+`, and takes 95 s for eight parentheses around one word and 3 s for 10,000 plain characters.
"""

import re
from dataclasses import dataclass

from diffusion.errors import RequestError

# What one sign more or less does, as in compel.
MORE, LESS = 1.1, 0.9
MAX_WEIGHT = 5.0  # from about 1.6 up, pictures fall apart; beyond this, numbers do

# What counts for less is encoded once more without it: each of these costs as much as the whole prompt does.
MAX_LOWERED = 16
MAX_DEPTH = 16  # of parentheses; with it, the time to read a prompt grows with its length alone

_ADVICE = (
    r"Write (red fox)1.3 for more of it, (red fox)0.7 for less, and \( \) for parentheses that mean nothing; or send "
    "prompt_weighting as false, and every character is read as it stands."
)
# compel's other operators change more than weights, and withLora would load a file.
_OTHER_OPERATORS = re.compile(r"\.(?:swap|blend|and|add|attend)\s*\(|\b(?:with|use)Lora\s*\(")
# Ways to write a weight that are not read here: (red fox:1.3), which other programs do, and "red fox"1.3.
_INSIDE = re.compile(r":\s*[0-9.]+\s*\Z")
_QUOTED = re.compile(r'[^\\]"(?:[0-9.]+|\++|-+)\Z')
_NEAR = 16  # characters before a closing parenthesis in which its weight would be

_PART = re.compile(r'\s+|[(),;]|(?:\\[()+\\"-]|[^\s(),;])+')
_ESCAPED = re.compile(r'\\([()+\\"-])')
_NUMBER = re.compile(r"[0-9.]*[0-9]")
_SIGNS = re.compile(r"[+-]+")
_GOES_ON = re.compile(r"[\w+-]")


@dataclass(frozen=True)
class Fragment:
    """Some words of a prompt, without notation, and how much they count: 1 is as much as in a plain prompt."""

    text: str
    weight: float = 1.0


# A parenthesis ends a word, as a blank does: whatever has a weight is encoded as words of its own.
_BLANK = Fragment(" ")


@dataclass
class _Open:
    """A parenthesis that is not closed yet: where it stands, and which fragment is its first."""

    place: int
    first: int


def read_weights(field: str, prompt: str) -> tuple[Fragment, ...]:
    """The prompt's fragments in their order, never two of one weight in a row. Weights of nested parentheses multiply.

    Raises `RequestError` naming `field`, the place and what to write there, for everything that is neither a weight
    nor plain text.
    """
    if other := _OTHER_OPERATORS.search(prompt):
        raise _refusal(field, prompt, other.start(), "an operator that is not supported here")
    fragments: list[Fragment] = []
    opened: list[_Open] = []
    place = 0
    while found := _PART.match(prompt, place):
        part, end = found.group(), found.end()
        if part == "(":
            if len(opened) == MAX_DEPTH:
                raise _refusal(field, prompt, place, f"parentheses more than {MAX_DEPTH} deep")
            fragments.append(_BLANK)
            opened.append(_Open(place, len(fragments)))
        elif part == ")":
            if not opened:
                raise _refusal(field, prompt, place, "a parenthesis that was never opened")
            group = opened.pop()
            if _INSIDE.search(prompt, max(group.place, place - _NEAR), place):
                raise _refusal(field, prompt, group.place, "a weight inside its parentheses")
            weight, end = _weight_at(field, prompt, end)
            fragments[group.first :] = [
                Fragment(inner.text, inner.weight * weight) for inner in fragments[group.first :]
            ]
            fragments.append(_BLANK)
        else:
            fragments.append(_word(field, prompt, place, part))
        place = end
    if opened:
        raise _refusal(field, prompt, opened[-1].place, "a parenthesis that is never closed")
    return _checked(field, _joined(fragments))


def _weight_at(field: str, prompt: str, place: int) -> tuple[float, int]:
    """The weight that stands there, 1 if none does, and where it ends."""
    if number := _NUMBER.match(prompt, place):
        end = number.end()
        try:
            weight = float(number.group())
        except ValueError as error:
            raise _refusal(field, prompt, place, "a weight that is no number") from error
    elif signs := _SIGNS.match(prompt, place):
        weight, end = _weight_of(field, prompt, place, signs.group()), signs.end()
    else:
        return 1.0, place
    if _GOES_ON.match(prompt, end):
        raise _refusal(field, prompt, place, "a weight without a space after it")
    return weight, end


def _word(field: str, prompt: str, place: int, part: str) -> Fragment:
    """One word, or what stands between two; signs at its end weigh it, and inside it or alone are plain."""
    body = part.rstrip(".:!?")
    if _QUOTED.search(body):
        raise _refusal(field, prompt, place, "a weight after a quotation mark")
    word = body.rstrip("+-")
    if (len(word) - len(word.rstrip("\\"))) % 2:  # the backslash takes the first of the signs
        word = body[: len(word) + 1]
    signs = body[len(word) :]
    if not word or not signs:
        return Fragment(_plain(part))
    weight = _weight_of(field, prompt, place, signs)
    return Fragment(_plain(word) + part[len(body) :], weight)


def _weight_of(field: str, prompt: str, place: int, signs: str) -> float:
    if signs.strip(signs[0]):
        raise _refusal(field, prompt, place, "+ and - in one weight")
    try:
        return float((MORE if signs[0] == "+" else LESS) ** len(signs))
    except OverflowError as error:
        raise _refusal(field, prompt, place, "too large a weight") from error


def _plain(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)


def _joined(fragments: list[Fragment]) -> list[Fragment]:
    """As few fragments as say the same; blanks between two weights have none of their own."""
    runs: list[tuple[list[str], float]] = []
    for fragment in fragments:
        if runs and (fragment.weight == runs[-1][1] or not fragment.text.strip()):
            runs[-1][0].append(fragment.text)
        elif runs and not "".join(runs[-1][0]).strip():
            runs[-1] = ([*runs[-1][0], fragment.text], fragment.weight)
        else:
            runs.append(([fragment.text], fragment.weight))
    return [Fragment("".join(texts).strip(), weight) for texts, weight in runs]


def _checked(field: str, fragments: list[Fragment]) -> tuple[Fragment, ...]:
    if not any(fragment.text for fragment in fragments):
        raise RequestError(f"{field} has no words in its parentheses. {_ADVICE}")
    for fragment in fragments:
        if not fragment.weight <= MAX_WEIGHT:
            raise RequestError(
                f"{field} gives {_excerpt(fragment.text, 0)} the weight {fragment.weight:g}; weights go from 0 to "
                f"{MAX_WEIGHT:g}, and few pictures bear more than 1.6. {_ADVICE}"
            )
    lowered = sum(fragment.weight < 1 for fragment in fragments)
    if lowered > MAX_LOWERED:
        raise RequestError(
            f"{field} gives {lowered} parts a weight below 1, each of which is encoded separately; {MAX_LOWERED} are "
            "the most. Put words that follow one another into one pair of parentheses."
        )
    return tuple(fragments)


def _refusal(field: str, prompt: str, place: int, what: str) -> RequestError:
    return RequestError(
        f"{field} has {what}, at character {place + 1}: {_excerpt(prompt, place)}. {_ADVICE}"
    )


def _excerpt(prompt: str, place: int) -> str:
    longest = 24
    shown = prompt[place : place + longest]
    return repr(shown + "…" if len(prompt) > place + longest else shown)
