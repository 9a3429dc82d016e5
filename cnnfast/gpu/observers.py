"""Who is told of launches: tuning records steps, benchmarks and tests what ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..step import Operands, Step

__all__ = ["OBSERVERS", "Observer", "observed", "of_launch", "of_step"]


@dataclass(frozen=True)
class Observer:
    """Told of every step ahead of its launch, and of every launch by the name of its plan."""

    step: Callable[[Step, Operands, bool], object] | None
    launch: Callable[[str], object] | None


OBSERVERS: list[Observer] = []
"""Of the process, not of a context: autograd launches backwards from threads of its own. `observed` alone writes it."""


@contextmanager
def observed(
    *,
    step: Callable[[Step, Operands, bool], object] | None = None,
    launch: Callable[[str], object] | None = None,
) -> Iterator[None]:
    """Inside the ``with`` block, ``step`` is told of every fused convolution (and whether its result is channels-last),
    ``launch`` of every launch, by its plan or pass."""
    observer = Observer(step, launch)
    OBSERVERS.append(observer)
    try:
        yield
    finally:
        OBSERVERS.remove(observer)


def of_step(step: Step, o: Operands, channels_last: bool) -> None:
    for observer in OBSERVERS:
        if observer.step is not None:
            observer.step(step, o, channels_last)


def of_launch(name: str) -> None:
    for observer in OBSERVERS:
        if observer.launch is not None:
            observer.launch(name)
