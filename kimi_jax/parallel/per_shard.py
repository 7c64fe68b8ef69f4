"""The one way into per-device code."""

from collections.abc import Callable
from typing import Any

import jax


def per_shard(fn: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Runs `fn` on each device's own shard of its arguments, over the whole mesh.

    Inside, shapes are local and collectives name mesh axes. Kernels can only run here: a Pallas
    call needs every mesh axis to be manual, and its interpreter fails under the varying-axes check,
    which is therefore off; each kernel proves its gradient for replicated operands in a test
    instead.

    Args:
      fn: a top-level function; its name ends in `_per_shard`, or it is a kernel.
      in_specs: PartitionSpec, or prefix tree of them, for each positional argument.
      out_specs: the same for the results.

    Returns:
      A function of global arrays.
    """
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)
