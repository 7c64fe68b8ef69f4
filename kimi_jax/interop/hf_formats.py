"""How published checkpoints store their tensors, and what a folder of them holds and lacks.

| format | matrices of routed experts | other matrices but the router's | the rest |
|---|---|---|---|
| bf16 | bfloat16 | bfloat16 | bfloat16; selection bias float32 |
| fp8 | FP8, a scale for each 128 x 128 block | likewise | likewise |
| int4 | four bits, a scale for each 32 inputs | bfloat16 | likewise |

Source: the released checkpoints of Kimi K2 (fp8), Kimi K2 Thinking (int4) and Moonlight (bf16).
"""

import enum
import re
from collections.abc import Mapping
from typing import NamedTuple

from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.errors import CheckpointFileError, require
from kimi_jax.interop.fp8_blocks import num_blocks
from kimi_jax.interop.hf_names import HfTensor, hf_tensors
from kimi_jax.interop.safetensors_header import TensorInfo
from kimi_jax.quantization.int4 import CODES_PER_WORD, GROUP_SIZE

FP8_SCALE = "_scale_inv"
INT4_CODES, INT4_SCALE, INT4_SHAPE = "_packed", "_scale", "_shape"
ROTARY_BUFFER = "rotary_emb.inv_freq"
TEXT_PREFIX = "language_model."  # of models with a vision tower
_MTP_INPUT = "eh_proj.weight"  # of no other layer: it joins embedding and hidden state
_FLOATS = ("BF16", "F32", "F16")  # that unquantised tensors may have
_READ = {"I64": ("I64", "I32")}  # dtypes that are read in place of the one that is written
_MOST_NAMED = 5  # in an error


class Ignored(enum.Enum):
    """Why a tensor of a folder is not part of the model."""

    ROTARY_BUFFER = "a buffer of rotary frequencies, which follow from the configuration"
    VISION = "the vision tower and its projector, which this model does not have"
    TOKEN_PREDICTION = "a multi-token prediction layer, which this model does not have"


def stored_as(tensor: HfTensor, form: FileFormat) -> FileFormat:
    """Returns how a checkpoint of a format stores one tensor; BF16 is what is not quantised."""
    match form:
        case FileFormat.FP8:
            is_quantised = tensor.is_linear
        case FileFormat.INT4:
            is_quantised = tensor.is_expert
        case _:
            is_quantised = False
    return form if is_quantised else FileFormat.BF16


