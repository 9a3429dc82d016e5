"""The image tasks kept from call to call, for programs that answer one wish after the other: the page of `app`.

Pictures come and go as `Picture`; one call works at a time, whatever threads they come from.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np

from ..dispatch import backend as backend_context
from ..messages import CnnfastWarning
from .cutting import Cutter
from .drawing import Drawer, Drawing
from .enhancement import Enhancer
from .masks import painted
from .pictures import Picture
from .plots import grid, pixels
from .repairing import Repairer
from .sampling import Sampler
from .styling import Styler

__all__ = ["Pipelines"]

Told = Callable[[float], object]
_Kind = TypeVar("_Kind", Sampler, Drawer, Enhancer, Repairer, Styler, Cutter)


class Pipelines:
    """One `Sampler`, `Drawer`, `Enhancer`, `Repairer`, `Styler` and `Cutter` each, made when it is first asked for and
    kept until other options are: a second call with the same does not load its network again.

    ``device``, ``dtype``, ``backend`` and ``memory`` as of `Enhancer`, for those that have them. Methods return the
    result and what was to be said about it, a line each; ``told`` is called with the part that is done. Errors are
    those of the classes.
    """

    def __init__(
        self,
        *,
        device: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        memory: float | None = None,
    ) -> None:
        self._device = {"device": device}
        self._dtype = {"device": device, "dtype": dtype}
        self._tiles = {"device": device, "dtype": dtype, "memory": memory}
        self._backend = backend
        self._lock = threading.Lock()
        self._kept: dict[type, tuple[Mapping[str, Any], Any]] = {}

    def generate(
        self, model: str, count: int, seed: int, colours: Sequence[str] = ()
    ) -> tuple[list[Picture], Picture, list[str]]:
        """Images of `Sampler`, each by itself and all of them as one picture."""
        with self._alone() as remarks:
            sampler = self._pipeline(Sampler, model=model, seed=seed, colours=tuple(colours) or None, **self._device)
            images = sampler.images(0, count)
            together = grid(images, math.ceil(math.sqrt(count)))
            return [Picture(image) for image in pixels(images)], Picture(together), remarks

    def draw(self, text: str, seed: int, size: int | None = None) -> tuple[Drawing, list[str]]:
        """A drawing of `Drawer`, enlarged to ``size``."""
        with self._alone() as remarks:
            drawing = self._pipeline(Drawer, **self._device).draw(text, seed)
            remarks.extend(drawing.remarks)
            return (drawing if size is None else drawing.enlarged(size)), remarks

    def enhance(self, picture: Picture, told: Told | None = None, **options: Any) -> tuple[Picture, list[str]]:
        """``options``: ``scale``, ``denoise``, ``model``."""
        with self._alone() as remarks:
            return self._pipeline(Enhancer, **options, **self._tiles).picture(picture, told), remarks

    def repair(self, picture: Picture, mask: Any, grow: int = 0, told: Told | None = None) -> tuple[Picture, list[str]]:
        """``mask`` as of `masks.mask_for`, or the layers that were painted on the picture, as of `masks.painted`."""
        if isinstance(mask, Sequence):
            mask = painted(mask, picture.pixels.shape[:2])
        with self._alone() as remarks:
            return self._pipeline(Repairer, grow=grow, **self._tiles).picture(picture, mask, told), remarks

    def style(self, picture: Picture, told: Told | None = None, **options: Any) -> tuple[Picture, list[str]]:
        """``options``: ``style``, ``strength``, ``only``, ``size``."""
        with self._alone() as remarks:
            return self._pipeline(Styler, **options, **self._tiles).picture(picture, told), remarks

    def cut_out(self, picture: Picture, background: Any = None, told: Told | None = None) -> tuple[Picture, list[str]]:
        """``background`` as of `Cutter`."""
        with self._alone() as remarks:
            return self._pipeline(Cutter, background=background, **self._dtype).picture(picture, told), remarks

    def _pipeline(self, kind: type[_Kind], **options: Any) -> _Kind:
        known = self._kept.get(kind)
        if known is not None and _same(known[0], options):
            return known[1]
        self._kept.pop(kind, None)  # its memory is free before the next one wants it
        made = kind(**options)
        self._kept[kind] = options, made
        return made

    @contextmanager
    def _alone(self) -> Iterator[list[str]]:
        """This thread alone works. What is warned of in the meantime goes to the list; warnings of others, on."""
        with self._lock, backend_context(self._backend) if self._backend is not None else nullcontext():
            remarks: list[str] = []
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", CnnfastWarning)
                yield remarks
            for warning in caught:
                if issubclass(warning.category, CnnfastWarning):
                    remarks.append(str(warning.message).removeprefix("cnnfast: "))
                else:
                    warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _same(known: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Pictures (the background, a style) are the same where they are one object: their pixels are not compared."""
    return known.keys() == options.keys() and all(
        known[name] is value or (not isinstance(value, (Picture, np.ndarray)) and known[name] == value)
        for name, value in options.items()
    )
