"""``python -m tests.held_out [FONT]``: writes held_out.png, small pictures of what `train text` does not see, so that
what ships can be tested without the font."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from cnnfast.tasks.emoji import load_emoji
from cnnfast.tasks.plots import pixels, save_pixels

# By the splits of `cnnfast.tasks.emoji`: 14 skin tones, 2 tone pairs, 16 of gender x role.
NAMES = [
    "deaf woman dark skin tone",
    "man in steamy room medium skin tone",
    "woman pouting dark skin tone",
    "pilot medium-dark skin tone",
    "woman getting massage dark skin tone",
    "man medium skin tone beard",
    "person medium-dark skin tone bald",
    "person in motorized wheelchair light skin tone",
    "man construction worker medium skin tone",
    "raising hands light skin tone",
    "call me hand medium-dark skin tone",
    "Santa Claus dark skin tone",
    "woman getting massage medium-dark skin tone",
    "pregnant man medium-dark skin tone",
    "couple with heart man man medium skin tone light skin tone",
    "people holding hands dark skin tone medium-dark skin tone",
    "man in motorized wheelchair facing right medium-dark skin tone",
    "woman with white cane",
    "man running facing right medium-dark skin tone",
    "man detective medium skin tone",
    "man facepalming medium-light skin tone",
    "woman rowing boat medium-dark skin tone",
    "man factory worker light skin tone",
    "man elf dark skin tone",
    "man in motorized wheelchair medium-light skin tone",
    "woman with veil medium-light skin tone",
    "woman raising hand light skin tone",
    "woman bouncing ball medium skin tone",
    "woman medium-light skin tone white hair",
    "woman feeding baby medium-light skin tone",
    "man zombie",
    "woman in lotus position dark skin tone",
]

if __name__ == "__main__":
    data = load_emoji(16, sys.argv[1] if len(sys.argv) > 1 else None)
    names = [e.english for e in data.emoji]
    held = {i for indices in data.held_out.values() for i in indices}
    chosen = [names.index(name) for name in NAMES]
    assert held.issuperset(chosen)
    values = torch.from_numpy(pixels(data.images[chosen].float() / 127.5 - 1))
    rows = values.view(4, 8, 16, 16, 3).permute(0, 2, 1, 3, 4).reshape(64, 128, 3)
    save_pixels(Path(__file__).with_name("held_out.png"), rows.numpy())
