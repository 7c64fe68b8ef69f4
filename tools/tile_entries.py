"""Entries of a table of tiles: for each kernel and shape the best that was found."""

import json
from collections.abc import Iterable
from typing import Any

Entry = dict[str, Any]


def merge(table: Iterable[Entry], found: Iterable[Entry], *, replace: bool) -> list[Entry]:
    """Returns a table with what was found, by kernel and shape.

    Args:
      table: what is tabulated already.
      found: at most one entry for a kernel and a shape.
      replace: whether entries that are found take the place of older ones that are as fast, which
        stay otherwise: whoever tries a few tiles may miss the best ones.
    """
    entries = {_key(entry): entry for entry in table}
    for entry in found:
        old = entries.get(_key(entry))
        if replace or old is None or entry["microseconds"] < old["microseconds"]:
            entries[_key(entry)] = entry
    return [entries[key] for key in sorted(entries)]


def to_text(table: Iterable[Entry]) -> str:
    """Returns a table in JSON, one entry a line."""
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table)
    return f"[\n{lines}\n]\n"


def _key(entry: Entry) -> str:
    return str((entry["kernel"], *sorted(entry["shape"].items())))