def stored_tensors(
    tensor: HfTensor, form: FileFormat, group_size: int = GROUP_SIZE
) -> tuple[TensorInfo, ...]:
    """Returns what stands in the files for one tensor.

    Raises:
      ConfigError: it cannot be stored so.
    """
    name, shape = tensor.name, tensor.shape
    match stored_as(tensor, form):
        case FileFormat.FP8:
            scales = tuple(num_blocks(size) for size in shape)
            return TensorInfo(name, "F8_E4M3", shape), TensorInfo(name + FP8_SCALE, "F32", scales)
        case FileFormat.INT4:
            rows, inputs = shape
            require(
                inputs % group_size == 0,
                f"{name} cannot be stored in INT4: groups of {group_size} do not divide its "
                f"{inputs} inputs; choose another format",
            )
            return (
                TensorInfo(name + INT4_CODES, "I32", (rows, inputs // CODES_PER_WORD)),
                TensorInfo(name + INT4_SCALE, "BF16", (rows, inputs // group_size)),
                TensorInfo(name + INT4_SHAPE, "I64", (2,)),
            )
        case _:
            return (TensorInfo(name, "F32" if tensor.is_selection_bias else "BF16", shape),)


def rotary_buffers(config: ModelConfig) -> tuple[TensorInfo, ...]:
    """Returns the buffers that Kimi K2's released FP8 files hold beside the weights.

    Their size is that of a rotation over all of D / N, which no layer computes; readers skip them.
    """
    size = config.embed_dim // config.num_heads // 2
    name = "model.layers.{}.self_attn." + ROTARY_BUFFER
    return tuple(TensorInfo(name.format(i), "BF16", (size,)) for i in range(config.num_layers))


class Contents(NamedTuple):
    """What a folder holds.

    Attributes:
      prefix: what stands before the name of every tensor of the model.
      forms: how each tensor of the model is stored, by its name without prefix.
      ignored: names that are no part of the model, by the reason.
    """

    prefix: str
    forms: dict[str, FileFormat]
    ignored: dict[Ignored, list[str]]


def contents(config: ModelConfig, found: Mapping[str, TensorInfo], where: str) -> Contents:
    """Accounts for every tensor of a folder.

    Args:
      config: of the model that should be there.
      found: the tensors of the files.
      where: names the folder in errors.

    Raises:
      CheckpointFileError: tensors are missing, have other shapes or dtypes, or belong to nothing.
    """
    prefix = TEXT_PREFIX if any(name.startswith(TEXT_PREFIX) for name in found) else ""
    forms, used = {}, set()
    for name, tensor in hf_tensors(config).items():
        form = _form_of(tensor, prefix, found, where)
        expected = _expected(tensor, form, prefix, found)
        _check(expected, form, prefix, found, where)
        forms[name] = form
        used.update(prefix + info.name for info in expected)
    _check_group_sizes(forms, prefix, found, where)
    ignored: dict[Ignored, list[str]] = {}
    extra = []
    for name in found.keys() - used:
        reason = _reason(name, prefix, config, found)
        ignored.setdefault(reason, []).append(name) if reason else extra.append(name)
    if extra:
        _fail(where, sorted(extra), "belongs to nothing in the model that config.json describes")
    return Contents(prefix, forms, ignored)


def _form_of(
    tensor: HfTensor, prefix: str, found: Mapping[str, TensorInfo], where: str
) -> FileFormat:
    name = prefix + tensor.name
    if name + INT4_CODES in found:
        if not tensor.is_expert:
            _fail(where, [name], "is in INT4, in which only routed experts may be")
        return FileFormat.INT4
    if name not in found:
        _fail(where, [name], "is missing")
    return FileFormat.FP8 if found[name].dtype == "F8_E4M3" else FileFormat.BF16


def _expected(
    tensor: HfTensor, form: FileFormat, prefix: str, found: Mapping[str, TensorInfo]
) -> tuple[TensorInfo, ...]:
    """Returns what must be there, the group size being the one that is there."""
    scales = found.get(prefix + tensor.name + INT4_SCALE)
    groups = scales.shape[-1] if form is FileFormat.INT4 and scales and scales.shape else 0
    fits = groups and tensor.shape[-1] % groups == 0
    return stored_tensors(tensor, form, tensor.shape[-1] // groups if fits else GROUP_SIZE)


def _check(
    expected: tuple[TensorInfo, ...],
    form: FileFormat,
    prefix: str,
    found: Mapping[str, TensorInfo],
    where: str,
) -> None:
    for info in expected:
        name = prefix + info.name
        if name not in found:
            _fail(where, [name], "is missing")
        given = found[name]
        if given.shape != info.shape:
            _fail(where, [name], f"must be {list(info.shape)}, but is {list(given.shape)}")
        allowed = _FLOATS if form is FileFormat.BF16 else _READ.get(info.dtype, (info.dtype,))
        if given.dtype not in allowed:
            _fail(where, [name], f"must be {' or '.join(allowed)}, but is {given.dtype}")


def _check_group_sizes(
    forms: Mapping[str, FileFormat], prefix: str, found: Mapping[str, TensorInfo], where: str
) -> None:
    """Raises where weights in INT4 have groups of different sizes: a stack of them has one."""
    sizes: dict[int, str] = {}
    for name, form in forms.items():
        if form is FileFormat.INT4:
            words, scales = (found[prefix + name + part] for part in (INT4_CODES, INT4_SCALE))
            size = words.shape[1] * CODES_PER_WORD // scales.shape[1]
            sizes.setdefault(size, prefix + name + INT4_SCALE)
    if len(sizes) > 1:
        _fail(where, list(sizes.values()), f"have groups of different sizes: {list(sizes)}")


def _reason(
    name: str, prefix: str, config: ModelConfig, found: Mapping[str, TensorInfo]
) -> Ignored | None:
    name = name.removeprefix(prefix)
    if name.startswith(("vision_tower.", "mm_projector.")):
        return Ignored.VISION
    if name.endswith(ROTARY_BUFFER):
        return Ignored.ROTARY_BUFFER
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_layers and prefix + layer[0] + _MTP_INPUT in found:
        return Ignored.TOKEN_PREDICTION
    return None


def _fail(where: str, names: list[str], problem: str) -> None:
    more = f" (and {len(names) - _MOST_NAMED} more)" if len(names) > _MOST_NAMED else ""
    raise CheckpointFileError(f"{where}: {', '.join(names[:_MOST_NAMED])}{more} {problem}")
