"""The kernels that `bench_kernels.py` measures, and what to hold each against."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.kernels.grouped_matmul import cases as grouped_cases
from kimi_jax.kernels.grouped_matmul import grouped_matmul
from kimi_jax.kernels.int4_fake_quant import cases as fake_quant_cases
from kimi_jax.kernels.int4_fake_quant import int4_fake_quant
from kimi_jax.kernels.int4_matmul import cases as int4_cases
from kimi_jax.kernels.int4_matmul import int4_matmul
from kimi_jax.kernels.mla_attention import cases as attention_cases
from kimi_jax.kernels.mla_attention import mla_attention
from kimi_jax.kernels.mla_decode import cases as decode_cases
from kimi_jax.kernels.mla_decode import mla_decode
from kimi_jax.quantization.fake_quant import dense
from kimi_jax.quantization.int4 import dequantize

Program = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One operation.

    Attributes:
      run: the public function; takes a case's operands and `implementation=` by name.
      cases: its module of cases: KIMI_K2, TOY, `operands`, `cost`.
      fixed: what the public function needs beside the operands.
      differentiated: operands whose gradients training needs; none for inference.
      baselines: other programs of the same operands, by name. They may do less than the kernel, as
        a product with bfloat16 weights does; the name says what they are.
    """

    run: Program
    cases: types.ModuleType
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    differentiated: tuple[str, ...] = ()
    baselines: Mapping[str, Program] = dataclasses.field(default_factory=dict)


def bfloat16_product(x: jax.Array, w: Any) -> jax.Array:
    """The same product with weights that were never packed: a bound for packed ones."""
    return jnp.dot(x, w)


def ragged_dot(x: jax.Array, w: Any, group_sizes: jax.Array) -> jax.Array:
    """XLA's own grouped product."""
    return jax.lax.ragged_dot(x, dense(w, x.dtype), group_sizes)


def one_large_product(x: jax.Array, w: Any, group_sizes: jax.Array) -> jax.Array:
    """All rows times one group's matrix: the rate of a product that is not grouped."""
    del group_sizes
    return jnp.dot(x, dense(w, x.dtype)[0])


def unpack_first(x: jax.Array, w: Any) -> jax.Array:
    """XLA's own: all weights unpacked, then a product."""
    return jnp.dot(x, dequantize(w, x.dtype))


def tokamax_attention(
    q_nope, q_rope, k_nope, k_rope, value, segments, *, scale: float
) -> jax.Array:
    """Tokamax's attention of whole rows as one document."""
    import tokamax

    del segments
    heads = q_nope.shape[2]
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_rope.shape[:2], heads, k_rope.shape[-1]))
    query = jnp.concatenate([q_nope, q_rope], axis=-1)
    key = jnp.concatenate([k_nope, k_rope], axis=-1)
    return tokamax.dot_product_attention(query, key, value, scale=scale, is_causal=True)


def tokamax_ragged_dot(x: jax.Array, w: Any, group_sizes: jax.Array) -> jax.Array:
    """Tokamax's grouped product, of arrays."""
    import tokamax

    return tokamax.ragged_dot(x, dense(w, x.dtype), group_sizes)


TOKAMAX = "tokamax"  # the library whose programs need it installed
_SCALE = {"scale": 192**-0.5}
KERNELS: Mapping[str, Kernel] = {
    "int4_matmul": Kernel(
        run=int4_matmul,
        cases=int4_cases,
        differentiated=("x",),
        baselines={"unpacked by XLA": unpack_first},
    ),
    "int4_fake_quant": Kernel(
        run=int4_fake_quant,
        cases=fake_quant_cases,
        differentiated=("x", "w"),
        baselines={"bfloat16 product": bfloat16_product},
    ),
    "grouped_matmul": Kernel(
        run=grouped_matmul,
        cases=grouped_cases,
        differentiated=("x", "w"),
        baselines={
            "lax.ragged_dot": ragged_dot,
            "one large product": one_large_product,
            TOKAMAX: tokamax_ragged_dot,
        },
    ),
    "mla_attention": Kernel(
        run=mla_attention,
        cases=attention_cases,
        fixed=_SCALE,
        differentiated=("q_nope", "q_rope", "k_nope", "k_rope", "value"),
        baselines={TOKAMAX: tokamax_attention},
    ),
    "mla_decode": Kernel(run=mla_decode, cases=decode_cases, fixed=_SCALE),
}
