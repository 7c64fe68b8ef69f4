"""Reads a published checkpoint onto a mesh; each process reads what its own devices hold."""

import concurrent.futures
import dataclasses
import enum
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core import precision
from kimi_jax.core.errors import require
from kimi_jax.core.param_spec import ParamSpec, is_spec, map_specs
from kimi_jax.core.trees import leaf_names
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_names import (
    HfTensor,
    Part,
    column_ranges,
    from_published,
    parts_by_path,
    row_ranges,
)
from kimi_jax.model import transformer
from kimi_jax.model.router import routed_scaling_factor
from kimi_jax.parallel import rules
from kimi_jax.parallel.quantized import storage_layout
from kimi_jax.quantization.int4 import CODES_PER_WORD, Int4Weight

_THREADS = 4  # that read and dequantise

Index = tuple[slice, ...]
# Returns a piece of one layer's and expert's parameter, as it lies in a tensor.
ReadPiece = Callable[[HfTensor, Part, Index], np.ndarray]


class Int4Import(enum.Enum):
    """What becomes of weights that a checkpoint holds in INT4."""

    DEQUANTIZE = "dequantize"  # float32 masters, which training rounds to the same codes
    KEEP = "keep"  # codes and scales, to compute with as they are


def check_architecture(checkpoint: HfCheckpoint, config: ModelConfig) -> None:
    """Raises `ConfigError` where a checkpoint's architecture is not that of `model`.

    How far a context reaches, and how initial weights are drawn, may differ.
    """
    given, wanted = (_architecture(c) for c in (checkpoint.config, config))
    different = [
        f"\n  model.{name}: {wanted[name]} here, {given[name]} there"
        for name in wanted
        if given[name] != wanted[name]
    ]
    require(
        not different,
        f"{checkpoint.path} holds a model of another architecture; set model to "
        "kimi_jax.configs.hugging_face.model_config_from_hugging_face(its config.json):"
        + "".join(different),
    )


def _architecture(config: ModelConfig) -> dict[str, Any]:
    free = {"max_position": 1, "yarn": None, "init_std": 1.0}
    factor = routed_scaling_factor(config)
    return dataclasses.asdict(dataclasses.replace(config, routed_scaling_factor=factor, **free))


def import_parameters(
    checkpoint: HfCheckpoint,
    mesh: Mesh,
    *,
    int4: Int4Import = Int4Import.DEQUANTIZE,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> transformer.TransformerParams:
    """Reads the parameters of a checkpoint straight into their storage layout.

    Each process reads the bytes that its devices' shards need, once for all devices that hold the
    same shard; on the host there is one shard at a time.

    Args:
      checkpoint: to read.
      mesh: where the parameters go.
      int4: what becomes of weights in INT4.
      progress: called with the number of bytes that this process has read so far.

    Returns:
      The parameters in float32, exactly as the checkpoint has them; where codes are kept, an
      `Int4Weight` in a weight's place, as in a packed model.

    Raises:
      CheckpointFileError: something cannot be read.
    """
    plan = transformer.specs(checkpoint.config)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        reader = _Reader(checkpoint, mesh, pool, progress)

        def read(spec: ParamSpec, path: str) -> Any:
            is_kept = int4 is Int4Import.KEEP and reader.form(path) is FileFormat.INT4
            return reader.packed(spec, path) if is_kept else reader.values(spec, path)

        return map_specs(read, plan, leaf_names(plan, is_leaf=is_spec))


class _Reader:
    """Reads one parameter after the other, its layers and experts side by side."""

    def __init__(
        self,
        checkpoint: HfCheckpoint,
        mesh: Mesh,
        pool: concurrent.futures.Executor,
        progress: Callable[[int], None],
    ) -> None:
        self._checkpoint, self._mesh, self._pool = checkpoint, mesh, pool
        self._progress = progress
        self._parts = parts_by_path(checkpoint.config)

    def form(self, path: str) -> FileFormat:
        """Returns how the checkpoint stores a parameter."""
        return self._checkpoint.form(self._tensor(path).name)

    def values(self, spec: ParamSpec, path: str) -> jax.Array:
        """Returns a parameter in float32."""
        layout = rules.partition_spec(spec, rules.STORAGE, self._mesh.shape)
        return self._array(path, spec.shape, layout, precision.MASTER, self._piece_of_values)

    def packed(self, spec: ParamSpec, path: str) -> Int4Weight:
        """Returns a parameter's codes and scales."""
        group_size = self._checkpoint.group_size
        layout = storage_layout(spec, group_size, self._mesh.shape)
        *others, inputs, outputs = spec.shape
        codes = (*others, inputs // CODES_PER_WORD, outputs)
        scales = (*others, inputs // group_size, outputs)
        return Int4Weight(
            codes=self._array(path, codes, layout, np.int32, self._piece_of_codes),
            scales=self._array(path, scales, layout, jnp.bfloat16, self._piece_of_scales),
        )

    def _tensor(self, path: str) -> HfTensor:
        return next(iter(self._parts[path].values()))[0]

    def _piece_of_values(self, tensor: HfTensor, part: Part, index: Index) -> np.ndarray:
        columns = column_ranges(part, index) or [None]
        rows = [
            np.concatenate([self._checkpoint.piece(tensor.name, r, c) for c in columns], axis=-1)
            for r in row_ranges(tensor, part, index)
        ]
        return from_published(part, np.concatenate(rows), index)

    def _piece_of_codes(self, tensor: HfTensor, part: Part, index: Index) -> np.ndarray:
        words, rows = index
        return self._checkpoint.int4_codes(tensor.name, rows, words).T

    def _piece_of_scales(self, tensor: HfTensor, part: Part, index: Index) -> np.ndarray:
        groups, rows = index
        return self._checkpoint.int4_scales(tensor.name, rows, groups).T

    def _array(
        self,
        path: str,
        shape: tuple[int, ...],
        layout: PartitionSpec,
        dtype: Any,
        read_piece: ReadPiece,
    ) -> jax.Array:
        """Reads each shard once, and puts it on all devices of this process that hold it."""
        sharding = NamedSharding(self._mesh, layout)
        holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            bounds = tuple(i.indices(n)[:2] for i, n in zip(index, shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        arrays = []
        for bounds, devices in holders.items():
            index = tuple(slice(*ends) for ends in bounds)
            shard = self._shard(path, index, dtype, read_piece)
            arrays += [jax.device_put(shard, device) for device in devices]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _shard(self, path: str, index: Index, dtype: Any, read_piece: ReadPiece) -> np.ndarray:
        parts = self._parts[path]
        num_stacked = len(next(iter(parts)))
        stacked, rest = index[:num_stacked], index[num_stacked:]
        shard = np.empty([i.stop - i.start for i in index], dtype)

        def fill(place: tuple[int, ...]) -> None:
            local = tuple(i - s.start for i, s in zip(place, stacked, strict=True))
            shard[local] = read_piece(*parts[place], rest)
            self._progress(self._checkpoint.files.bytes_read)

        places = itertools.product(*(range(s.start, s.stop) for s in stacked))
        for _ in self._pool.map(fill, places):
            pass  # raises what a thread raised
        return shard
