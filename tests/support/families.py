"""Small random checkpoints in the forms in which the family's models are published.

Formats stand here as the released files have them, written down by hand and apart from
kimi_jax.interop; files are written by the safetensors library, and values computed by loops.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from kimi_jax.configs.hugging_face_export import FileFormat, to_hugging_face, with_quantization
from kimi_jax.configs.model import ModelConfig, YarnConfig
from kimi_jax.model.transformer import TransformerParams
from tests.support import published

Tensors = dict[str, np.ndarray]

# Sizes that are no multiples of a block of 128: 144 rows of kv_a_proj are two blocks, the second of
# 16 rows, as the 576 rows of the released models are five; halves would be 72.
K2 = ModelConfig(
    vocab_size=48,
    embed_dim=256,
    num_layers=2,
    num_dense_layers=1,
    num_heads=2,
    q_latent_dim=136,
    kv_latent_dim=128,
    head_nope_dim=16,
    head_rope_dim=16,
    head_value_dim=24,
    dense_ffn_dim=160,
    expert_ffn_dim=64,
    num_routed_experts=8,
    num_shared_experts=1,
    experts_per_token=2,
    routed_scaling_factor=1.5,
    yarn=YarnConfig(factor=32.0, original_max_position=64, beta_fast=1.0, beta_slow=1.0),
    max_position=2048,
)
MOONLIGHT = dataclasses.replace(
    K2, q_latent_dim=None, num_shared_experts=2, yarn=None, norm_eps=1e-5
)
DEEPSEEK_V3 = dataclasses.replace(
    K2, num_layers=3, num_dense_layers=2, num_expert_groups=4, expert_groups_per_token=2
)


class Family(NamedTuple):
    """How a model is published."""

    config: ModelConfig
    form: FileFormat
    prefix: str = ""
    token_prediction: bool = False
    vision: bool = False
    rotary_buffers: bool = False


FAMILIES = {
    "kimi_k2": Family(K2, FileFormat.FP8, rotary_buffers=True),
    "kimi_k2_thinking": Family(K2, FileFormat.INT4),
    "kimi_k2_5": Family(K2, FileFormat.INT4, prefix="language_model.", vision=True),
    "moonlight": Family(MOONLIGHT, FileFormat.BF16),
    "deepseek_v3": Family(DEEPSEEK_V3, FileFormat.FP8, token_prediction=True),
    "kimi_k2_bf16": Family(K2, FileFormat.BF16),
}


def random_tensors(family: Family, *, any_codes: bool = True, seed: int = 0) -> Tensors:
    """Draws what the files of a model hold.

    Args:
      family: the model.
      any_codes: INT4 weights have any code, -8 too, and any scale; otherwise those that rounding a
        weight gives.
      seed: of all of it.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in published.shapes(family.config).items():
        tensors |= _stored(name, shape, family.form, random, any_codes=any_codes)
    config, layers = family.config, family.config.num_layers
    if family.rotary_buffers:
        size = config.embed_dim // config.num_heads // 2
        frequencies = config.rope_theta ** -(np.arange(size) / size)
        buffer = frequencies.astype(ml_dtypes.bfloat16)
        name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
        tensors |= {name.format(layer): buffer for layer in range(layers)}
    if family.token_prediction:
        extra = ("eh_proj.weight", "enorm.weight", "mlp.experts.0.up_proj.weight")
        tensors |= {f"model.layers.{layers}.{name}": _plain(random, (4, 4)) for name in extra}
    tensors = {family.prefix + name: array for name, array in tensors.items()}
    if family.vision:
        tensors["vision_tower.encoder.blocks.0.mlp.fc0.weight"] = _plain(random, (8, 4))
        tensors["mm_projector.proj.0.bias"] = _plain(random, (8,))
    return tensors


def _stored(
    name: str,
    shape: tuple[int, ...],
    form: FileFormat,
    random: np.random.Generator,
    *,
    any_codes: bool,
) -> Tensors:
    is_linear = "proj" in name
    if form is FileFormat.FP8 and is_linear:
        codes, scales = random_fp8(shape, random)
        return {name: codes, name + "_scale_inv": scales}
    if form is FileFormat.INT4 and ".experts." in name:
        draw = random_int4 if any_codes else rounded_int4
        packed, scales = draw(shape, random)
        return {
            name + "_packed": packed,
            name + "_scale": scales,
            name + "_shape": np.array(shape, np.int64),
        }
    if name.endswith("e_score_correction_bias"):
        return {name: random.normal(0, 0.1, shape).astype(np.float32)}
    return {name: _plain(random, shape, mean=1.0 if "norm" in name else 0.0)}


