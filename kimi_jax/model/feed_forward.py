"""SwiGLU feed-forward layer: the dense blocks', and the shared experts'."""

import functools

import jax
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kimi_jax.configs.compute import ResidualFormat
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import MATRIX, Leaf, ParamSpec
from kimi_jax.kernels.fp8 import dequantize_tiles, quantize_tiles
from kimi_jax.model.linear import project
from kimi_jax.parallel.per_shard import per_shard
from kimi_jax.parallel.rules import TOKENS

# What a remat policy may keep.
_GATE, _UP = "feed_forward_gate", "feed_forward_up"


@struct.dataclass
class FeedForwardParams:
    """SwiGLU weights; each leaf is an array, or a ParamSpec while the tree is a plan."""

    w_gate: Leaf  # [D, F]
    w_up: Leaf  # [D, F]
    w_down: Leaf  # [F, D]


def specs(config: ModelConfig, width: int) -> FeedForwardParams:
    """Plans a layer of inner width F = `width`."""
    init = jax.nn.initializers.normal(config.init_std)
    tags = frozenset({MATRIX})
    up = ParamSpec(
        shape=(config.embed_dim, width),
        axes=(ax.EMBED, ax.FFN),
        init=init,
        tags=tags,
        inputs=(ax.EMBED,),
    )
    down = ParamSpec(
        shape=(width, config.embed_dim),
        axes=(ax.FFN, ax.EMBED),
        init=init,
        tags=tags,
        inputs=(ax.FFN,),
    )
    return FeedForwardParams(w_gate=up, w_up=up, w_down=down)


@jax.named_scope("feed_forward")
def feed_forward(
    params: FeedForwardParams,
    x: Float[Array, "B T D"],
    *,
    residuals: ResidualFormat = ResidualFormat.COMPUTE,
) -> Float[Array, "B T D"]:
    """Returns swiglu(x W_gate, x W_up) W_down.

    F may be split over the tensor axis: partial sums of the result are all-reduced.

    Args:
      params: the weights.
      x: tokens.
      residuals: format in which the two inputs of SwiGLU wait for the backward pass.
    """
    gate = project("btd,df->btf", x, params.w_gate)
    up = project("btd,df->btf", x, params.w_up)
    if residuals is ResidualFormat.FP8:
        return _down_from_codes(gate, up, params.w_down)
    gate = checkpoint_name(gate, _GATE)
    up = checkpoint_name(up, _UP)
    return _down(gate, up, params.w_down)


def _down(gate: Array, up: Array, w_down: Array) -> Array:
    return project("btf,fd->btd", swiglu(gate, up), w_down, out_layout=TOKENS)


@jax.custom_vjp
def _down_from_codes(gate: Array, up: Array, w_down: Array) -> Array:
    """Computes `_down`; its backward pass reads FP8 codes of gate and up."""
    return _down(gate, up, w_down)


def _down_forward(gate, up, w_down):
    # Each device cuts its own part of F into tiles.
    layout = jax.typeof(gate).sharding.spec
    quantize = per_shard(
        quantize_tiles, in_specs=(layout,), out_specs=(layout, _layout_of_scales(layout))
    )
    kept = checkpoint_name(quantize(gate), _GATE), checkpoint_name(quantize(up), _UP)
    return _down(gate, up, w_down), (kept, w_down)


def _down_backward(saved, dy):
    kept, w_down = saved
    layout = jax.typeof(kept[0][0]).sharding.spec
    dequantize = per_shard(
        functools.partial(dequantize_tiles, dtype=dy.dtype),
        in_specs=(layout, _layout_of_scales(layout)),
        out_specs=layout,
    )
    gate, up = (dequantize(*codes_and_scales) for codes_and_scales in kept)
    return jax.vjp(_down, gate, up, w_down)[1](dy)


def _layout_of_scales(layout: PartitionSpec) -> PartitionSpec:
    """Splits the one dimension of scales over all devices that codes are split over."""
    return PartitionSpec(tuple(jax.tree.leaves(tuple(layout))))


_down_from_codes.defvjp(_down_forward, _down_backward)


@jax.custom_vjp
def swiglu(
    gate: Float[Array, "*shape F"], up: Float[Array, "*shape F"]
) -> Float[Array, "*shape F"]:
    """Returns silu(gate) * up.

    Its backward pass keeps gate and up alone and is written as one expression, which XLA makes one
    loop on a CPU: a feed-forward layer's step is 15 % shorter than with the derivative of the
    parts.
    """
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals, dy):
    gate, up = residuals
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
