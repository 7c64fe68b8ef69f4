"""Maps tensors named and laid out as in Hugging Face's DeepseekV3ForCausalLM to our tree.

Weights and gradients are mapped alike. A torch Linear is [out, in]; all heads' rows stand together,
head by head. Experts are fused over the layer, [E, 2 M, D] and [E, D, M], as transformers 5 holds
them.
"""

from collections.abc import Mapping

import jax
import numpy as np

from kimi_jax.configs.model import ModelConfig
from kimi_jax.model.block import BlockParams
from kimi_jax.model.experts import ExpertParams
from kimi_jax.model.feed_forward import FeedForwardParams
from kimi_jax.model.mla import MlaParams
from kimi_jax.model.moe import MoeParams
from kimi_jax.model.router import RouterParams
from kimi_jax.model.transformer import TransformerParams

Tensors = Mapping[str, np.ndarray]


def transformer_params(tensors: Tensors, config: ModelConfig) -> TransformerParams:
    """Returns the tree of float32 NumPy arrays that holds the same numbers."""
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}

    def blocks(first: int, end: int) -> BlockParams | None:
        layers = [_block(_under(tensors, f"model.layers.{i}."), config) for i in range(first, end)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers) if layers else None

    return TransformerParams(
        embedding=tensors["model.embed_tokens.weight"],
        dense_blocks=blocks(0, config.num_dense_layers),
        moe_blocks=blocks(config.num_dense_layers, config.num_layers),
        final_norm=tensors["model.norm.weight"],
        head=tensors["lm_head.weight"].T,
    )


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _block(layer: Tensors, config: ModelConfig) -> BlockParams:
    mlp = _under(layer, "mlp.")
    return BlockParams(
        attention_norm=layer["input_layernorm.weight"],
        attention=_attention(_under(layer, "self_attn."), config),
        feed_forward_norm=layer["post_attention_layernorm.weight"],
        feed_forward=_mixture(mlp) if "gate.weight" in mlp else _feed_forward(mlp),
    )


def _attention(tensors: Tensors, config: ModelConfig) -> MlaParams:
    has_latent = config.q_latent_dim is not None
    q_up = _by_head(tensors["q_b_proj.weight" if has_latent else "q_proj.weight"], config)
    kv_up = _by_head(tensors["kv_b_proj.weight"], config)
    kv_down = tensors["kv_a_proj_with_mqa.weight"].T
    out = tensors["o_proj.weight"].T
    return MlaParams(
        w_q_down=tensors["q_a_proj.weight"].T if has_latent else None,
        q_norm=tensors["q_a_layernorm.weight"] if has_latent else None,
        w_q_nope=q_up[..., : config.head_nope_dim],
        w_q_rope=q_up[..., config.head_nope_dim :],
        w_kv_down=kv_down[:, : config.kv_latent_dim],
        w_k_rope=kv_down[:, config.kv_latent_dim :],
        kv_norm=tensors["kv_a_layernorm.weight"],
        w_k_nope=kv_up[..., : config.head_nope_dim],
        w_value=kv_up[..., config.head_nope_dim :],
        w_out=out.reshape(config.num_heads, config.head_value_dim, config.embed_dim),
    )


def _by_head(weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    """[N * width, in] -> [in, N, width]."""
    return weight.T.reshape(weight.shape[1], config.num_heads, -1)


def _feed_forward(tensors: Tensors) -> FeedForwardParams:
    return FeedForwardParams(
        w_gate=tensors["gate_proj.weight"].T,
        w_up=tensors["up_proj.weight"].T,
        w_down=tensors["down_proj.weight"].T,
    )


def _mixture(tensors: Tensors) -> MoeParams:
    gate, up = np.split(tensors["experts.gate_up_proj"].transpose(0, 2, 1), 2, axis=-1)
    return MoeParams(
        router=RouterParams(
            w_router=tensors["gate.weight"].T,
            selection_bias=tensors["gate.e_score_correction_bias"],
        ),
        experts=ExpertParams(
            w_gate=gate,
            w_up=up,
            w_down=tensors["experts.down_proj"].transpose(0, 2, 1),
        ),
        shared=_feed_forward(_under(tensors, "shared_experts.")),
    )
