"""The architecture of a Kimi-K2-style model, under the field's own words."""

import dataclasses

from kimi_jax.configs.checks import check_fields, require_positive
from kimi_jax.core.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Context extension by YaRN (arXiv 2309.00071).

    Attributes:
      factor: how many times longer the context becomes.
      original_max_position: context of pre-training, in tokens.
      beta_fast: rotations within the original context above which a frequency is kept.
      beta_slow: rotations below which a frequency is divided by `factor`.
      mscale: together with `mscale_all_dim`, the multiplier of cos and sin.
      mscale_all_dim: the softmax scale is multiplied by (0.1 * mscale_all_dim * ln(factor) + 1)^2.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        check_fields(self, "model.yarn")
        require_positive(self, "model.yarn", "factor", "original_max_position")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of the decoder; the letters are those of shapes (see `core/axes.py`).

    Attributes:
      vocab_size: V, rows of the embedding and of the head.
      embed_dim: D, width of the residual stream.
      num_layers: L, all transformer blocks.
      num_dense_layers: leading blocks with a dense feed-forward layer instead of experts.
      num_heads: N.
      q_latent_dim: Q, rank of the query projection; None projects queries directly (Moonlight).
      kv_latent_dim: C, rank of the key-value projection, the width that a decoder caches.
      head_nope_dim: H, per-head query and key width without rotation.
      head_rope_dim: R, per-head rotary width, its key shared by all heads.
      head_value_dim: U.
      dense_ffn_dim: F, width of a dense feed-forward layer.
      expert_ffn_dim: M, width inside one expert.
      num_routed_experts: E.
      num_shared_experts: experts that every token passes, computed as one of their joint width.
      experts_per_token: K, routed experts chosen for a token.
      num_expert_groups: groups the experts are divided into; 1 is no group limit.
      expert_groups_per_token: groups a token may choose its experts from.
      routed_scaling_factor: multiplier of the routed experts' sum; None takes the Monte-Carlo rule
        of Moonlight (arXiv 2502.16982, figure 6) for these E and K.
      rope_theta: base of the rotary frequencies.
      yarn: context extension; None trains at the native context.
      max_position: longest sequence, in tokens.
      norm_eps: epsilon of every RMSNorm.
      init_std: standard deviation of initial weights.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_dense_layers: int
    num_heads: int
    q_latent_dim: int | None
    kv_latent_dim: int
    head_nope_dim: int
    head_rope_dim: int
    head_value_dim: int
    dense_ffn_dim: int
    expert_ffn_dim: int
    num_routed_experts: int
    num_shared_experts: int
    experts_per_token: int
    num_expert_groups: int = 1
    expert_groups_per_token: int = 1
    routed_scaling_factor: float | None = None
    rope_theta: float = 50_000.0
    yarn: YarnConfig | None = None
    max_position: int = 4096
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self):
        check_fields(self, "model")
        positive = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("num_dense_layers", "num_shared_experts", "yarn")
        ]
        require_positive(self, "model", *positive)
        self._check_layers()
        self._check_experts()

    def _check_layers(self) -> None:
        require(
            0 <= self.num_dense_layers <= self.num_layers,
            f"model.num_dense_layers must be between 0 and model.num_layers ({self.num_layers}), "
            f"got {self.num_dense_layers}",
        )
        require(
            self.head_rope_dim % 2 == 0,
            f"model.head_rope_dim must be even, since rotation acts on pairs; got "
            f"{self.head_rope_dim}",
        )

    def _check_experts(self) -> None:
        groups = self.num_expert_groups
        require(
            self.num_shared_experts >= 0,
            f"model.num_shared_experts must not be negative, got {self.num_shared_experts}",
        )
        require(
            self.num_routed_experts % groups == 0,
            f"model.num_routed_experts ({self.num_routed_experts}) must be a multiple of "
            f"model.num_expert_groups ({groups})",
        )
        require(
            self.expert_groups_per_token <= groups,
            f"model.expert_groups_per_token ({self.expert_groups_per_token}) exceeds "
            f"model.num_expert_groups ({groups})",
        )
        require(
            groups == 1 or self.num_routed_experts // groups >= 2,
            "model.num_expert_groups leaves fewer than 2 experts in a group; a group is scored by "
            "its best two",
        )
        choosable = self.num_routed_experts // groups * self.expert_groups_per_token
        require(
            self.experts_per_token <= choosable,
            f"model.experts_per_token ({self.experts_per_token}) exceeds the {choosable} experts "
            "that a token may choose from",
        )

    @property
    def num_moe_layers(self) -> int:
        """Blocks with routed experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def head_qk_dim(self) -> int:
        """H + R, the width of a query and of a key."""
        return self.head_nope_dim + self.head_rope_dim