def _plain(random: np.random.Generator, shape: tuple[int, ...], mean: float = 0.0) -> np.ndarray:
    return random.normal(mean, 0.1, shape).astype(ml_dtypes.bfloat16)


def random_fp8(shape: tuple[int, int], random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draws codes and the scales of blocks: any positive number, or a power of two.

    The largest code of a block may be any; one block in eight has only zeros.
    """
    blocks = [-(-size // 128) for size in shape]
    scales = np.exp(random.normal(-7, 1, blocks)).astype(np.float32)
    powers = random.random(blocks) < 0.3
    scales[powers] = 2.0 ** np.round(np.log2(scales[powers]))
    sizes = 2.0 ** random.integers(3, 9, blocks) * (random.random(blocks) > 0.125)
    spread = np.kron(sizes, np.ones((128, 128)))[: shape[0], : shape[1]]
    values = np.clip(random.normal(0, 0.3, shape), -1, 1) * spread
    return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn), scales


def random_int4(shape: tuple[int, int], random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draws words of any eight codes, and any positive scales of groups of 32."""
    rows, inputs = shape
    words = random.integers(-(2**31), 2**31, (rows, inputs // 8)).astype(np.int32)
    scales = np.exp(random.normal(-4, 1, (rows, inputs // 32)))
    return words, scales.astype(ml_dtypes.bfloat16)


def rounded_int4(shape: tuple[int, int], random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draws words and scales that rounding gives: a 7 in each group, scales bfloat16(w / 7)."""
    rows, inputs = shape
    codes = random.integers(-7, 8, (rows, inputs // 32, 32))
    codes[..., 5] = random.choice([-7, 7], codes.shape[:2])
    words = np.zeros((rows, inputs // 8), np.uint32)
    for place, column in enumerate(codes.reshape(rows, -1, 8).transpose(2, 0, 1)):
        words |= (column + 8).astype(np.uint32) << np.uint32(4 * place)
    largest = np.exp(random.normal(-2, 1, (rows, inputs // 32))).astype(ml_dtypes.bfloat16)
    scales = (largest.astype(np.float32) / 7).astype(ml_dtypes.bfloat16)
    return words.view(np.int32), scales


def fields(family: Family) -> dict:
    """The config.json of a family."""
    text = with_quantization(to_hugging_face(family.config), family.form)
    text["num_nextn_predict_layers"] = int(family.token_prediction)
    if not family.vision:
        return text
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text | {"model_type": "kimi_k2"},
        "vision_config": {"patch_size": 14},
    }


def write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], config_fields: dict) -> None:
    """Writes a folder of two files, their index and config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_fields))
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, members in shards.items():
        _save(folder / file, {name: tensors[name] for name in members})
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_family(folder: pathlib.Path, name: str, *, any_codes: bool = True) -> Tensors:
    """Writes a random model of a family, and returns its tensors."""
    family = FAMILIES[name]
    tensors = random_tensors(family, any_codes=any_codes)
    write(folder, tensors, fields(family))
    return tensors


def _save(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    kept = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name,
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in kept.items()
    }
    safetensors.serialize_file(specs, path, metadata={"format": "pt"})


def load(folder: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns dtype, shape and bytes of every tensor of a folder, read by the library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            assert name not in found, name
            found[name] = entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])
    return found


def values(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Returns what one weight is worth, in float32; `name` is that before quantisation."""
    if name + "_scale_inv" in tensors:
        return _fp8_values(tensors[name], tensors[name + "_scale_inv"])
    if name + "_packed" in tensors:
        return int4_values(tensors[name + "_packed"], tensors[name + "_scale"])
    return tensors[name].astype(np.float32)


def _fp8_values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    found = codes.astype(np.float32)
    for row in range(codes.shape[0]):
        for column in range(0, codes.shape[1], 128):
            found[row, column : column + 128] *= scales[row // 128, column // 128]
    return found


def int4_values(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns code * scale, rounded to bfloat16, in float32."""
    inputs = words.shape[1] * 8
    group = inputs // scales.shape[1]
    found = np.empty((words.shape[0], inputs), np.float32)
    for column in range(inputs):
        codes = (words[:, column // 8].view(np.uint32) >> np.uint32(4 * (column % 8))) & 15
        found[:, column] = (codes.astype(np.int32) - 8) * np.float32(scales[:, column // group])
    return found.astype(ml_dtypes.bfloat16).astype(np.float32)


def parameters(tensors: Mapping[str, np.ndarray], family: Family) -> TransformerParams:
    """Returns the tree of parameters that a family's tensors are, on the host, in float32."""
    bare = {name.removeprefix(family.prefix): array for name, array in tensors.items()}
    weights = {name: values(bare, name) for name in published.shapes(family.config)}
    return published.transformer_params(weights, family.config)
