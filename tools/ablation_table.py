"""Tables in Markdown."""

from typing import Any


def row(*cells: Any) -> list[str]:
    """Returns one line."""
    return ["| " + " | ".join(str(cell) for cell in cells) + " |"]


def rule(columns: int) -> list[str]:
    """Returns the line under the headings."""
    return ["|" + "---|" * columns]
