"""Online softmax of one warpgroup's queries, for attention kernels on Hopper."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels.hopper.program import ROWS
from kimi_jax.kernels.hopper.sums import zeros

LOG2_E = math.log2(math.e)
MASKED = -1e30  # logit of a masked pair; finite, so that differences of two are numbers
F32 = jnp.float32


def along_rows(x: Array, shape: tuple[int, int]) -> Array:
    """Gives each row its value of x."""
    return jax.lax.broadcast_in_dim(x, shape, (0,))


def along_columns(x: Array, shape: tuple[int, int]) -> Array:
    """Gives each column its value of x."""
    return jax.lax.broadcast_in_dim(x, shape, (1,))


class Softmax(NamedTuple):
    """A softmax over the keys met so far; exponentials to base 2, which the hardware has."""

    largest: Array  # [t], in units of 1 / log2(e)
    total: Array  # [t], the sum of 2^(logit - largest)
    weighted: Array  # [t, U], the same sum times values


def empty_softmax(width: int) -> Softmax:
    """Returns the softmax over no keys."""
    return Softmax(
        largest=jnp.full((ROWS,), MASKED, F32),
        total=jnp.zeros((ROWS,), F32),
        weighted=zeros(ROWS, width),
    )


def add_logits(softmax: Softmax, logits: Array) -> tuple[Softmax, Array]:
    """Returns the softmax with the logits [t, s] in all but `weighted`, and their exponentials.

    `weighted` is only rescaled: the caller adds exponentials @ values.
    """
    largest = jnp.maximum(softmax.largest, jnp.max(logits, axis=1))
    fading = jnp.exp2(softmax.largest - largest)
    exponentials = jnp.exp2(logits - along_rows(largest, logits.shape))
    weighted = softmax.weighted * along_rows(fading, softmax.weighted.shape)
    total = softmax.total * fading + jnp.sum(exponentials, axis=1)
    return Softmax(largest, total, weighted), exponentials
