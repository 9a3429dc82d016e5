"""``compose``: pictures made of pictures. Its parts: `styling`, `cutting`."""

from __future__ import annotations

from typing import Any

from . import cutting, styling

__all__ = ["add_command"]


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The task's subcommand ``name`` and those below it; ``options`` are those of ``add_parser``."""
    parents = options.get("parents", [])
    parts = commands.add_parser(name, **options).add_subparsers(required=True, metavar="PART")
    styling.add_command(parts, "style", help="a picture in the style of others", parents=parents)
    cutting.add_command(parts, "cutout", help="people before another picture, or before nothing", parents=parents)
