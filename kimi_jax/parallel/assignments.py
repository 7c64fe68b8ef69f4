"""A device's assignments (a token and one of its experts each), sorted by expert."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from kimi_jax.core.param_spec import Leaf
from kimi_jax.core.sorted_rows import SortedRows, sort_rows
from kimi_jax.parallel.mesh import EXPERT


@struct.dataclass
class Order:
    """How assignments lie when those of one expert, and so of one device, are neighbours."""

    rows: SortedRows  # entries are assignments, token * K + k
    destination: Leaf  # [A] device of each sorted row
    counts: Leaf  # [devices] rows for each device
    starts: Leaf  # [devices] first row for each device


def sort_assignments(expert_ids: Int[Array, "W K"], num_local_experts: int) -> Order:
    """Sorts by expert, and by token within each."""
    expert = expert_ids.reshape(-1)
    rows = sort_rows(expert)
    destination = expert[rows.source] // num_local_experts
    devices = jnp.arange(jax.lax.axis_size(EXPERT))
    counts = jnp.sum(destination[:, None] == devices, axis=0, dtype=jnp.int32)
    return Order(
        rows=rows,
        destination=destination,
        counts=counts,
        starts=jnp.cumsum(counts) - counts,
    )
