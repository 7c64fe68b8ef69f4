"""Writes a model in Hugging Face's form: safetensors files, their index, config.json, tokenizer.

Whatever the source, it is read, converted and written by blocks of rows. All is written into a
folder named OUTPUT.partial, which becomes OUTPUT when everything is there; the same call continues
one that was stopped, file by file.
"""

import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.errors import CheckpointFileError, require
from kimi_jax.interop.disk import check_room
from kimi_jax.interop.hf_checkpoint import CONFIG_FILE
from kimi_jax.interop.hf_encode import Encoder
from kimi_jax.interop.hf_formats import ROTARY_BUFFER, rotary_buffers, stored_tensors
from kimi_jax.interop.hf_names import HfTensor, hf_tensors
from kimi_jax.interop.safetensors_header import TensorInfo
from kimi_jax.interop.safetensors_io import SafetensorsWriter, write_index
from kimi_jax.quantization.int4 import GROUP_SIZE

SHARD_BYTES = 5_000_000_000  # of a file, as the transformers library splits
_PLAN_FILE = "conversion.json"
_METADATA = {"format": "pt"}


class PlannedFile(NamedTuple):
    """One file of an export.

    Attributes:
      name: of the file.
      tensors: of the model, in the order in which they are written.
      infos: all that the file holds, in this order; buffers without parameters come last.
    """

    name: str
    tensors: tuple[HfTensor, ...]
    infos: tuple[TensorInfo, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of values."""
        return sum(info.num_bytes for info in self.infos)


def plan_export(
    config: ModelConfig,
    form: FileFormat,
    *,
    group_size: int = GROUP_SIZE,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[PlannedFile, ...]:
    """Returns what an export writes, from the configuration alone.

    Args:
      config: of the model.
      form: of the checkpoint.
      group_size: of INT4, weights along a matrix's inputs that share a scale.
      shard_bytes: largest size of a file; a larger tensor has a file of its own.

    Raises:
      ConfigError: a tensor cannot be stored in this format.
    """
    shards: list[list[tuple[HfTensor, tuple[TensorInfo, ...]]]] = [[]]
    room = shard_bytes
    for tensor in hf_tensors(config).values():
        infos = stored_tensors(tensor, form, group_size)
        size = sum(info.num_bytes for info in infos)
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append((tensor, infos))
        room -= size
    files = []
    for number, shard in enumerate(shards, start=1):
        tensors, infos = zip(*shard, strict=True)
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        files.append(PlannedFile(name, tensors, tuple(itertools.chain.from_iterable(infos))))
    if form is FileFormat.FP8:
        files[-1] = files[-1]._replace(infos=files[-1].infos + rotary_buffers(config))
    return tuple(files)


def export_hugging_face(
    folder: str | os.PathLike,
    encoder: Encoder,
    *,
    fields: Mapping[str, Any],
    identity: str,
    carried: Iterable[pathlib.Path] = (),
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes a checkpoint that transformers, vLLM and SGLang load.

    Args:
      folder: to become the checkpoint; must not exist. One that was stopped goes on.
      encoder: the model, and the format to store it in.
      fields: of config.json.
      identity: says what the source is; a stopped export goes on only from the same.
      carried: files to copy beside it, such as the tokenizer's.
      shard_bytes: largest size of a file.
      progress: called with the number of bytes written so far, those of an earlier call included.

    Raises:
      ConfigError: the folder exists, or an earlier, stopped export is another one.
      CheckpointFileError: the source cannot be read, or the disk is full.
    """
    folder = pathlib.Path(folder).absolute()
    require(not folder.exists(), f"{folder} exists; name a folder that does not")
    config, form, group_size = encoder.source.config, encoder.form, encoder.group_size
    plan = plan_export(config, form, group_size=group_size, shard_bytes=shard_bytes)
    partial = folder.with_name(folder.name + ".partial")
    done = _begin(partial, plan, [identity, form.value, group_size, shard_bytes])
    num_bytes = 0
    for file in plan:
        if file.name not in done:
            _write_file(partial / file.name, file, encoder, _from(num_bytes, progress))
        num_bytes += file.num_bytes
        progress(num_bytes)
    for path in carried:
        _guarded(partial / path.name, shutil.copyfile, path, partial / path.name)
    text = json.dumps(fields, indent=2) + "\n"
    _guarded(partial / CONFIG_FILE, (partial / CONFIG_FILE).write_text, text)
    write_index(partial, {i.name: file.name for file in plan for i in file.infos}, num_bytes)
    _guarded(folder, partial.rename, folder)
    # After that: a folder that is stopped here is complete, and one that still has its other name
    # still says what it is.
    (folder / _PLAN_FILE).unlink()


def _from(start: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    return lambda num_bytes: progress(start + num_bytes)


def _guarded(path: pathlib.Path, act: Callable[..., Any], *arguments: Any) -> None:
    """Calls `act`; a full disk and its like become an error that names the file."""
    try:
        act(*arguments)
    except OSError as error:
        raise CheckpointFileError(f"{path} cannot be written: {error.strerror}") from error


def _begin(partial: pathlib.Path, plan: tuple[PlannedFile, ...], facts: list[Any]) -> set[str]:
    """Makes the folder, and returns the files that an earlier call has completed in it."""
    content = [facts, [[file.name, [str(info) for info in file.infos]] for file in plan]]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    text = json.dumps({"fingerprint": fingerprint, "what": facts})
    record = partial / _PLAN_FILE
    if record.exists():
        require(
            record.read_text() == text,
            f"{partial} holds another, unfinished export; remove it, or name another output",
        )
    else:
        require(
            not partial.exists() or not any(partial.iterdir()),
            f"{partial} holds files that no export left there; remove it, or name another output",
        )
        partial.mkdir(parents=True, exist_ok=True)
        _guarded(record, record.write_text, text)
    done = {file.name for file in plan if (partial / file.name).exists()}
    check_room(partial, sum(file.num_bytes for file in plan if file.name not in done))
    return done


def _write_file(
    path: pathlib.Path, file: PlannedFile, encoder: Encoder, progress: Callable[[int], None]
) -> None:
    num_bytes = 0
    buffers = {i.name: i for i in file.infos if i.name.endswith(ROTARY_BUFFER)}
    with SafetensorsWriter(path, file.infos, _METADATA) as writer:
        for name, array in encoder.arrays(file.tensors):
            writer.write(name, array)
            num_bytes += array.nbytes
            progress(num_bytes)
        for name, info in buffers.items():
            writer.write(name, _rotary_buffer(encoder.source.config, info.shape[0]))


def _rotary_buffer(config: ModelConfig, size: int) -> np.ndarray:
    exponents = np.arange(size, dtype=np.float64) / size
    return (config.rope_theta**-exponents).astype(ml_dtypes.bfloat16)
