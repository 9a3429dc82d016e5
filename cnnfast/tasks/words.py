"""Texts as the words that a network knows: case, accents, punctuation, plurals, spelling apart or together.

What is left of a text are known words, in order; what is not known is named, with known words that look like it.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["ALPHABET", "FILLERS", "LONGEST_TEXT", "LONGEST_WORD", "Reading", "Vocabulary", "fold", "split"]

LONGEST_TEXT, LONGEST_WORD = 16, 24  # in words, and in letters: what is beyond is cut off
_LONGEST_LOOK = 400  # words of a text that are looked at
_MOST_REPEATS = 3  # of a word, as names have it: what is said a hundred times is not a hundred times as true
_MOST_SUGGESTIONS = 8  # words of a text that like ones are looked for, which takes some milliseconds each

# Letters of a word to a network: 0 is none, 1 and 2 are its start and end, then these.
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"

# They say nothing about a picture, in names as in requests.
FILLERS = frozenset(
    "a an the of with and please draw paint show me emoji emojis picture pictures image drawing icon photo "
    "mit und der die das ein eine einer eines einem einen dem den des bitte zeichne male bild emoji".split()
)

_IRREGULAR = {
    "men": "man", "women": "woman", "people": "person", "persons": "person", "children": "child", "mice": "mouse",
    "geese": "goose", "feet": "foot", "teeth": "tooth", "oxen": "ox",
}  # fmt: skip


def fold(word: str) -> str:
    """Without case, accents and apostrophes: "Äpfel" is "apfel", "L'Été" is "lete"."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", word).casefold())
    return "".join(c for c in decomposed if not unicodedata.combining(c) and c != "'")


def split(text: str) -> list[str]:
    """The words of a text as they are written, with hyphens and apostrophes inside them; fillers are left out."""
    # Compatibility forms are letters to their reader: full-width ones, ligatures, mathematical alphabets.
    text = re.sub("[’‘`´ʼ]", "'", re.sub("[‐‑]", "-", unicodedata.normalize("NFKC", text)))
    parts = "".join(c if c.isalnum() or c in "-'" or unicodedata.category(c)[0] == "M" else " " for c in text).split()
    words = [part.strip("-'") for part in parts]
    return [word for word in words if any(c.isalnum() for c in word) and fold(word) not in FILLERS]


