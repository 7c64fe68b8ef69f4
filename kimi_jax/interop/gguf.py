"""Writes a model as one GGUF file, which llama.cpp loads as its architecture `deepseek2`.

Tensors pass through memory in blocks of rows, whatever the size of the model.
"""

import contextlib
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from absl import logging

from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.errors import CheckpointFileError, require
from kimi_jax.interop.ahead import in_order
from kimi_jax.interop.gguf_encode import (
    GgufType,
    PlannedTensor,
    encode,
    gguf_package,
    row_blocks,
    stored_type,
)
from kimi_jax.interop.gguf_layout import check_readable, gguf_tensors
from kimi_jax.interop.gguf_partial import PartialFile
from kimi_jax.interop.gguf_tokenizer import GgufTokenizer, add_tokenizer
from kimi_jax.interop.tensor_source import TensorSource
from kimi_jax.model.router import routed_scaling_factor

_YARN_UNIT = 0.1  # llama.cpp keeps YaRN's mscale_all_dim times this
_BETAS_ASSUMED = (32.0, 1.0)


def plan_gguf(config: ModelConfig, weight_type: GgufType) -> tuple[PlannedTensor, ...]:
    """Returns what `write_gguf` would write, in order.

    Raises:
      ConfigError: llama.cpp does not read such a model, or the extra `gguf` is not installed.
    """
    check_readable(config)
    sizes = gguf_package().GGML_QUANT_SIZES
    planned = []
    for tensor in gguf_tensors(config):
        stored = stored_type(tensor, weight_type)
        values, num_bytes = sizes[gguf_package().GGMLQuantizationType[stored.name]]
        size = math.prod(tensor.shape) // values * num_bytes
        planned.append(PlannedTensor(tensor, stored, size))
    return tuple(planned)


def write_gguf(
    path: str | os.PathLike,
    source: TensorSource,
    tokenizer: GgufTokenizer | None,
    *,
    weight_type: GgufType,
    identity: str,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes a model into a new file.

    Until the file is complete its name ends in `.partial`. The same call goes on after the last
    whole tensor of one that was stopped.

    Args:
      path: the file.
      source: the model.
      tokenizer: from `gguf_tokenizer.read_gguf_tokenizer`; None for a model of ids alone, such as
        one trained on bytes.
      weight_type: format of the weights.
      identity: says what the source is; a stopped call goes on only from the same.
      progress: called with the number of bytes of tensors written so far, those of an earlier call
        included.

    Raises:
      ConfigError: llama.cpp does not read such a model or tokenizer, the model does not have the
        INT4 experts of Q4_0, the file exists, an earlier, stopped call was another one, or the
        extra `gguf` is not installed.
      CheckpointFileError: a tensor of the source is not what it should be, or cannot be stored in
        the format; the file cannot be written.
    """
    path = pathlib.Path(path)
    require(not path.exists(), f"{path} exists; name a file that does not")
    planned = plan_gguf(source.config, weight_type)
    if weight_type is GgufType.Q4_0:
        _require_int4(source, planned)
    writer = gguf_package().GGUFWriter(None, "deepseek2")
    _describe(writer, source.config, weight_type, path.stem)
    add_tokenizer(writer, tokenizer, source.config.vocab_size)
    alignment = gguf_package().GGUF_DEFAULT_ALIGNMENT
    sizes = [entry.num_bytes for entry in planned]
    header = _header(writer, planned)
    with PartialFile(path, header, sizes, identity=identity, alignment=alignment) as file:
        _write_tensors(file, planned, source, progress)


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
    gguf = gguf_package()
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
    gguf = gguf_package()
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
    writer.add_expert_gating_func(gguf_package().ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(routed_scaling_factor(config))


def _header(writer: Any, planned: tuple[PlannedTensor, ...]) -> bytes:
    """Returns the description of model and tensors, up to where the first tensor begins."""
    types_by_name = gguf_package().GGMLQuantizationType
    for entry in planned:
        writer.add_tensor_info(
            entry.tensor.name,
            entry.tensor.shape,
            np.dtype(np.float32),  # the format that follows decides
            entry.num_bytes,
            raw_dtype=types_by_name[entry.stored.name],
        )
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "header"
        try:
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        return file.read_bytes()


def _write_tensors(
    file: PartialFile,
    planned: tuple[PlannedTensor, ...],
    source: TensorSource,
    progress: Callable[[int], None],
) -> None:
    num_bytes = sum(entry.num_bytes for entry in planned[: file.num_done])
    left = 0  # bytes of the current tensor
    with contextlib.closing(_blocks(planned[file.num_done :], source)) as blocks:
        for entry, block in blocks:
            if left == 0:
                file.begin_tensor()
                left = entry.num_bytes
            file.append(block.data, entry.tensor.name)
            left -= block.nbytes
            if left == 0:
                file.end_tensor()
            num_bytes += block.nbytes
            progress(num_bytes)


def _blocks(
    planned: Iterable[PlannedTensor], source: TensorSource
) -> Iterator[tuple[PlannedTensor, np.ndarray]]:
    """Yields the bytes of tensors, block by block."""
    tasks = (
        (source, entry, piece, rows)
        for entry in planned
        for piece in entry.tensor.pieces
        for rows in row_blocks(entry.tensor, piece)
    )
    with contextlib.closing(in_order(encode, tasks)) as blocks:
        for (_, entry, *_), block in blocks:
            yield entry, block.reshape(-1).view(np.uint8)


def verify_gguf(
    path: str | os.PathLike,
    source: TensorSource,
    *,
    weight_type: GgufType,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Converts once more, and compares with the tensors that the format's own reader finds.

    Args:
      path: what `write_gguf` has written.
      source: from which.
      weight_type: with which it was written.
      progress: called with the number of bytes compared so far.

    Raises:
      CheckpointFileError: a tensor is missing or differs.
    """
    found = {tensor.name: tensor for tensor in gguf_package().GGUFReader(path).tensors}
    position, num_bytes = 0, 0  # in the current tensor, and of all
    planned = plan_gguf(source.config, weight_type)
    with contextlib.closing(_blocks(planned, source)) as blocks:
        for entry, expected in blocks:
            name = entry.tensor.name
            stored = found[name].data.reshape(-1).view(np.uint8) if name in found else np.empty(0)
            if not np.array_equal(stored[position : position + expected.size], expected):
                raise CheckpointFileError(
                    f"{path}: tensor {name} is not what the input converts to; convert once more"
                )
            position = (position + expected.size) % entry.num_bytes
            num_bytes += expected.size
            progress(num_bytes)
