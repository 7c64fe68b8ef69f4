"""The one way into per-device code."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kimi_jax.parallel.rules import entry_axes, here


def per_shard(fn: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Runs `fn` on each device's own shard of its arguments, over all axes of the mesh.

    Inside, shapes are local and collectives name mesh axes. Axes that are manual already, in a
    pipeline's stage or a replica, are left out of the layouts. Kernels can only run here: a Pallas
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

    def run(*args: Any) -> Any:
        specs = jax.tree.map(
            lambda spec, arg: jax.tree.map(lambda _: here(spec), arg), in_specs, args
        )
        wide = jax.tree.map(_name_unused_axes, specs, args)
        args = jax.tree.map(
            lambda arg, w, s: arg if w is s else jax.reshard(arg, w), args, wide, specs
        )
        mesh = jax.sharding.get_abstract_mesh()
        return jax.shard_map(
            fn,
            in_specs=wide,
            out_specs=jax.tree.map(here, out_specs),
            axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
            check_vma=False,
        )(*args)

    return run


def _name_unused_axes(spec: PartitionSpec, arg: Any) -> PartitionSpec:
    """Adds the mesh axes of size 1 to an argument's first dimension.

    The gradient of an argument is summed over the axes that its spec does not name. XLA for CPUs
    does not see that a sum over one device is none.
    """
    kind = jax.typeof(arg)
    full = PartitionSpec(*spec, *(None,) * (kind.ndim - len(spec)))
    if kind.ndim == 0 or kind.sharding.spec != full:
        return spec  # where the argument is not laid out like this, shard_map says so
    named = {name for entry in full for name in entry_axes(entry)}
    mesh = kind.sharding.mesh
    named.update(mesh.manual_axes)
    unused = [name for name, size in mesh.shape.items() if size == 1 and name not in named]
    return PartitionSpec((*entry_axes(full[0]), *unused), *full[1:])
