"""Small plans with every kind of parameter that the optimizer meets."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.core import axes as ax
from kimi_jax.core import param_spec as ps
from kimi_jax.core.param_spec import ParamSpec

_INIT = jax.nn.initializers.normal(0.02)


def matrix(shape, axes, inputs, *tags, fused_with=None) -> ParamSpec:
    return ParamSpec(
        shape=shape,
        axes=axes,
        init=_INIT,
        tags=frozenset({ps.MATRIX, *tags}),
        inputs=inputs,
        fused_with=fused_with,
    )


def other(kind: str, shape, axes) -> ParamSpec:
    return ParamSpec(shape=shape, axes=axes, init=_INIT, tags=frozenset({kind}))


def attention_plan(num_heads=2) -> dict[str, ParamSpec]:
    D, Q, N, H, R, U, C = 16, 8, num_heads, 4, 2, 4, 8
    q, c = (ax.Q_LATENT,), (ax.KV_LATENT,)
    nope, rope, value = (
        (ax.HEADS, ax.HEAD_NOPE),
        (ax.HEADS, ax.HEAD_ROPE),
        (ax.HEADS, ax.HEAD_VALUE),
    )
    d = (ax.EMBED,)
    return {
        "w_q_down": matrix((D, Q), d + q, d),
        "q_norm": other(ps.NORM, (Q,), q),
        "w_q_nope": matrix((Q, N, H), q + nope, q, ps.QUERY_NOPE, fused_with="w_q_up"),
        "w_q_rope": matrix((Q, N, R), q + rope, q, ps.QUERY_ROPE, fused_with="w_q_up"),
        "w_kv_down": matrix((D, C), d + c, d, fused_with="w_kv_down_fused"),
        "w_k_rope": matrix((D, R), (ax.EMBED, ax.HEAD_ROPE), d, fused_with="w_kv_down_fused"),
        "kv_norm": other(ps.NORM, (C,), c),
        "w_k_nope": matrix((C, N, H), c + nope, c, ps.KEY_NOPE, fused_with="w_kv_up"),
        "w_value": matrix((C, N, U), c + value, c, fused_with="w_kv_up"),
        "w_out": matrix((N, U, D), value + d, value),
    }


def _feed_forward_plan(
    embed, width, axis, stack=(), stack_axes=(), tags=()
) -> dict[str, ParamSpec]:
    up = matrix((*stack, embed, width), (*stack_axes, ax.EMBED, axis), (ax.EMBED,), *tags)
    down = matrix((*stack, width, embed), (*stack_axes, axis, ax.EMBED), (axis,), *tags)
    return {"w_gate": up, "w_up": up, "w_down": down}


def model_plan() -> dict[str, Any]:
    D, F, M, E, V = 16, 24, 8, 4, 32
    router = {
        "w_router": matrix((D, E), (ax.EMBED, ax.EXPERTS), (ax.EMBED,), ps.ROUTER),
        "selection_bias": other(ps.SELECTION_BIAS, (E,), (ax.EXPERTS,)),
    }
    experts = _feed_forward_plan(D, M, ax.EXPERT_FFN, (E,), (ax.EXPERTS,), (ps.ROUTED_EXPERT,))
    shared = _feed_forward_plan(D, M, ax.EXPERT_FFN)

    def block(feed_forward):
        return {
            "attention_norm": other(ps.NORM, (D,), (ax.EMBED,)),
            "attention": attention_plan(),
            "feed_forward_norm": other(ps.NORM, (D,), (ax.EMBED,)),
            "feed_forward": feed_forward,
        }

    moe = {"router": router, "experts": experts, "shared": shared}
    dense = block(_feed_forward_plan(D, F, ax.FFN))
    return {
        "embedding": other(ps.EMBEDDING, (V, D), (ax.VOCAB, ax.EMBED)),
        "dense_blocks": ps.stack(dense, 1),
        "moe_blocks": ps.stack(block(moe), 2),
        "final_norm": other(ps.NORM, (D,), (ax.EMBED,)),
        "head": other(ps.HEAD, (D, V), (ax.EMBED, ax.VOCAB)),
    }


def random_like(plan: Any, seed: int) -> Any:
    """Standard normal values, from numpy, for every leaf."""
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> jax.Array:
        return jnp.asarray(rng.standard_normal(spec.shape, np.float32))

    return ps.map_specs(draw, plan)
