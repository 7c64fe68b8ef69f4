"""Assignments exchanged in equal parts: as many places between any two devices, used or not."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kimi_jax.core.param_spec import Leaf
from kimi_jax.core.sorted_rows import linear_pair
from kimi_jax.parallel.assignments import Order
from kimi_jax.parallel.mesh import EXPERT


@struct.dataclass
class PaddedPlan:
    """Which sorted row fills each place, and back."""

    row_of_place: Leaf  # [devices * places]; A where a place is empty
    place_of_row: Leaf  # [A]; devices * places where a row found no place


def make_plan(
    order: Order, *, per_token: int, held: int, capacity: float | None
) -> tuple[PaddedPlan, Float[Array, ""]]:
    """Gives rows their places, `capacity` times an even share or enough for all.

    Args:
      order: this device's assignments.
      per_token: K, assignments of a token.
      held: experts on each device.
      capacity: places between two devices as a multiple of an even load; None is enough for all.

    Returns:
      The plan, and how many rows found no place.
    """
    num_rows, devices = order.destination.size, jax.lax.axis_size(EXPERT)
    places = num_rows // per_token * min(per_token, held)
    if capacity is not None:
        places = min(places, math.ceil(capacity * num_rows / devices))
    place = jnp.arange(places)
    filled = place < order.counts[:, None]
    row_of_place = jnp.where(filled, order.starts[:, None] + place, num_rows).reshape(-1)
    within = jnp.arange(num_rows) - order.starts[order.destination]
    place_of_row = jnp.where(within < places, order.destination * places + within, devices * places)
    dropped = jnp.sum(jnp.maximum(order.counts - places, 0)).astype(jnp.float32)
    return PaddedPlan(row_of_place=row_of_place, place_of_row=place_of_row), dropped


def send_numbers(plan: PaddedPlan, numbers: Int[Array, "A"]) -> Int[Array, "R"]:
    """Sends integers, as `send` does rows."""
    return _send(plan, numbers)


def _send(plan: PaddedPlan, rows: Array) -> Array:
    """All-to-alls [A, ...] -> [devices * places, ...]; empty places are 0."""
    placed = rows.at[plan.row_of_place].get(mode="fill", fill_value=0)
    return jax.lax.all_to_all(placed, EXPERT, split_axis=0, concat_axis=0, tiled=True)


def _back(plan: PaddedPlan, rows: Array) -> Array:
    """All-to-alls [devices * places, ...] -> [A, ...]; rows without a place are 0."""
    returned = jax.lax.all_to_all(rows, EXPERT, split_axis=0, concat_axis=0, tiled=True)
    return returned.at[plan.place_of_row].get(mode="fill", fill_value=0)


send = linear_pair(_send, _back)
back = linear_pair(_back, _send)
