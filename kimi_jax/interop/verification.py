"""Holds what was written against what it was made from."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kimi_jax.configs.compute import ComputeConfig, ComputeDtype
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.configs.quantization import QuantizationConfig
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.core.param_spec import ParamSpec, count_parameters, is_spec, map_specs
from kimi_jax.core.trees import leaf_names
from kimi_jax.interop.hf_encode import Encoder
from kimi_jax.interop.hf_names import from_published, hf_tensors, parts_by_path, row_ranges
from kimi_jax.interop.safetensors_io import SafetensorsFolder
from kimi_jax.interop.tensor_source import TensorSource
from kimi_jax.model import transformer
from kimi_jax.parallel import mesh as meshes
from kimi_jax.parallel.placement import abstract_parameters

MOST_PARAMETERS = 200_000_000  # of models whose logits are compared
LENGTH = 64  # positions
# The program runs once for each model, and takes longer to optimise than to run.
_QUICK = {"xla_backend_optimization_level": 0}


def verify_bytes(
    folder: str | os.PathLike,
    encoder: Encoder,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Converts once more, and compares with the bytes on disk.

    Args:
      folder: what was written.
      encoder: with which it was written.
      progress: called with the number of bytes compared so far.

    Raises:
      CheckpointFileError: a tensor differs; names the file.
    """
    position: dict[str, int] = {}
    num_bytes = 0
    with SafetensorsFolder(folder) as files:
        for name, expected in encoder.arrays(hf_tensors(encoder.source.config).values()):
            first = position.get(name, 0)
            position[name] = first + len(expected)
            found = files.read(name, slice(first, position[name]))
            if found.tobytes() != expected.tobytes():
                raise CheckpointFileError(
                    f"{files.path / files.file_of(name)}: {name} differs from what it was made "
                    f"from in rows {first} to {position[name]}; convert once more"
                )
            num_bytes += found.nbytes
            progress(num_bytes)


class LogitsDifference(NamedTuple):
    """How far two models are apart on a prompt.

    Attributes:
      largest: largest absolute difference of two logits.
      scale: root mean square of the first model's logits.
      same_choice: share of positions at which both prefer the same token.
    """

    largest: float
    scale: float
    same_choice: float


def is_small(source: TensorSource) -> bool:
    """Whether `compare_logits` may take a model."""
    return count_parameters(transformer.specs(source.config)) <= MOST_PARAMETERS


def compare_logits(first: TensorSource, second: TensorSource, *, seed: int = 0) -> LogitsDifference:
    """Runs both models in float32 on the same random tokens.

    Args:
      first: a small model.
      second: another form of it.
      seed: of the tokens.
    """
    vocab_size = first.config.vocab_size
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (1, LENGTH))
    one, other = (_logits(source, jnp.asarray(tokens, jnp.int32)) for source in (first, second))
    return LogitsDifference(
        largest=float(np.max(np.abs(one - other))),
        scale=float(np.sqrt(np.mean(np.square(one)))),
        same_choice=float(np.mean(one.argmax(-1) == other.argmax(-1))),
    )


def parameters(source: TensorSource, mesh: Mesh) -> transformer.TransformerParams:
    """Reads a small model onto a mesh, in float32, by way of the host."""
    plan = transformer.specs(source.config)
    parts = parts_by_path(source.config)

    def read(spec: ParamSpec, path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.empty(like.shape, like.dtype)
        for index, (tensor, part) in parts[path].items():
            whole = tuple(slice(0, size) for size in part.spec.shape)
            rows = source.rows(tensor.name, slice(0, tensor.shape[0]))
            own = np.concatenate([rows[r] for r in row_ranges(tensor, part, whole)])
            values[index] = from_published(part, own, whole)
        return jax.device_put(values, like.sharding)

    paths = leaf_names(plan, is_leaf=is_spec)
    return map_specs(read, plan, paths, abstract_parameters(plan, mesh))


def _logits(source: TensorSource, tokens: jax.Array) -> np.ndarray:
    run = functools.partial(
        transformer.run,
        config=source.config,
        choices=ComputeConfig(dtype=ComputeDtype.FLOAT32),
        quantization=QuantizationConfig(),
    )
    mesh = meshes.make_mesh(ParallelConfig(data=1, expert=1), source.config.num_routed_experts)
    with jax.set_mesh(mesh):
        return np.asarray(
            jax.jit(run, compiler_options=_QUICK)(parameters(source, mesh), tokens)[0]
        )
