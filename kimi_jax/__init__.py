"""kimi_jax: sharded JAX training of Kimi-K2-style models."""
