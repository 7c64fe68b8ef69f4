"""Writes a model as one GGUF file, which llama.cpp loads as its architecture `deepseek2`.

Tensors pass through memory in blocks of rows, whatever the size of the model.
"""

import dataclasses
import enum
import os
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from absl import logging

from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.errors import CheckpointFileError, ConfigError, require
from kimi_jax.interop.gguf_layout import (
    GgufTensor,
    Piece,
    Role,
    check_readable,
    gguf_tensors,
)
from kimi_jax.interop.gguf_tokenizer import GgufTokenizer, add_tokenizer
from kimi_jax.interop.tensor_source import PackedRows, TensorSource
from kimi_jax.model.router import routed_scaling_factor

_BLOCK_VALUES = 1 << 23
_ROW_MULTIPLE = 128  # rows that share scales in FP8 checkpoints
_Q4_BLOCK = 32
_YARN_UNIT = 0.1  # llama.cpp keeps YaRN's mscale_all_dim times this
_BETAS_ASSUMED = (32.0, 1.0)


class GgufType(enum.Enum):
    """Formats of weights; norms, selection biases and routers are float32 in each.

    Q8_0 has 8-bit codes with a scale for 32 inputs, and float16 for matrices whose inputs are no
    multiple of 32. Q4_0 holds the INT4 codes and scales of routed experts as they are; everything
    else is bfloat16.
    """

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


_LARGEST_HALF = 65504.0
_LARGEST = {GgufType.F16: _LARGEST_HALF, GgufType.Q8_0: 127 * _LARGEST_HALF}


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file, its format and its size."""

    tensor: GgufTensor
    stored: GgufType
    num_bytes: int


def plan_gguf(config: ModelConfig, weight_type: GgufType) -> tuple[PlannedTensor, ...]:
    """Returns what `write_gguf` would write, in order.

    Raises:
      ConfigError: llama.cpp does not read such a model, or the extra `gguf` is not installed.
    """
    check_readable(config)
    sizes = _package().GGML_QUANT_SIZES
    planned = []
    for tensor in gguf_tensors(config):
        stored = _stored_type(tensor, weight_type)
        values, num_bytes = sizes[_package().GGMLQuantizationType[stored.name]]
        planned.append(
            PlannedTensor(tensor, stored, int(np.prod(tensor.shape)) // values * num_bytes)
        )
    return tuple(planned)


def write_gguf(
    path: str | os.PathLike,
    source: TensorSource,
    tokenizer: GgufTokenizer | None,
    *,
    weight_type: GgufType,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes a model into a new file.

    Until the file is complete its name ends in `.partial`.

    Args:
      path: the file.
      source: the model.
      tokenizer: from `gguf_tokenizer.read_gguf_tokenizer`; None for a model of ids alone, such as
        one trained on bytes.
      weight_type: format of the weights.
      progress: called with the number of bytes of tensors written so far.

    Raises:
      ConfigError: llama.cpp does not read such a model or tokenizer, the model does not have the
        INT4 experts of Q4_0, the file exists, or the extra `gguf` is not installed.
      CheckpointFileError: a tensor of the source is not what it should be, or cannot be stored in
        the format; the file cannot be written.
    """
    path = pathlib.Path(path)
    require(not path.exists(), f"{path} exists; name a file that does not")
    planned = plan_gguf(source.config, weight_type)
    if weight_type is GgufType.Q4_0:
        _require_int4(source, planned)
    writer = _package().GGUFWriter(None, "deepseek2")
    _describe(writer, source.config, weight_type, path.stem)
    add_tokenizer(writer, tokenizer, source.config.vocab_size)
    partial = path.with_name(path.name + ".partial")
    try:
        _write_header(writer, planned, partial)
        with partial.open("ab") as file:
            num_bytes = 0
            for entry in planned:
                for block in _encoded(source, entry):
                    _append(file, block, entry.tensor.name)
                    num_bytes += block.nbytes
                    progress(num_bytes)
                    del block  # before the next one is read
                _pad(file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise CheckpointFileError(f"cannot write {partial}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _package() -> types.ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "writing GGUF files needs the package gguf: pip install 'kimi_jax[gguf]'"
        ) from error
    return gguf


def _stored_type(tensor: GgufTensor, weight_type: GgufType) -> GgufType:
    if tensor.role is Role.SMALL:
        return GgufType.F32
    if weight_type is GgufType.Q4_0:
        return GgufType.Q4_0 if tensor.role is Role.ROUTED_EXPERT else GgufType.BF16
    if weight_type is GgufType.Q8_0 and tensor.shape[-1] % 32:
        return GgufType.F16
    return weight_type


def _require_int4(source: TensorSource, planned: tuple[PlannedTensor, ...]) -> None:
    names = [e.tensor.pieces[0].name for e in planned if e.stored is GgufType.Q4_0]
    held = bool(names) and source.int4_rows(names[0], slice(0, 1)) is not None
    require(
        held,
        "q4_0 stores the INT4 weights of routed experts as they are, and this model has none; "
        "choose q8_0, bf16, f16 or f32",
    )


def _describe(writer: Any, config: ModelConfig, weight_type: GgufType, name: str) -> None:
    """Adds what llama.cpp has to know about the model."""
    gguf = _package()
    mostly = "ALL" if weight_type is GgufType.F32 else "MOSTLY"
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"{mostly}_{weight_type.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    _describe_attention(writer, config)
    _describe_rotation(writer, config)
    _describe_feed_forward(writer, config)


def _describe_attention(writer: Any, config: ModelConfig) -> None:
    """In the latent space all heads share one key and value."""
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_latent_dim or 0)  # llama.cpp takes 0 for none, not its absence
    writer.add_kv_lora_rank(config.kv_latent_dim)
    writer.add_key_length(config.kv_latent_dim + config.head_rope_dim)
    writer.add_value_length(config.kv_latent_dim)
    writer.add_key_length_mla(config.head_qk_dim)
    writer.add_value_length_mla(config.head_value_dim)


