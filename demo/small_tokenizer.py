"""Writes a small CLIP tokenizer: byte-level BPE, so that any UTF-8 prompt has tokens.

The same file layout as Stable Diffusion XL's own tokenizers (vocab.json, merges.txt, two configs), with a vocabulary
of a few hundred entries learned here from a handful of words. Knows nothing of models.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
MAX_LENGTH = 77

_WORDS = """
the a an of in on at and with by from over under into space needle seattle success sign front city night day sunset
sunrise light lightning lights bucket river mountain lake forest sea ocean sky cloud clouds rain snow storm star stars
moon sun tree trees flower flowers garden house castle tower bridge street cat dog fox bird horse fish dragon robot
astronaut woman man child portrait landscape painting photo photograph picture illustration drawing oil watercolor
pencil best quality masterpiece detailed highly ultra sharp focus cinematic dramatic soft warm cold bright dark red
green blue yellow orange purple pink black white golden silver colorful vivid abstract minimal modern ancient old new
small large tiny giant wooden glass stone metal paper worst low blurry ugly style art artist studio scene view
"""


def byte_symbols() -> list[str]:
    """One printable character per byte value: byte-level BPE's alphabet, in CLIP's order (visible bytes first)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(0x100 + rank) for rank in range(len(hidden))]


def learn_merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """Learn up to `count` merges by byte pair encoding (Sennrich et al., 2016); ties go to the lower pair."""
    spellings = [(*word[:-1], word[-1] + END_OF_WORD) for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(pair for word in spellings for pair in pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merged(word, best) for word in spellings]
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    symbols: list[str] = []
    for symbol in word:
        # Only a symbol not itself just merged may be joined, hence the check against the pair's first half.
        if symbols and (symbols[-1], symbol) == pair:
            symbols[-1] += symbol
        else:
            symbols.append(symbol)
    return tuple(symbols)


def vocabulary(merge_count: int = 480) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary (token to id; the two specials last, the end token highest, as CLIP has it) and its merges."""
    symbols = byte_symbols()
    merges = learn_merges(_WORDS.split(), merge_count)
    joined = dict.fromkeys("".join(pair) for pair in merges)  # two merges may spell the same token
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *joined, START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path, *, pad_token: str) -> None:
    """Write the tokenizer's four files into `folder` (SDXL pads its first with the end token, its second with "!")."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = vocabulary()
    special = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start, end = {"content": START, **special}, {"content": END, **special}
    config = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", **start},
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": {"__type": "AddedToken", **end},
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "pad_token": pad_token,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": {"__type": "AddedToken", **end},
    }
    specials = {"bos_token": start, "eos_token": end, "pad_token": pad_token, "unk_token": end}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    (folder / "special_tokens_map.json").write_text(
        json.dumps(specials, indent=2) + "\n", encoding="utf-8"
    )
