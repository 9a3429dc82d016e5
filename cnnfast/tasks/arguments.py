"""Kinds of values on the command line, as argparse wants them."""

from __future__ import annotations

import argparse
import reprlib

__all__ = ["positive", "seed"]


def positive(text: str) -> int:
    value = _number(text)
    if value is None or not 0 < value < 2**31:
        limit = " below 2**31" if value is not None and value > 0 else ""
        raise argparse.ArgumentTypeError(f"expected a positive whole number{limit}, got {reprlib.repr(text)}")
    return value


def seed(text: str) -> int:
    value = _number(text)
    if value is None or not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**63 - 1, got {reprlib.repr(text)}")
    return value


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
