"""Which tensors a GGUF file of this architecture has, and which published rows each holds.

The names and shapes are those that llama.cpp reads for its architecture `deepseek2`. They differ
from the published ones in three ways: the experts of a layer are one tensor; the up-projection of
keys and values is two, one matrix per head, the keys' transposed, since llama.cpp attends in the
latent space; and everything has other names. Rotary rows stay as published: both sides rotate pairs
of neighbours.

Source: llama.cpp, src/models/deepseek2.cpp and conversion/deepseek.py.
"""

import dataclasses
import enum
import itertools
import re
from collections.abc import Iterator

from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.errors import require
from kimi_jax.core.param_spec import ROUTER
from kimi_jax.interop.hf_names import HfTensor, hf_tensors

_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_KEYS_AND_VALUES = "attn_kv_b.weight"  # which becomes two tensors
_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": _KEYS_AND_VALUES,
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.experts.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.down_proj.weight": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_EXPERT_NUMBER = r"\bexperts\.\d+\."  # the experts of a layer are one tensor
_MOST_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_MOST_LAYERS = 512  # LLAMA_MAX_LAYERS
_LAYERS_WITHOUT_QUERY_LATENT = (26, 27)  # taken for DeepSeek-V2-Lite and its kin
_KANANA = (48, 128_256)  # layers and vocabulary of another such model


class Role(enum.Enum):
    """What decides the format that a tensor is stored in."""

    SMALL = "small"  # norms, selection biases and routers stay in float32
    MATRIX = "matrix"
    ROUTED_EXPERT = "routed_expert"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive rows of one published tensor, which lie together in the file."""

    name: str
    rows: slice
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
      name: as llama.cpp knows it.
      shape: outermost axis first, as in NumPy; the format lists it the other way round.
      role: what decides its format.
      pieces: what it holds, in order.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    pieces: tuple[Piece, ...]


def gguf_tensors(config: ModelConfig) -> Iterator[GgufTensor]:
    """Yields the tensors of a model in the order in which they are written."""
    for name, group in itertools.groupby(hf_tensors(config).values(), key=_name):
        tensors = list(group)
        if name.endswith(_KEYS_AND_VALUES):
            yield from _keys_and_values(config, name.removesuffix(_KEYS_AND_VALUES), tensors[0])
            continue
        pieces = tuple(Piece(tensor.name, slice(0, tensor.shape[0])) for tensor in tensors)
        shape = tensors[0].shape
        if tensors[0].is_expert:
            shape = (len(tensors), *shape)
        yield GgufTensor(name, shape, _role(tensors[0]), pieces)


def _name(tensor: HfTensor) -> str:
    """Returns the name of the file's tensor that holds a published one."""
    if tensor.name in _OUTSIDE:
        return _OUTSIDE[tensor.name]
    layer, _, name = tensor.name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_IN_LAYER[re.sub(_EXPERT_NUMBER, 'experts.', name)]}"


def _role(tensor: HfTensor) -> Role:
    if tensor.is_expert:
        return Role.ROUTED_EXPERT
    is_small = len(tensor.shape) == 1 or ROUTER in tensor.tags
    return Role.SMALL if is_small else Role.MATRIX


def _keys_and_values(config: ModelConfig, prefix: str, tensor: HfTensor) -> Iterator[GgufTensor]:
    """Each head's rows of kv_b_proj are those of its keys, then those of its values."""
    latent, heads = config.kv_latent_dim, config.num_heads
    keys, values = config.head_nope_dim, config.head_value_dim
    starts = [head * (keys + values) for head in range(heads)]
    yield GgufTensor(
        f"{prefix}attn_k_b.weight",
        (heads, latent, keys),
        Role.MATRIX,
        tuple(Piece(tensor.name, slice(at, at + keys), transposed=True) for at in starts),
    )
    yield GgufTensor(
        f"{prefix}attn_v_b.weight",
        (heads, values, latent),
        Role.MATRIX,
        tuple(Piece(tensor.name, slice(at + keys, at + keys + values)) for at in starts),
    )


def check_readable(config: ModelConfig) -> None:
    """Raises `ConfigError` for a model that llama.cpp would refuse, or compute differently."""
    layers, experts = config.num_layers, config.num_routed_experts
    require(
        layers <= _MOST_LAYERS and 2 <= experts <= _MOST_EXPERTS,
        f"llama.cpp reads models of at most {_MOST_LAYERS} layers with 2 to {_MOST_EXPERTS} routed "
        f"experts; model.num_layers is {layers} and model.num_routed_experts {experts}",
    )
    require(
        config.num_shared_experts > 0 or config.num_moe_layers == 0,
        "llama.cpp reads no deepseek2 model without a shared expert, and model.num_shared_experts "
        "is 0; export it in Hugging Face's form",
    )
    lite = layers in _LAYERS_WITHOUT_QUERY_LATENT or (layers, config.vocab_size) == _KANANA
    require(
        not lite or config.q_latent_dim is None,
        f"llama.cpp takes a model of {layers} layers and {config.vocab_size} ids for one without a "
        f"query latent, and model.q_latent_dim is {config.q_latent_dim}; with another "
        "model.num_layers it reads it",
    )
    yarn = config.yarn
    require(
        yarn is None or (yarn.factor >= 1 and yarn.mscale == yarn.mscale_all_dim != 0),
        "llama.cpp computes YaRN with a factor of at least 1 and with mscale equal to "
        f"mscale_all_dim, not 0; model.yarn is {yarn}",
    )
