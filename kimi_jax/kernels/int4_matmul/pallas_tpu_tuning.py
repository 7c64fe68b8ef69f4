"""What the tuning tool needs to know of products with INT4 weights on TPUs."""

from kimi_jax.kernels.int4_matmul import cases
from kimi_jax.kernels.int4_matmul.pallas_tpu import weight
from kimi_jax.kernels.stationary_tuning import tunables

TUNABLE = tunables("int4_matmul", cases.operands, weight)
