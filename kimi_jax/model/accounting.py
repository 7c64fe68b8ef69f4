"""How many floating-point operations and parameters the model uses, in closed form.

A multiplication and an addition count as two operations, and only matrix products count: norms,
softmax, rotations, activations, the embedding look-up and the optimizer are left out, as is what a
backward pass recomputes. These are the model FLOPs of a share-of-peak figure, the same for every
implementation, not what a program happens to execute.
"""

import dataclasses

from kimi_jax.configs.model import ModelConfig

BACKWARD_AND_FORWARD = 3  # the backward pass takes two products for each one of the forward pass
SWIGLU_MATRICES = 3  # gate, up, down


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopsPerToken:
    """Operations of the forward pass for one token, averaged over the positions of a sequence.

    Attributes:
      attention_projections: query, key-value and output products of every layer.
      attention_core: scores and weighted values. A query at position t sees t + 1 keys, on average
        (T + 1) / 2: only the causal half counts, whatever a kernel computes.
      dense_ffn: the leading dense layers.
      shared_experts: the shared experts of every layer that has experts.
      routed_experts: the K experts of a token; exactly K, none dropped and no padding.
      router: scores of all experts.
      head: logits over the vocabulary.
    """

    attention_projections: float
    attention_core: float
    dense_ffn: float
    shared_experts: float
    routed_experts: float
    router: float
    head: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(dataclasses.asdict(self).values())


def flops_per_token(config: ModelConfig, sequence_length: int) -> FlopsPerToken:
    """Counts the operations of the forward pass, by part.

    Args:
      config: sizes of the model.
      sequence_length: T, tokens that attend to each other.
    """
    heads, embed = config.num_heads, config.embed_dim
    mean_keys = (sequence_length + 1) / 2
    core = heads * (config.head_qk_dim + config.head_value_dim) * mean_keys
    expert = SWIGLU_MATRICES * embed * config.expert_ffn_dim
    dense = SWIGLU_MATRICES * embed * config.dense_ffn_dim
    moe_layers = config.num_moe_layers
    return FlopsPerToken(
        attention_projections=2.0 * config.num_layers * _attention_matrices(config),
        attention_core=2.0 * config.num_layers * core,
        dense_ffn=2.0 * config.num_dense_layers * dense,
        shared_experts=2.0 * moe_layers * config.num_shared_experts * expert,
        routed_experts=2.0 * moe_layers * config.experts_per_token * expert,
        router=2.0 * moe_layers * embed * config.num_routed_experts,
        head=2.0 * embed * config.vocab_size,
    )


def train_flops_per_step(config: ModelConfig, batch_sequences: int, sequence_length: int) -> float:
    """Model FLOPs of one optimizer step: three times those of the forward pass.

    Args:
      config: sizes of the model.
      batch_sequences: sequences of a step, all micro-batches together.
      sequence_length: T, tokens of a sequence.
    """
    forward = flops_per_token(config, sequence_length).total
    return BACKWARD_AND_FORWARD * batch_sequences * sequence_length * forward


def active_parameters(config: ModelConfig) -> int:
    """Number of parameters that one token uses: all but the experts it is not sent to.

    Embedding, head, norms and the router's selection biases count whole. This gives 32.86 B for
    Kimi K2, whose report says 32.6 B (arXiv 2507.20534, section 2.3), not what that leaves out.
    """
    unused = config.num_routed_experts - config.experts_per_token
    expert = SWIGLU_MATRICES * config.embed_dim * config.expert_ffn_dim
    return total_parameters(config) - config.num_moe_layers * unused * expert


def total_parameters(config: ModelConfig) -> int:
    """Number of all parameters, selection biases included."""
    embed = config.embed_dim
    expert = SWIGLU_MATRICES * embed * config.expert_ffn_dim
    experts = config.num_routed_experts + config.num_shared_experts
    router = (embed + 1) * config.num_routed_experts
    moe = config.num_moe_layers * (experts * expert + router)
    dense = config.num_dense_layers * SWIGLU_MATRICES * embed * config.dense_ffn_dim
    norms = 2 * embed + config.kv_latent_dim + (config.q_latent_dim or 0)
    attention = config.num_layers * (_attention_matrices(config) + norms)
    embedding_and_head = 2 * config.vocab_size * embed
    return attention + dense + moe + embedding_and_head + embed


def _attention_matrices(config: ModelConfig) -> int:
    """Parameters of one layer's attention projections; a token passes each once."""
    embed, heads, latent = config.embed_dim, config.num_heads, config.kv_latent_dim
    queries = heads * config.head_qk_dim
    rank = config.q_latent_dim
    query = embed * queries if rank is None else rank * (embed + queries)
    key_value = embed * (latent + config.head_rope_dim)
    key_value += latent * heads * (config.head_nope_dim + config.head_value_dim)
    return query + key_value + heads * config.head_value_dim * embed
