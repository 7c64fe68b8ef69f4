"""One transformer block: attention and a feed-forward part, each behind its norm."""

import jax
from flax import struct
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import ComputeConfig
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import Leaf
from kimi_jax.model import feed_forward, mla, moe, norm
from kimi_jax.model.stats import BlockStats


@struct.dataclass
class BlockParams:
    """Weights of one block, or of a stack of them."""

    attention_norm: Leaf  # [D]
    attention: mla.MlaParams
    feed_forward_norm: Leaf  # [D]
    feed_forward: feed_forward.FeedForwardParams | moe.MoeParams


def specs(config: ModelConfig, *, dense: bool) -> BlockParams:
    """Plans a block with a dense feed-forward layer, or with experts."""
    return BlockParams(
        attention_norm=norm.spec(config.embed_dim, ax.EMBED),
        attention=mla.specs(config),
        feed_forward_norm=norm.spec(config.embed_dim, ax.EMBED),
        feed_forward=(
            feed_forward.specs(config, config.dense_ffn_dim) if dense else moe.specs(config)
        ),
    )


@jax.named_scope("block")
def block(
    params: BlockParams,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    config: ModelConfig,
    choices: ComputeConfig,
) -> tuple[Float[Array, "B T D"], BlockStats]:
    """Returns h + feed_forward(norm(h)) with h = x + attention(norm(x)), and the statistics."""
    normalised = norm.rms_norm(params.attention_norm, x, eps=config.norm_eps)
    attended, max_logit = mla.mla(
        params.attention, normalised, positions, segments, config=config, choices=choices
    )
    x = x + attended
    normalised = norm.rms_norm(params.feed_forward_norm, x, eps=config.norm_eps)
    if isinstance(params.feed_forward, moe.MoeParams):
        y, routed = moe.moe(params.feed_forward, normalised, config=config, choices=choices)
        stats = BlockStats(max_logit, routed.expert_load, routed.dropped, routed.balance_loss)
    else:
        y = feed_forward.feed_forward(
            params.feed_forward, normalised, residuals=choices.feed_forward_residuals
        )
        stats = BlockStats(max_logit, expert_load=None, dropped=None, balance_loss=None)
    return x + y, stats
