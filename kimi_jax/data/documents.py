"""A document: the unit that is held out, ordered, and never attended across."""

from collections.abc import Iterator
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


def pages(document: Document, characters: int) -> Iterator[Document]:
    """Cuts a document into pages of `characters` each, the last one shorter; named name#page."""
    for page, begin in enumerate(range(0, len(document.text), characters)):
        text = document.text[begin : begin + characters]
        yield Document(f"{document.name}#{page}", text, len(text.encode()))