def _describe_rotation(writer: Any, config: ModelConfig) -> None:
    gguf = _package()
    writer.add_rope_dimension_count(config.head_rope_dim)
    writer.add_rope_freq_base(config.rope_theta)
    yarn = config.yarn
    if yarn is None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position)
    writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
    writer.add_rope_scaling_yarn_log_mul(_YARN_UNIT * yarn.mscale_all_dim)
    if (yarn.beta_fast, yarn.beta_slow) != _BETAS_ASSUMED:
        logging.warning(
            "llama.cpp does not read YaRN's betas from the file of a deepseek2 model: run it with "
            "--yarn-beta-fast %g --yarn-beta-slow %g, or its logits are those of 32 and 1",
            yarn.beta_fast,
            yarn.beta_slow,
        )


def _describe_feed_forward(writer: Any, config: ModelConfig) -> None:
    writer.add_leading_dense_block_count(config.num_dense_layers)
    writer.add_feed_forward_length(config.dense_ffn_dim)
    writer.add_expert_feed_forward_length(config.expert_ffn_dim)
    writer.add_expert_count(config.num_routed_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_expert_shared_count(config.num_shared_experts)
    # llama.cpp refuses groups that limit nothing.
    limited = config.expert_groups_per_token < config.num_expert_groups
    writer.add_expert_group_count(config.num_expert_groups if limited else 1)
    writer.add_expert_group_used_count(config.expert_groups_per_token if limited else 1)
    writer.add_expert_gating_func(_package().ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(routed_scaling_factor(config))


def _write_header(writer: Any, planned: tuple[PlannedTensor, ...], file: pathlib.Path) -> None:
    """Writes the description of model and tensors, up to where the first tensor begins."""
    types_by_name = _package().GGMLQuantizationType
    for entry in planned:
        writer.add_tensor_info(
            entry.tensor.name,
            entry.tensor.shape,
            np.dtype(np.float32),  # the format that follows decides
            entry.num_bytes,
            raw_dtype=types_by_name[entry.stored.name],
        )
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with file.open("ab") as stream:
        _pad(stream)


def _pad(file: BinaryIO) -> None:
    """Every tensor begins at a multiple of the format's alignment."""
    file.write(bytes(-file.tell() % _package().GGUF_DEFAULT_ALIGNMENT))


def _append(file: BinaryIO, block: np.ndarray, name: str) -> None:
    try:
        file.write(block.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise CheckpointFileError(
            f"cannot write tensor {name} to {file.name}: {error.strerror}"
        ) from error


def _encoded(source: TensorSource, entry: PlannedTensor) -> Iterator[np.ndarray]:
    """Yields a tensor as the file holds it, in blocks."""
    for piece in entry.tensor.pieces:
        for rows in _row_blocks(entry.tensor, piece):
            yield _read_block(source, entry, piece, rows)


def _row_blocks(tensor: GgufTensor, piece: Piece) -> Iterator[slice]:
    """Cuts a piece into rows that fit into memory; a transposed one is small."""
    count = piece.rows.stop - piece.rows.start
    if not piece.transposed:
        count = max(_BLOCK_VALUES // tensor.shape[-1], 1)
        count = max(count // _ROW_MULTIPLE * _ROW_MULTIPLE, min(count, _ROW_MULTIPLE))
    for start in range(piece.rows.start, piece.rows.stop, count):
        yield slice(start, min(start + count, piece.rows.stop))


def _read_block(
    source: TensorSource, entry: PlannedTensor, piece: Piece, rows: slice
) -> np.ndarray:
    """Returns the bytes of some rows as the file holds them."""
    shape = entry.tensor.shape
    if entry.stored is GgufType.Q4_0:
        packed = source.int4_rows(piece.name, rows)
        return int4_blocks(packed, piece.name, (rows.stop - rows.start, shape[-1]))
    values = source.rows(piece.name, rows)
    inputs = shape[-2:-1] if piece.transposed else shape[1:][-1:]
    expected = (rows.stop - rows.start, *inputs)
    if values.shape != expected:
        raise CheckpointFileError(
            f"rows {rows.start} to {rows.stop} of {piece.name} have the shape "
            f"{list(values.shape)}, and should have {list(expected)}"
        )
    values = np.ascontiguousarray(values.T) if piece.transposed else values
    return _convert(values, entry.stored, piece.name)


def _convert(values: np.ndarray, stored: GgufType, name: str) -> np.ndarray:
    """Rounds values to a format.

    Raises:
      CheckpointFileError: one is too large for the format, or is no number.
    """
    if stored is GgufType.BF16:
        return values.astype(ml_dtypes.bfloat16, copy=False)
    values = values.astype(np.float32, copy=False)
    if stored is GgufType.F32:
        return values
    largest = max(values.max(), -values.min())  # NaN where there is one
    if not largest <= _LARGEST[stored]:
        raise CheckpointFileError(
            f"{name} has a value of size {largest:g}, and {stored.value} holds sizes up to "
            f"{_LARGEST[stored]:g}; choose bf16 or f32, if it is a number at all"
        )
    if stored is GgufType.F16:
        return values.astype(np.float16)
    return _package().quants.quantize(values, _package().GGMLQuantizationType.Q8_0)


def int4_blocks(packed: PackedRows | None, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Lays INT4 rows out as blocks of Q4_0, codes and scales unchanged.

    Both hold code + 8 in a nibble and multiply code by scale. A block has the scale of 32 inputs
    as float16, then 16 bytes: input i in the low nibble of byte i, input i + 16 in the high one.
    float16 has every bfloat16 number from 2^-17, which is less than the smallest scale of
    quantisation, 1e-5, to 65280.

    Args:
      packed: rows in the order of compressed-tensors; None where the tensor is not INT4.
      name: of the published tensor.
      shape: rows and inputs that there should be.

    Returns:
      uint8 [rows, inputs / 32 * 18].

    Raises:
      CheckpointFileError: the rows have another shape, or a scale that float16 does not have.
    """
    rows, inputs = shape
    if packed is None:
        raise CheckpointFileError(
            f"{name} is not held in INT4, unlike other routed experts; export q8_0 or bf16"
        )
    words, scales = packed
    if words.shape != (rows, inputs // 8) or scales.shape != (rows, inputs // _Q4_BLOCK):
        raise CheckpointFileError(
            f"{name} has codes {list(words.shape)} and scales {list(scales.shape)}; q4_0 needs "
            f"[{rows}, {inputs // 8}] and [{rows}, {inputs // _Q4_BLOCK}], groups of {_Q4_BLOCK}"
        )
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    inexact = (half.astype(np.float32) != scales.astype(np.float32)) | ~np.isfinite(half)
    if inexact.any():
        raise CheckpointFileError(
            f"{name} has the scale {float(scales[inexact][0]):g}, which float16 does not have: "
            "q4_0 would change its weights; export q8_0 or bf16"
        )
    # Bytes in the published order hold inputs 2 b and 2 b + 1.
    pairs = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(rows, -1, 2, 8)
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    blocks = np.empty((rows, inputs // _Q4_BLOCK, 18), np.uint8)
    blocks[..., :2] = half.astype("<f2")[..., None].view(np.uint8)
    blocks[..., 2::2] = (first & 0x0F) | (second << 4)
    blocks[..., 3::2] = (first >> 4) | (second & 0xF0)
    return blocks.reshape(rows, -1)
