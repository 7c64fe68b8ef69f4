"""A GGUF file that is being written, and how far an earlier call came with it."""

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import BinaryIO

from kimi_jax.core.errors import CheckpointFileError, require
from kimi_jax.interop.disk import check_room


class PartialFile:
    """A context manager: appends tensors to PATH.partial, which becomes PATH when all are there.

    PATH.partial.json says how many tensors are on the disk, so that a call that was stopped, or
    whose machine was, goes on after them.

    Attributes:
      num_done: tensors that are there already.
    """

    def __init__(
        self,
        path: pathlib.Path,
        header: bytes,
        sizes: Sequence[int],
        *,
        identity: str,
        alignment: int,
    ) -> None:
        """Decides where to begin.

        Args:
          path: of the complete file.
          header: what stands before the tensors.
          sizes: bytes of each tensor.
          identity: says what the source is.
          alignment: every tensor begins at a multiple of it.

        Raises:
          ConfigError: what stands in PATH.partial is of another source or plan.
        """
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._record = path.with_name(path.name + ".partial.json")
        self._header, self._sizes, self._alignment = header, sizes, alignment
        self._fingerprint = hashlib.sha256(identity.encode() + header).hexdigest()
        self.num_done = self._read_record()
        self._file: BinaryIO | None = None

    def __enter__(self) -> "PartialFile":
        try:
            if self.num_done == 0:
                self._save(0)
                self._partial.write_bytes(self._header)
            position = len(self._header)
            for size in self._sizes[: self.num_done]:
                position = self._aligned(position) + size
            left_over = self._partial.stat().st_size - position
            check_room(self._partial, sum(self._sizes[self.num_done :]), freed=left_over)
            self._file = self._partial.open("r+b")
            self._file.truncate(position)
            self._file.seek(position)
        except OSError as error:
            raise self._error(error) from error
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._file:
            if error is not None:
                return
            assert self.num_done == len(self._sizes), (self.num_done, len(self._sizes))
        try:
            self._partial.rename(self._path)
            self._record.unlink()
        except OSError as failure:
            raise self._error(failure) from failure

    def append(self, data: memoryview, name: str) -> None:
        """Appends a part of the tensor of this name."""
        try:
            self._file.write(data)
        except OSError as error:
            raise CheckpointFileError(
                f"tensor {name} cannot be written to {self._partial}: {error.strerror}"
            ) from error

    def begin_tensor(self) -> None:
        """Moves on to where the next tensor begins."""
        position = self._file.tell()
        self.append(memoryview(bytes(self._aligned(position) - position)), "padding")

    def end_tensor(self) -> None:
        """Notes that one more tensor is on the disk; the last is followed by its padding."""
        try:
            if self.num_done + 1 == len(self._sizes):
                self.begin_tensor()
            self._file.flush()
            os.fsync(self._file.fileno())
            self.num_done += 1
            self._save(self.num_done)
        except OSError as error:
            raise self._error(error) from error

    def _aligned(self, position: int) -> int:
        return math.ceil(position / self._alignment) * self._alignment

    def _read_record(self) -> int:
        """Returns how many tensors an earlier call has left, if that was the same call."""
        if not self._partial.exists():
            return 0
        text = self._record.read_text() if self._record.exists() else "{}"
        record = json.loads(text)
        require(
            record.get("fingerprint") == self._fingerprint,
            f"{self._partial} holds another, unfinished export; remove it, or name another output",
        )
        return record["tensors"]

    def _save(self, num_done: int) -> None:
        text = json.dumps({"fingerprint": self._fingerprint, "tensors": num_done})
        temporary = self._record.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self._record)

    def _error(self, error: OSError) -> CheckpointFileError:
        return CheckpointFileError(f"{self._partial} cannot be written: {error}")