@dataclass(frozen=True)
class Reading:
    """What a text says: ``words`` of the vocabulary in order, each ``written`` as it was; ``unknown``: the others, and
    for each of them known words that look like it; ``cut``: how many known words were too many."""

    words: tuple[str, ...]
    written: tuple[str, ...]
    unknown: dict[str, tuple[str, ...]]
    cut: int = 0

    @property
    def read_as(self) -> dict[str, str]:
        """Words that were taken for others: inflections."""
        pairs = zip(self.written, self.words, strict=True)
        return {w: k for w, k in pairs if fold(w) != k}

    def remarks(self) -> list[str]:
        """What a person should know about it, a line each."""
        lines = []
        if self.read_as:
            lines.append("read " + ", ".join(f"{w!r} as {k!r}" for w, k in self.read_as.items()))
        if self.unknown:
            lines.append(f"left out, not among the words it knows: {self.unknown_text()}")
        if self.cut:
            lines.append(f"left out, beyond the first {LONGEST_TEXT} words: {self.cut} more")
        return lines

    def unknown_text(self, most: int = _MOST_SUGGESTIONS) -> str:
        """The unknown words with what they may have meant."""
        told = [
            f"{word[:LONGEST_WORD]!r}" + (f" (near: {', '.join(near)})" if near else "")
            for word, near in list(self.unknown.items())[:most]
        ]
        more = len(self.unknown) - most
        return ", ".join(told) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Vocabulary:
    """Known words: a word's row is its place in ``words`` and 1 more (0 is none). ``german``: those that bend
    as German words do."""

    words: tuple[str, ...]
    german: frozenset[str] = frozenset()

    @classmethod
    def of(cls, english: Iterable[str], german: Iterable[str]) -> Vocabulary:
        """All words of names in two languages."""
        first, second = ([fold(word) for name in names for word in split(name)] for names in (english, german))
        known = {word.replace("-", "") for word in (*first, *second)}
        return cls(
            tuple(sorted(known)), frozenset(w.replace("-", "") for w in second) - {*(w.replace("-", "") for w in first)}
        )

    @cached_property
    def rows(self) -> dict[str, int]:
        return {word: row for row, word in enumerate(self.words, start=1)}

    def read(self, text: str) -> Reading:
        """What is known of ``text``, whatever it is."""
        words: list[str] = []
        written: list[str] = []
        unknown: dict[str, tuple[str, ...]] = {}
        for word in self._tokens(text):
            known = self.lookup(fold(word))
            if known is not None and words.count(known) == _MOST_REPEATS:
                continue
            if known is not None:
                words.append(known)
                written.append(word)
            elif word not in unknown:
                unknown[word] = self.near(fold(word)) if len(unknown) < _MOST_SUGGESTIONS else ()
        cut = max(len(words) - LONGEST_TEXT, 0)
        return Reading(tuple(words[:LONGEST_TEXT]), tuple(written[:LONGEST_TEXT]), unknown, cut)

    def lookup(self, word: str) -> str | None:
        """The known word that a folded ``word`` is, or is an inflection of."""
        if word in self.rows:
            return word
        return next((c for c in _inflections(word) if c in self.rows), None) or next(
            (c for c in _bent(word) if c in self.german), None
        )

    def near(self, word: str, count: int = 3) -> tuple[str, ...]:
        """Known words that look like ``word``, the nearest first."""
        return tuple(difflib.get_close_matches(word[:LONGEST_WORD], self.words, count, 0.7))

    def encode(self, readings: Sequence[Reading]) -> tuple[Tensor, Tensor]:
        """Rows (N, LONGEST_TEXT) and letters (N, LONGEST_TEXT, LONGEST_WORD), int64, 0 where there is nothing."""
        rows = torch.zeros(len(readings), LONGEST_TEXT, dtype=torch.int64)
        letters = torch.zeros(len(readings), LONGEST_TEXT, LONGEST_WORD, dtype=torch.int64)
        for i, reading in enumerate(readings):
            for j, word in enumerate(reading.words):
                rows[i, j] = self.rows[word]
                letters[i, j] = spell(word)
        return rows, letters

    def _tokens(self, text: str) -> Iterator[str]:
        """Words as the vocabulary has them: what is written apart is joined where the whole is known ("medium dark" and
        "water melon" as "medium-dark" and "watermelon")."""
        parts = [part for word in split(text)[:_LONGEST_LOOK] for part in self._parts(word)]
        while parts:
            count = next((n for n in (4, 3, 2) if self._is_one(parts[:n], n)), 1)
            yield "".join(parts[:count])
            del parts[:count]

    def _is_one(self, parts: Sequence[str], count: int) -> bool:
        whole = fold("".join(parts))
        return len(parts) == count and whole in self.rows

    def _parts(self, word: str) -> list[str]:
        whole = word.replace("-", "")
        return [whole] if fold(whole) in self.rows else [p for p in word.split("-") if fold(p) not in FILLERS]


def spell(word: str) -> Tensor:
    """The letters of a word, (LONGEST_WORD,) int64; what the alphabet lacks is left out."""
    ids = [3 + ALPHABET.index(c) for c in word if c in ALPHABET][: LONGEST_WORD - 2]
    out = torch.zeros(LONGEST_WORD, dtype=torch.int64)
    out[: len(ids) + 2] = torch.tensor([1, *ids, 2])
    return out


def _inflections(word: str) -> Iterator[str]:
    """English words that ``word`` may be a form of, the likeliest first; stems have three letters or more."""
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    yield from (many for many, one in _IRREGULAR.items() if one == word)
    for ending, instead in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("s", ""), ("es", ""), ("y", "ies")):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            yield word[: len(word) - len(ending)] + instead
    if len(word) < 3:
        return
    yield from (word + "s", word + "es")
    for ending in ("ing", "ed"):
        yield from (word + ending, word + word[-1] + ending)
        if word.endswith("e"):
            yield word[:-1] + ending
        stem = word[: -len(ending)]
        if word.endswith(ending) and len(stem) >= 3:
            yield from (stem, stem + "e")
            if stem[-1] == stem[-2]:
                yield stem[:-1]
            # From one form to another: danced, dancing.
            other = "ed" if ending == "ing" else "ing"
            yield stem + other


_BENDS = ("", "e", "n", "s", "en", "er", "es", "em")


def _bent(word: str) -> Iterator[str]:
    """German words that share a stem of three letters or more with ``word``: rot, rote, rotes."""
    stems = [word.removesuffix(end) for end in _BENDS if word.endswith(end) and len(word) - len(end) >= 3]
    for stem in sorted(dict.fromkeys(stems), key=len, reverse=True):
        yield from (stem + end for end in _BENDS)
