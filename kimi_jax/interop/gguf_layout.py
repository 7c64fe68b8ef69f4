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
from collections.abc import Iterator

from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.errors import require

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
    vocab, width = config.vocab_size, config.embed_dim
    yield _whole("token_embd.weight", "model.embed_tokens.weight", vocab, width)
    for layer in range(config.num_layers):
        yield from _attention(config, layer)
        yield _small(
            f"blk.{layer}.ffn_norm", f"model.layers.{layer}.post_attention_layernorm", width
        )
        if layer < config.num_dense_layers:
            yield from _feed_forward(layer, "", "", config.dense_ffn_dim, width)
        else:
            yield from _mixture(config, layer)
    yield _small("output_norm", "model.norm", width)
    yield _whole("output.weight", "lm_head.weight", vocab, width)


def _whole(name: str, published: str, *shape: int, role: Role = Role.MATRIX) -> GgufTensor:
    return GgufTensor(name, shape, role, (Piece(published, slice(0, shape[0])),))


def _small(name: str, published: str, *shape: int) -> GgufTensor:
    return _whole(f"{name}.weight", f"{published}.weight", *shape, role=Role.SMALL)


def _attention(config: ModelConfig, layer: int) -> Iterator[GgufTensor]:
    ours, theirs = f"blk.{layer}.attn_", f"model.layers.{layer}.self_attn."
    width, latent, heads = config.embed_dim, config.kv_latent_dim, config.num_heads
    queries = heads * config.head_qk_dim

    def matrix(name: str, published: str, outputs: int, inputs: int) -> GgufTensor:
        return _whole(f"{ours}{name}.weight", f"{theirs}{published}.weight", outputs, inputs)

    yield _small(f"{ours}norm", f"model.layers.{layer}.input_layernorm", width)
    if config.q_latent_dim is None:
        yield matrix("q", "q_proj", queries, width)
    else:
        yield matrix("q_a", "q_a_proj", config.q_latent_dim, width)
        yield _small(f"{ours}q_a_norm", f"{theirs}q_a_layernorm", config.q_latent_dim)
        yield matrix("q_b", "q_b_proj", queries, config.q_latent_dim)
    yield matrix("kv_a_mqa", "kv_a_proj_with_mqa", latent + config.head_rope_dim, width)
    yield _small(f"{ours}kv_a_norm", f"{theirs}kv_a_layernorm", latent)
    yield from _keys_and_values(config, ours, f"{theirs}kv_b_proj.weight")
    yield matrix("output", "o_proj", width, heads * config.head_value_dim)


def _keys_and_values(config: ModelConfig, ours: str, published: str) -> Iterator[GgufTensor]:
    """Each head's rows of kv_b_proj are those of its keys, then those of its values."""
    latent, heads = config.kv_latent_dim, config.num_heads
    keys, values = config.head_nope_dim, config.head_value_dim
    starts = [head * (keys + values) for head in range(heads)]
    yield GgufTensor(
        f"{ours}k_b.weight",
        (heads, latent, keys),
        Role.MATRIX,
        tuple(Piece(published, slice(at, at + keys), transposed=True) for at in starts),
    )
    yield GgufTensor(
        f"{ours}v_b.weight",
        (heads, values, latent),
        Role.MATRIX,
        tuple(Piece(published, slice(at + keys, at + keys + values)) for at in starts),
    )


def _feed_forward(
    layer: int, suffix: str, published: str, size: int, width: int
) -> Iterator[GgufTensor]:
    for part, shape in _swiglu(size, width):
        source = f"model.layers.{layer}.mlp.{published}{part}_proj.weight"
        yield _whole(f"blk.{layer}.ffn_{part}{suffix}.weight", source, *shape)


def _swiglu(size: int, width: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return ("gate", (size, width)), ("up", (size, width)), ("down", (width, size))


def _mixture(config: ModelConfig, layer: int) -> Iterator[GgufTensor]:
    ours, theirs = f"blk.{layer}.", f"model.layers.{layer}.mlp."
    experts, width, size = config.num_routed_experts, config.embed_dim, config.expert_ffn_dim
    yield _small(f"{ours}ffn_gate_inp", f"{theirs}gate", experts, width)
    bias = f"{theirs}gate.e_score_correction_bias"
    yield _whole(f"{ours}exp_probs_b.bias", bias, experts, role=Role.SMALL)
    for part, shape in _swiglu(size, width):
        yield GgufTensor(
            f"{ours}ffn_{part}_exps.weight",
            (experts, *shape),
            Role.ROUTED_EXPERT,
            tuple(
                Piece(f"{theirs}experts.{i}.{part}_proj.weight", slice(0, shape[0]))
                for i in range(experts)
            ),
        )
    joint = config.num_shared_experts * size
    yield from _feed_forward(layer, "_shexp", "shared_experts.", joint, width)


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
