"""Logical axis names: what a dimension of a parameter means, not where it lives.

`parallel/rules.py` maps them to mesh axes. The letter of each is the one used in shapes and
einsums.
"""

LAYERS = "layers"  # L: stacked transformer blocks
EXPERTS = "experts"  # E: routed experts, a stack of independent weights
ROUTES = "routes"  # E: routed experts, as the outputs of the router
EMBED = "embed"  # D: model width
VOCAB = "vocab"  # V: vocabulary
HEADS = "heads"  # N: attention heads
HEAD_OUTPUTS = "head_outputs"  # N: attention heads, as inputs of the output projection
HEAD_NOPE = "head_nope"  # H: per-head width without rotation
HEAD_ROPE = "head_rope"  # R: per-head rotary width
HEAD_VALUE = "head_value"  # U: per-head value width
Q_LATENT = "q_latent"  # Q: query latent
KV_LATENT = "kv_latent"  # C: key-value latent
FFN = "ffn"  # F: width of a dense feed-forward layer
EXPERT_FFN = "expert_ffn"  # M: width inside an expert
