"""The decoder: embedding, dense blocks, mixture blocks, final norm; and the head."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import ComputeConfig, Remat
from kimi_jax.configs.model import ModelConfig
from kimi_jax.configs.quantization import QuantizationConfig
from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import EMBEDDING, HEAD, Leaf, ParamSpec, stack
from kimi_jax.model import block, norm
from kimi_jax.model.linear import project
from kimi_jax.model.stats import BlockStats, ModelStats, reduce_blocks
from kimi_jax.parallel import quantized
from kimi_jax.parallel.collectives import (
    first_of_tensor_share_per_shard,
    sum_over_tensor_per_shard,
)
from kimi_jax.parallel.per_shard import per_shard
from kimi_jax.parallel.pipeline import collect_layers, deal_layers, num_stages, pipeline
from kimi_jax.parallel.placement import cast, to_compute
from kimi_jax.parallel.rules import (
    BATCH,
    COMPUTE,
    REPLICATED,
    STORAGE,
    TOKENS,
    partition_specs,
    reshard,
)
from kimi_jax.quantization.qat import attach

_LAYER_INPUT = "layer_input"
# What Remat.K2 keeps of a layer beside its input: the results of attention and of all products but
# the MLA up-projections and the down-projections of SwiGLU. Norms, rotations, SwiGLU and the router
# are computed again with those. Kernels name what they keep for their backward pass.
_KEPT_BY_K2 = (
    "q_latent",
    "kv_latent",
    "k_rope",
    "attention_out",
    "attention_log_sum",
    "attention_projected",
    "feed_forward_gate",
    "feed_forward_up",
    "expert_inputs",
    "expert_gate",
    "expert_up",
    "expert_gate_and_up",
)


@struct.dataclass
class TransformerParams:
    """All weights; blocks are stacked along a leading axis L."""

    embedding: Leaf  # [V, D]
    dense_blocks: block.BlockParams | None  # None without leading dense blocks
    moe_blocks: block.BlockParams | None  # None without mixture blocks
    final_norm: Leaf  # [D]
    head: Leaf  # [D, V]


def specs(config: ModelConfig) -> TransformerParams:
    """Plans the whole model."""
    init = jax.nn.initializers.normal(config.init_std)

    def blocks(count: int, *, dense: bool) -> Any:
        return stack(block.specs(config, dense=dense), count) if count else None

    return TransformerParams(
        embedding=ParamSpec(
            shape=(config.vocab_size, config.embed_dim),
            axes=(ax.VOCAB, ax.EMBED),
            init=init,
            tags=frozenset({EMBEDDING}),
        ),
        dense_blocks=blocks(config.num_dense_layers, dense=True),
        moe_blocks=blocks(config.num_moe_layers, dense=False),
        final_norm=norm.spec(config.embed_dim, ax.EMBED),
        head=ParamSpec(
            shape=(config.embed_dim, config.vocab_size),
            axes=(ax.EMBED, ax.VOCAB),
            init=init,
            tags=frozenset({HEAD}),
        ),
    )


def to_stages(
    params: TransformerParams, *, config: ModelConfig, choices: ComputeConfig
) -> TransformerParams:
    """Gives the stages of the mesh's pipe axis their mixture blocks, cast to the compute dtype.

    Changes nothing where there are no stages.
    """
    if num_stages() == 1 or params.moe_blocks is None:
        return params
    plan = block.specs(config, dense=False)
    return params.replace(
        moe_blocks=deal_layers(cast(params.moe_blocks, plan, choices.dtype.value))
    )


def quantize(
    params: TransformerParams,
    *,
    config: ModelConfig,
    choices: ComputeConfig,
    quantization: QuantizationConfig,
) -> Any:
    """Rounds the chosen weights once, for all layers and micro-batches.

    Returns:
      What `quantization.qat.attach` puts beside `to_stages(params)`, where no gradient flows.
    """
    rounded = quantized.quantize(params, specs(config), choices.dtype.value, quantization)
    if num_stages() == 1 or rounded is None:
        return rounded
    return rounded.replace(moe_blocks=deal_layers(rounded.moe_blocks))


def prepare(
    params: TransformerParams,
    *,
    config: ModelConfig,
    choices: ComputeConfig,
    quantization: QuantizationConfig,
) -> TransformerParams:
    """Returns stored parameters as `forward` wants them."""
    rounded = quantize(params, config=config, choices=choices, quantization=quantization)
    return attach(to_stages(params, config=config, choices=choices), rounded)


def from_stages(gradients: TransformerParams, *, config: ModelConfig) -> TransformerParams:
    """Lays gradients of what `to_stages` returns out like the stored parameters."""
    if num_stages() == 1 or gradients.moe_blocks is None:
        return gradients
    layouts = partition_specs(specs(config).moe_blocks, STORAGE)
    return gradients.replace(moe_blocks=collect_layers(gradients.moe_blocks, layouts))


@jax.named_scope("transformer")
def forward(
    params: TransformerParams,
    inputs: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    config: ModelConfig,
    choices: ComputeConfig,
) -> tuple[Float[Array, "B T D"], ModelStats]:
    """Runs the decoder up to the final norm.

    Args:
      params: from `prepare`; every layer gathers its own when it runs.
      inputs: token ids in [0, V).
      positions: index of each token within its document, in [0, max_position).
      segments: document number of each token; attention never leaves a document.
      config: the architecture.
      choices: how to compute it.

    Returns:
      Normalised hidden states in the compute dtype, ready for the head, and the statistics, whole
      on every device.
    """
    inputs = reshard(inputs, TOKENS)
    # Attention needs those of all positions; gathered once, for all layers.
    positions, segments = (reshard(i, BATCH) for i in (positions, segments))
    plan = specs(config)
    ends = TransformerParams(params.embedding, None, None, params.final_norm, None)
    end_plan = TransformerParams(plan.embedding, None, None, plan.final_norm, None)
    ends = to_compute(ends, end_plan, choices.dtype.value)
    with jax.named_scope("embedding"):
        table = partition_specs(plan.embedding, COMPUTE)
        lookup = per_shard(_look_up_per_shard, in_specs=(table, TOKENS), out_specs=TOKENS)
        x = lookup(ends.embedding, inputs)
    stacks = []
    for stored, dense in ((params.dense_blocks, True), (params.moe_blocks, False)):
        if stored is not None:
            x, stats = _run_stack(
                stored, x, (positions, segments), dense=dense, config=config, choices=choices
            )
            stacks.append(stats)
    stats = jax.tree.map(lambda leaf: jax.reshard(leaf, REPLICATED), reduce_blocks(stacks))
    return norm.rms_norm(ends.final_norm, x, eps=config.norm_eps), stats


def _look_up_per_shard(table: Float[Array, "V D"], ids: Int[Array, "b T"]) -> Float[Array, "b T D"]:
    """Returns table[ids], the vocabulary split over the tensor axis, which all-reduces.

    Written per device because XLA, in a replica, gathers all rows for the gradient of the table.
    """
    own = ids - first_of_tensor_share_per_shard(table.shape[0])
    is_own = (own >= 0) & (own < table.shape[0])
    rows = table[jnp.where(is_own, own, 0)]
    return sum_over_tensor_per_shard(jnp.where(is_own[..., None], rows, 0))


def _run_stack(
    stored_blocks: block.BlockParams,
    x: Float[Array, "B T D"],
    rows: tuple[Int[Array, "B T"], Int[Array, "B T"]],
    *,
    dense: bool,
    config: ModelConfig,
    choices: ComputeConfig,
) -> tuple[Float[Array, "B T D"], BlockStats]:
    """Runs stacked blocks of one kind, mixtures in stages where the mesh has a pipe axis.

    Returns:
      The activations, and statistics stacked along L.
    """
    plan, dtype = block.specs(config, dense=dense), choices.dtype.value
    remat = functools.partial(_with_remat, choices=choices)

    def run_layer(x, stored, rows):
        x = checkpoint_name(x, _LAYER_INPUT)
        params = to_compute(stored, plan, dtype)
        return block.block(params, x, *rows, config=config, choices=choices)

    if dense or num_stages() == 1:
        return jax.lax.scan(remat(lambda x, stored: run_layer(x, stored, rows)), x, stored_blocks)
    return pipeline(run_layer, stored_blocks, x, rows, remat=remat)


def _with_remat(run_layer: Any, choices: ComputeConfig) -> Any:
    """Says what the backward pass of a layer recomputes, and where the rest waits for it."""
    if choices.remat is Remat.NONE:
        return run_layer
    kept = _KEPT_BY_K2 if choices.remat is Remat.K2 else ()
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    if choices.offload_activations:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_LAYER_INPUT, *kept],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(run_layer, policy=policy)


@jax.named_scope("head")
def logits(
    params: TransformerParams,
    hidden: Float[Array, "B T D"],
    *,
    config: ModelConfig,
    choices: ComputeConfig,
) -> Float[Array, "B T V"]:
    """Returns hidden W_head in float32, the vocabulary split over the tensor axis."""
    head = to_compute(params.head, specs(config).head, choices.dtype.value)
    return project("btd,dv->btv", hidden, head, jnp.float32)


def run(
    params: TransformerParams,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    *,
    config: ModelConfig,
    choices: ComputeConfig,
    quantization: QuantizationConfig,
) -> tuple[Float[Array, "B T V"], ModelStats]:
    """Runs stored parameters on whole sequences, without a cache.

    Args:
      params: in storage layout; quantised weights may stand for some.
      tokens: ids in [0, V); B a multiple of the parts into which the mesh splits sequences.
      positions: index of each token within its document; None counts from a row's start.
      segments: document number of each token; None makes each row one document.
      config: the architecture.
      choices: how to compute it.
      quantization: what is rounded.

    Returns:
      Logits in float32, the vocabulary split over the tensor axis, and the statistics.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segments is None:
        segments = jnp.ones_like(tokens)
    options = {"config": config, "choices": choices}
    ready = prepare(params, quantization=quantization, **options)
    hidden, stats = forward(ready, tokens, positions, segments, **options)
    return logits(ready, hidden, **options), stats
