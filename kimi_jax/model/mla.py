"""Multi-head latent attention (arXiv 2405.04434, section 2.1), in its training form."""

import functools

import jax
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import ComputeConfig
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import (
    KEY_NOPE,
    MATRIX,
    QUERY_NOPE,
    QUERY_ROPE,
    Leaf,
    ParamSpec,
)
from kimi_jax.kernels.mla_attention import mla_attention
from kimi_jax.model import norm, rope
from kimi_jax.model.linear import project
from kimi_jax.parallel import rules
from kimi_jax.parallel.per_shard import per_shard


@struct.dataclass
class MlaParams:
    """Projections of one attention layer.

    Published checkpoints store w_q_nope beside w_q_rope, w_kv_down beside w_k_rope, and w_k_nope
    beside w_value as one matrix each. They are kept apart here because Muon and QK-clip treat them
    apart.
    """

    w_q_down: Leaf  # [D, Q], None where queries have no latent
    q_norm: Leaf  # [Q], likewise
    w_q_nope: Leaf  # [Q, N, H]; [D, N, H] where queries have no latent
    w_q_rope: Leaf  # [Q, N, R]; [D, N, R]
    w_kv_down: Leaf  # [D, C]
    w_k_rope: Leaf  # [D, R], shared by all heads
    kv_norm: Leaf  # [C]
    w_k_nope: Leaf  # [C, N, H]
    w_value: Leaf  # [C, N, U]
    w_out: Leaf  # [N, U, D]


def specs(config: ModelConfig) -> MlaParams:
    """Plans one attention layer."""
    sizes = {
        ax.EMBED: config.embed_dim,
        ax.Q_LATENT: config.q_latent_dim,
        ax.KV_LATENT: config.kv_latent_dim,
        ax.HEADS: config.num_heads,
        ax.HEAD_OUTPUTS: config.num_heads,
        ax.HEAD_NOPE: config.head_nope_dim,
        ax.HEAD_ROPE: config.head_rope_dim,
        ax.HEAD_VALUE: config.head_value_dim,
    }

    def matrix(
        *axes: str, fused: str | None = None, tag: str = MATRIX, inputs: int = 1
    ) -> ParamSpec:
        return ParamSpec(
            shape=tuple(sizes[axis] for axis in axes),
            axes=axes,
            init=jax.nn.initializers.normal(config.init_std),
            tags=frozenset({MATRIX, tag}),
            inputs=axes[:inputs],
            fused_with=fused,
        )

    has_latent = config.q_latent_dim is not None
    query = ax.Q_LATENT if has_latent else ax.EMBED
    return MlaParams(
        w_q_down=matrix(ax.EMBED, ax.Q_LATENT) if has_latent else None,
        q_norm=norm.spec(config.q_latent_dim, ax.Q_LATENT) if has_latent else None,
        w_q_nope=matrix(query, ax.HEADS, ax.HEAD_NOPE, fused="w_q_up", tag=QUERY_NOPE),
        w_q_rope=matrix(query, ax.HEADS, ax.HEAD_ROPE, fused="w_q_up", tag=QUERY_ROPE),
        w_kv_down=matrix(ax.EMBED, ax.KV_LATENT, fused="w_kv_down"),
        w_k_rope=matrix(ax.EMBED, ax.HEAD_ROPE, fused="w_kv_down"),
        kv_norm=norm.spec(config.kv_latent_dim, ax.KV_LATENT),
        w_k_nope=matrix(ax.KV_LATENT, ax.HEADS, ax.HEAD_NOPE, fused="w_kv_up", tag=KEY_NOPE),
        w_value=matrix(ax.KV_LATENT, ax.HEADS, ax.HEAD_VALUE, fused="w_kv_up"),
        w_out=matrix(ax.HEAD_OUTPUTS, ax.HEAD_VALUE, ax.EMBED, inputs=2),
    )


@jax.named_scope("mla")
def mla(
    params: MlaParams,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    config: ModelConfig,
    choices: ComputeConfig,
) -> tuple[Float[Array, "B T D"], Float[Array, "B N"]]:
    """Attends causally within each segment.

    c_q = norm(x W_qd); q = [c_q W_qn | rot(c_q W_qr)]; c_kv = norm(x W_kvd); k = [c_kv W_kn | rot(x
    W_kr)], the rotary key shared by all heads; o = softmax(scale q k^T) (c_kv W_v); out = o W_o.

    All-gathers c_q, c_kv and x W_kr over the context axis: each device attends from every position,
    with its own share of the heads. An all-to-all turns heads back into positions, and the tensor
    axis all-reduces the partial sums over heads. Queries without a latent gather x instead of c_q:
    at Moonlight's sizes (2,048 of x, 3,072 of queries) and sequences of 8,192 tokens that moves no
    more than an all-to-all of queries and the gather of whole projections it would need.

    Args:
      params: in compute layout.
      x: normalised input, in the layout of tokens.
      positions: index of each token within its document; whole sequences on each device.
      segments: document number of each token, likewise; attention never leaves a document.
      config: sizes.
      choices: which kernel.

    Returns:
      The output, and each sequence's and head's largest scaled logit, for QK-clip.
    """
    batch, heads = rules.BATCH, rules.HEADS
    cos, sin = rope.cos_sin(config, positions)
    with jax.named_scope("queries"):
        c_q = x
        if params.w_q_down is not None:
            latent = checkpoint_name(project("btd,dq->btq", x, params.w_q_down), "q_latent")
            c_q = norm.rms_norm(params.q_norm, latent, eps=config.norm_eps)
        c_q = rules.reshard(c_q, batch)
        q_nope = project("btq,qnh->btnh", c_q, params.w_q_nope, out_layout=heads)
        q_rope = project("btq,qnr->btnr", c_q, params.w_q_rope, out_layout=heads)
        q_rope = rope.rotate(q_rope, cos[:, :, None], sin[:, :, None])
    with jax.named_scope("keys_values"):
        latent = checkpoint_name(project("btd,dc->btc", x, params.w_kv_down), "kv_latent")
        c_kv = norm.rms_norm(params.kv_norm, latent, eps=config.norm_eps)
        c_kv = rules.reshard(c_kv, batch)
        k_nope = project("btc,cnh->btnh", c_kv, params.w_k_nope, out_layout=heads)
        value = project("btc,cnu->btnu", c_kv, params.w_value, out_layout=heads)
        k_rope = checkpoint_name(project("btd,dr->btr", x, params.w_k_rope), "k_rope")
        k_rope = rope.rotate(rules.reshard(k_rope, batch), cos, sin)
    with jax.named_scope("attention"):
        attend = functools.partial(
            mla_attention, scale=rope.attention_scale(config), implementation=choices.implementation
        )
        out, max_logit = per_shard(
            attend,
            in_specs=(heads, heads, heads, batch, heads, batch),
            out_specs=(heads, rules.HEAD_MAXIMA),
        )(q_nope, q_rope, k_nope, k_rope, value, segments)
        out = rules.reshard(out, rules.HEAD_OUTPUTS)
    y = project("btnu,nud->btd", out, params.w_out, out_layout=rules.TOKENS)
    return checkpoint_name(y, "attention_projected"), max_logit
