"""A folder of results that are whole or absent, even with two processes at work or one killed."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from kimi_jax.core.errors import DataError


def cache_root(cache_dir: str | None) -> pathlib.Path:
    """Returns the folder of cached results: `cache_dir`, or the user's own."""
    if cache_dir is not None:
        return pathlib.Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "kimi_jax"


def fingerprint(facts: Any) -> str:
    """Returns 32 hexadecimal digits that depend on `facts`, any JSON value."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_facts(files: list[pathlib.Path]) -> list[tuple[str, int, int]]:
    """Returns name, bytes and modification time of each file: what changes when its text does."""
    stats = [(file, file.stat()) for file in files]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def cached_folder(folder: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Returns `folder`, made by `fill` if it does not exist.

    `fill` writes into a folder beside it, which then gets its name in one step. If another process
    was faster, its result, which is equal, is kept.

    Args:
      folder: named by a fingerprint of everything that its content depends on.
      fill: writes the content into the folder it is given.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"cannot write to the cache folder {folder.parent}: {error}; set data.cache_dir"
        ) from error
    try:
        fill(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
