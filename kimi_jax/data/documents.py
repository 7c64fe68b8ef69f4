"""A document: the unit that is held out, ordered, and never attended across."""

from typing import NamedTuple


class Document(NamedTuple):
    """One text with its name.

    Attributes:
      name: stable and relative, such as "python/json/decoder.py" or "file.jsonl:17".
      text: never empty, valid UTF-8 when encoded.
      num_bytes: of the text in UTF-8.
    """

    name: str
    text: str
    num_bytes: int
