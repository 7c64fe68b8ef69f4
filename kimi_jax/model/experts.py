"""The routed experts that one device holds."""

import jax
from flax import struct
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import Implementation, ResidualFormat
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import MATRIX, ROUTED_EXPERT, Leaf, ParamSpec
from kimi_jax.kernels.grouped_swiglu import grouped_swiglu


@struct.dataclass
class ExpertParams:
    """SwiGLU weights; each leaf is an array, or a ParamSpec while the tree is a plan."""

    w_gate: Leaf  # [E, D, M]
    w_up: Leaf  # [E, D, M]
    w_down: Leaf  # [E, M, D]


def specs(config: ModelConfig) -> ExpertParams:
    """Plans the routed experts of one block."""
    init = jax.nn.initializers.normal(config.init_std)
    tags = frozenset({MATRIX, ROUTED_EXPERT})
    up = ParamSpec(
        shape=(config.num_routed_experts, config.embed_dim, config.expert_ffn_dim),
        axes=(ax.EXPERTS, ax.EMBED, ax.EXPERT_FFN),
        init=init,
        tags=tags,
        inputs=(ax.EMBED,),
    )
    down = ParamSpec(
        shape=(config.num_routed_experts, config.expert_ffn_dim, config.embed_dim),
        axes=(ax.EXPERTS, ax.EXPERT_FFN, ax.EMBED),
        init=init,
        tags=tags,
        inputs=(ax.EXPERT_FFN,),
    )
    return ExpertParams(w_gate=up, w_up=up, w_down=down)


@jax.named_scope("experts")
def experts(
    params: ExpertParams,
    x: Float[Array, "W D"],
    expert_ids: Int[Array, "W K"],
    weights: Float[Array, "W K"],
    *,
    implementation: Implementation = Implementation.AUTO,
    residuals: ResidualFormat = ResidualFormat.COMPUTE,
) -> Float[Array, "W D"]:
    """Returns y[t] = sum_k weights[t, k] * E_{ids[t, k]}(x[t]), E(x) = (silu(x Wg) * (x Wu)) Wd.

    Local: inside `shard_map`, with the parameters of this device's experts and ids counted from
    its first one.

    Args:
      params: weights of the experts held here, in the tokens' dtype.
      x: tokens.
      expert_ids: chosen experts; one that is not held here (outside [0, E)) contributes nothing.
      weights: their weights.
      implementation: which kernel computes it.
      residuals: format of what it keeps for the backward pass.

    Returns:
      The sums, in the tokens' dtype.

    Source: arXiv 2412.19437, section 2.1.2.
    """
    return grouped_swiglu(
        x,
        params.w_gate,
        params.w_up,
        params.w_down,
        expert_ids,
        weights,
        implementation=implementation,
        residuals=residuals,
    )
