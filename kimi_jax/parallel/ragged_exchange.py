"""Assignments exchanged in parts of their true sizes, into one buffer on each device."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kimi_jax.core.param_spec import Leaf
from kimi_jax.core.platform import target_platform
from kimi_jax.core.sorted_rows import linear_pair
from kimi_jax.parallel.assignments import Order
from kimi_jax.parallel.mesh import EXPERT

_ROW_MULTIPLE = 8  # rows of a TPU's registers


@struct.dataclass
class Parts:
    """One way of the exchange, in the terms of `jax.lax.ragged_all_to_all`; leaves [devices]."""

    input_offsets: Leaf  # first row that goes to each device
    send_sizes: Leaf  # rows that go to each device
    output_offsets: Leaf  # where they start over there
    recv_sizes: Leaf  # rows that come from each device


@struct.dataclass
class RaggedPlan:
    """Both ways of the exchange.

    Sender i's rows follow those of sender i - 1 in a receiver's buffer; the end that does not fit
    is cut off.
    """

    there: Parts
    back: Parts
    num_rows: int = struct.field(pytree_node=False)  # A, rows at home
    buffer_rows: int = struct.field(pytree_node=False)  # R, rows that a device can receive


def buffer_share(*, devices: int, per_token: int, held: int, capacity: float | None) -> float:
    """Returns the rows that a device has room for, as a multiple of an even load.

    That is `capacity`, and never more than what comes if all tokens of all devices choose as many
    of this device's experts as they can, which is what None stands for.
    """
    worst = devices * min(per_token, held) / per_token
    return worst if capacity is None else min(worst, capacity)


def make_plan(
    order: Order, *, per_token: int, held: int, capacity: float | None
) -> tuple[RaggedPlan, Float[Array, ""]]:
    """Shares out each device's buffer among the senders. All-gathers counts [devices].

    Args:
      order: this device's assignments.
      per_token: K, assignments of a token.
      held: experts on each device.
      capacity: rows of a buffer as a multiple of an even load; None is enough for all.

    Returns:
      The plan, and how many of this device's rows do not fit.
    """
    num_rows, devices = order.destination.size, jax.lax.axis_size(EXPERT)
    share = buffer_share(devices=devices, per_token=per_token, held=held, capacity=capacity)
    buffer_rows = math.ceil(share * num_rows / _ROW_MULTIPLE) * _ROW_MULTIPLE
    counts = jax.lax.all_gather(order.counts, EXPERT)  # [sender, receiver]
    ends = jnp.minimum(jnp.cumsum(counts, axis=0), buffer_rows)
    starts = jnp.minimum(jnp.cumsum(counts, axis=0) - counts, buffer_rows)
    sizes = ends - starts
    at_home = jnp.cumsum(counts, axis=1) - counts
    me = jax.lax.axis_index(EXPERT)
    plan = RaggedPlan(
        there=Parts(at_home[me], sizes[me], starts[me], sizes[:, me]),
        back=Parts(starts[:, me], sizes[:, me], at_home[:, me], sizes[me]),
        num_rows=num_rows,
        buffer_rows=buffer_rows,
    )
    return plan, jnp.sum(counts[me] - sizes[me]).astype(jnp.float32)


def send_numbers(plan: RaggedPlan, numbers: Int[Array, "A"]) -> Int[Array, "R"]:
    """Sends integers, as `send` does rows."""
    return _send(plan, numbers)


def _send(plan: RaggedPlan, rows: Array) -> Array:
    """Ragged-all-to-alls [A, ...] -> [R, ...]; unused rows are 0."""
    return _exchange(rows, plan.there, plan.buffer_rows)


def _back(plan: RaggedPlan, rows: Array) -> Array:
    """Ragged-all-to-alls [R, ...] -> [A, ...]; rows that were cut off are 0."""
    return _exchange(rows, plan.back, plan.num_rows)


send = linear_pair(_send, _back)
back = linear_pair(_back, _send)


def _exchange(rows: Array, parts: Parts, out_rows: int) -> Array:
    out = jnp.zeros((out_rows, *rows.shape[1:]), rows.dtype)
    if target_platform() == "cpu":
        return _exchange_by_gathering(rows, out, parts)
    return jax.lax.ragged_all_to_all(
        rows,
        out,
        parts.input_offsets,
        parts.send_sizes,
        parts.output_offsets,
        parts.recv_sizes,
        axis_name=EXPERT,
    )


def _exchange_by_gathering(rows: Array, out: Array, parts: Parts) -> Array:
    """What `ragged_all_to_all` does, for CPUs, which have none: all-gathers everything."""
    me = jax.lax.axis_index(EXPERT)
    everyone = jax.lax.all_gather(rows, EXPERT)
    first, size, start = (
        jax.lax.all_gather(part, EXPERT)[:, me]
        for part in (parts.input_offsets, parts.send_sizes, parts.output_offsets)
    )
    place = jnp.arange(out.shape[0])[:, None]
    hit = (place >= start) & (place < start + size)
    sender = jnp.argmax(hit, axis=1)
    row = jnp.clip(place[:, 0] - start[sender] + first[sender], 0, rows.shape[0] - 1)
    is_used = jnp.any(hit, axis=1).reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.where(is_used, everyone[sender, row], out)
