"""Tiny random models under the published names, as exporters read them."""

import dataclasses
import pathlib
import threading
import weakref
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from kimi_jax.configs.hugging_face_export import FileFormat, to_hugging_face
from kimi_jax.configs.model import ModelConfig
from kimi_jax.interop.hf_encode import Encoder
from kimi_jax.interop.hf_export import export_hugging_face
from kimi_jax.interop.tensor_source import PackedRows
from kimi_jax.model.router import routed_scaling_factor
from kimi_jax.model.transformer import TransformerParams
from tests.support import hf_layout

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_GROUP = 32


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes as in the released checkpoints."""
    width, heads = config.embed_dim, config.num_heads
    queries = heads * (config.head_nope_dim + config.head_rope_dim)
    found = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_layers):
        block = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
        attention = {
            "kv_a_proj_with_mqa.weight": (config.kv_latent_dim + config.head_rope_dim, width),
            "kv_a_layernorm.weight": (config.kv_latent_dim,),
            "kv_b_proj.weight": (
                heads * (config.head_nope_dim + config.head_value_dim),
                config.kv_latent_dim,
            ),
            "o_proj.weight": (width, heads * config.head_value_dim),
        }
        if config.q_latent_dim is None:
            attention["q_proj.weight"] = (queries, width)
        else:
            attention["q_a_proj.weight"] = (config.q_latent_dim, width)
            attention["q_a_layernorm.weight"] = (config.q_latent_dim,)
            attention["q_b_proj.weight"] = (queries, config.q_latent_dim)
        block |= {f"self_attn.{name}": shape for name, shape in attention.items()}
        block |= {f"mlp.{name}": shape for name, shape in _mlp(config, layer).items()}
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (config.vocab_size, width)}


def _mlp(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    def swiglu(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}gate_proj.weight": (size, config.embed_dim),
            f"{prefix}up_proj.weight": (size, config.embed_dim),
            f"{prefix}down_proj.weight": (config.embed_dim, size),
        }

    if layer < config.num_dense_layers:
        return swiglu("", config.dense_ffn_dim)
    tensors = swiglu("shared_experts.", config.expert_ffn_dim * config.num_shared_experts)
    for expert in range(config.num_routed_experts):
        tensors |= swiglu(f"experts.{expert}.", config.expert_ffn_dim)
    return tensors | {
        "gate.weight": (config.num_routed_experts, config.embed_dim),
        "gate.e_score_correction_bias": (config.num_routed_experts,),
    }


class RandomSource:
    """A `TensorSource` of random bfloat16 weights, with INT4 experts if asked for.

    Attributes:
      config: the model.
      tensors: every value, by published name.
      most_values: the largest number of values that were ever alive at once outside of it.
    """

    def __init__(self, config: ModelConfig, *, int4: bool = False, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.config = config
        self.tensors = {name: _draw(generator, name, s) for name, s in shapes(config).items()}
        self.packed = {}
        if int4:
            for name in [name for name in self.tensors if ".experts." in name]:
                packed, values = _int4(generator, self.tensors[name].shape)
                self.packed[name], self.tensors[name] = packed, values
        self.most_values = self._alive = 0
        self._lock = threading.RLock()

    @property
    def group_size(self) -> int | None:
        """See `TensorSource`."""
        return _GROUP if self.packed else None

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """See `TensorSource`."""
        return self._lend(self.tensors[name][rows])

    def int4_rows(self, name: str, rows: slice) -> PackedRows | None:
        """See `TensorSource`."""
        if name not in self.packed:
            return None
        packed, scales = self.packed[name]
        return PackedRows(self._lend(packed[rows], 8), scales[rows].copy())

    def _lend(self, values: np.ndarray, weights_per_value: int = 1) -> np.ndarray:
        lent = values.copy()
        self._count(lent.size * weights_per_value)
        weakref.finalize(lent, self._count, -lent.size * weights_per_value)
        return lent

    def _count(self, values: int) -> None:
        with self._lock:
            self._alive += values
            self.most_values = max(self.most_values, self._alive)


def _draw(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = generator.standard_normal(shape).astype(np.float32)
    if name.endswith("e_score_correction_bias"):
        return values * np.float32(0.1)
    if "norm" in name:
        return (1 + values / 10).astype(BFLOAT16)
    if "embed_tokens" in name:
        return values.astype(BFLOAT16)
    return (values / np.sqrt(shape[-1])).astype(BFLOAT16)


def _int4(generator: np.random.Generator, shape: tuple[int, int]) -> tuple[PackedRows, np.ndarray]:
    """Codes and scales as compressed-tensors holds them, and what they stand for in float32."""
    rows, inputs = shape
    codes = generator.integers(-7, 8, shape)
    scales = generator.uniform(0.1, 0.3, (rows, inputs // _GROUP)) / np.sqrt(inputs)
    scales = scales.astype(BFLOAT16)
    nibbles = (codes + 8).reshape(rows, inputs // 8, 8).astype(np.uint32)
    words = np.zeros((rows, inputs // 8), np.uint32)
    for place in range(8):
        words |= nibbles[..., place] << np.uint32(4 * place)
    values = codes * np.repeat(scales.astype(np.float32), _GROUP, axis=1)
    return PackedRows(words.view(np.int32), scales), values.astype(np.float32)


def transformer_params(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> TransformerParams:
    """The same numbers as the model's parameters."""
    fused = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(config.num_dense_layers, config.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."

        def every(part: str, prefix: str = prefix) -> np.ndarray:
            numbers = range(config.num_routed_experts)
            return np.stack([tensors[f"{prefix}{i}.{part}_proj.weight"] for i in numbers])

        fused[f"{prefix}gate_up_proj"] = np.concatenate([every("gate"), every("up")], axis=1)
        fused[f"{prefix}down_proj"] = every("down")
    return hf_layout.transformer_params(fused, config)


def export(folder: pathlib.Path, config: ModelConfig) -> None:
    """Writes random weights as a published folder in bfloat16."""
    factor = routed_scaling_factor(config)
    config = dataclasses.replace(config, routed_scaling_factor=factor)
    encoder = Encoder(RandomSource(config), FileFormat.BF16, _GROUP)
    export_hugging_face(folder, encoder, fields=to_hugging_face(config), identity="random")
