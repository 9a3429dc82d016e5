"""Texts as people write them -> the words that are known."""

from __future__ import annotations

import unicodedata

import pytest
import torch

from cnnfast.tasks.words import (
    ALPHABET,
    FILLERS,
    LONGEST_TEXT,
    LONGEST_WORD,
    Reading,
    Vocabulary,
    fold,
    spell,
    split,
)

ENGLISH = (
    "red heart, apple, grapes, dancing woman, medium-dark skin tone, T-shirt, watermelon, water, canned food, wolf, "
    "running person, see-no-evil monkey, man, cherry, 1st place medal, piñata, crying face, kiss"
)
GERMAN = "rotes Herz, Apfel, Katze, Polizistin, blaue Äpfel, Straße"
KNOWN = Vocabulary.of(ENGLISH.split(", "), GERMAN.split(", "))


def words(text: str) -> tuple[str, ...]:
    return KNOWN.read(text).words


SAME = {
    "case": ("RED HeArT", ("red", "heart")),
    "punctuation": ("red, heart!!! (please)", ("red", "heart")),
    "underscores": (":red_heart:", ("red", "heart")),
    "line breaks": ("\tred\n\nheart\r\n", ("red", "heart")),
    "fillers": ("Please draw me a picture of the red heart", ("red", "heart")),
    "plural": ("apples", ("apple",)),
    "plural in y": ("cherries", ("cherry",)),
    "plural in f": ("wolves", ("wolf",)),
    "plural in es": ("kisses", ("kiss",)),
    "irregular plural": ("men", ("man",)),
    "singular": ("grape", ("grapes",)),
    "people": ("people", ("person",)),
    "verb": ("dance", ("dancing",)),
    "verb with a doubled letter": ("run", ("running",)),
    "past": ("danced", ("dancing",)),
    "possessive": ("wolf's", ("wolf",)),
    "curly apostrophe": ("wolf’s", ("wolf",)),
    "hyphen": ("medium-dark skin-tone", ("mediumdark", "skin", "tone")),
    "apart": ("medium dark skin tone", ("mediumdark", "skin", "tone")),
    "other hyphen": ("medium‑dark", ("mediumdark",)),
    "together": ("mediumdark", ("mediumdark",)),
    "t shirt": ("t shirt", ("tshirt",)),
    "three parts": ("see no evil monkey", ("seenoevil", "monkey")),
    "joined where both are known": ("water melon", ("watermelon",)),
    "a hyphen that is not in the names": ("red-heart", ("red", "heart")),
    "accents": ("pinata", ("pinata",)),
    "decomposed accents": (unicodedata.normalize("NFD", "piñata"), ("pinata",)),
    "full-width letters": ("ｒｅｄ　ｈｅａｒｔ", ("red", "heart")),
    "mathematical letters": ("𝓻𝓮𝓭 𝗵𝗲𝗮𝗿𝘁", ("red", "heart")),
    "German": ("ein rotes Herz", ("rotes", "herz")),
    "German adjective": ("rotem Herz", ("rotes", "herz")),
    "German plural": ("Katzen", ("katze",)),
    "umlaut as plural": ("Äpfel", ("apfel",)),
    "sharp s": ("STRASSE", ("strasse",)),
    "order": ("heart red", ("heart", "red")),
    "digits": ("1ST place", ("1st", "place")),
    "an emoji beside": ("❤️ red ❤️ heart", ("red", "heart")),
}


@pytest.mark.parametrize("text, expected", SAME.values(), ids=SAME)
def test_what_is_the_same(text: str, expected: tuple[str, ...]) -> None:
    reading = KNOWN.read(text)
    assert reading.words == expected and not reading.unknown


@pytest.mark.parametrize("text", ["", "   ", "\n", "!?…", "❤️🐶", "a the of", "'", "-", "\u0301", "_"])
def test_no_words(text: str) -> None:
    assert KNOWN.read(text) == Reading((), (), {})


@pytest.mark.parametrize(
    "text, unknown",
    [
        ("xyzzy", {"xyzzy": ()}),
        ("red hart", {"hart": ("heart",)}),
        ("aple", {"aple": ("apple",)}),
        ("красное сердце", {"красное": (), "сердце": ()}),
        ("赤いハート", {"赤いハート": ()}),
        ("हिन्दी", {"हिन्दी": ()}),
        ("Crimson heart", {"Crimson": ()}),
    ],
)
def test_unknown_words_are_named_as_they_are_written(text: str, unknown: dict[str, tuple[str, ...]]) -> None:
    found = KNOWN.read(text).unknown
    assert list(found) == list(unknown)
    for word, near in unknown.items():
        assert set(near) <= set(found[word])


@pytest.mark.parametrize("text", ["can", "bar", "win", "ring", "king", "as", "s", "es", "ing", "apps", "hearted"])
def test_short_words_are_not_bent_into_others(text: str) -> None:
    """Only "can", of "canned", by the rule that makes "dance" of "danced"."""
    assert words(text) == (("canned",) if text == "can" else ("heart",) if text == "hearted" else ())


def test_what_was_read_as_something_else_is_said() -> None:
    reading = KNOWN.read("two Apples and a hart")
    assert reading.read_as == {"Apples": "apple"}
    assert reading.remarks() == [
        "read 'Apples' as 'apple'",
        "left out, not among the words it knows: 'two', 'hart' (near: heart)",
    ]
    assert KNOWN.read("Red T-Shirt").remarks() == []


def test_long_texts() -> None:
    reading = KNOWN.read("red heart apple grapes dancing woman " * 1000 + "monkey")
    assert len(reading.words) == LONGEST_TEXT and reading.words.count("red") == 3
    assert reading.remarks() == ["left out, beyond the first 16 words: 2 more"]
    long_word = "h" * 100_000
    assert list(KNOWN.read(long_word).unknown) == [long_word] and len(KNOWN.read(long_word).unknown_text()) < 60
    many = KNOWN.read(" ".join(f"word{i}" for i in range(1000)))
    assert "and 392 more" in many.unknown_text() and len(many.unknown_text()) < 400


def test_a_word_said_often_is_not_truer() -> None:
    assert words("red " * 50 + "heart") == ("red", "red", "red", "heart")


def test_encoding() -> None:
    rows, letters = KNOWN.encode([KNOWN.read("red heart"), KNOWN.read("")])
    assert rows.shape == (2, LONGEST_TEXT) and letters.shape == (2, LONGEST_TEXT, LONGEST_WORD)
    assert [KNOWN.words[i - 1] for i in rows[0, :2].tolist()] == ["red", "heart"] and not rows[0, 2:].any()
    assert not rows[1].any() and not letters[1].any()
    assert torch.equal(letters[0, 0], spell("red"))


def test_spelling() -> None:
    ids = spell("a0z").tolist()
    assert ids[:5] == [1, 3 + ALPHABET.index("a"), 3, 3 + len(ALPHABET) - 1, 2] and not any(ids[5:])
    assert spell("b" * 100).shape == (LONGEST_WORD,) and spell("b" * 100)[-1] == 2
    assert spell("ж").tolist()[:3] == [1, 2, 0]


def test_a_vocabulary_is_in_order_and_holds_no_filler() -> None:
    assert list(KNOWN.words) == sorted(set(KNOWN.words)) and FILLERS.isdisjoint(KNOWN.words)
    assert {"rotes", "katze"} <= KNOWN.german and "apple" not in KNOWN.german
    assert all(KNOWN.lookup(word) == word == fold(word) for word in KNOWN.words)
    assert split("L'Été -- a T-Shirt's") == ["L'Été", "T-Shirt's"]
