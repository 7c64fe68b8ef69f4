"""Kernels for Hopper: what they ask for, their warpgroups, and how they start."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kimi_jax.core.platform import target_chip

COMPUTE = 2  # warpgroups that calculate
ROWS = 64  # of a product that one warpgroup accumulates
TILE = COMPUTE * ROWS  # rows of a thread block
MULTIPROCESSORS = 132  # of an H100 or H200 SXM
_COMPUTE_REGISTERS = 232  # a thread; 2 * 232 + 40 of the 512 that three warpgroups share
_COPY_REGISTERS = 40
_CAPABILITY = "9.0"
_HOPPERS = ("h100", "h200")  # of `target_chip`


def require(kernel_name: str, dtype: Any, interpret: bool) -> None:
    """Raises `NotImplementedError` unless a program is interpreted, or bfloat16 on a Hopper GPU."""
    if interpret:
        return
    if dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"{kernel_name}: 'pallas_gpu' takes bfloat16, got {dtype}; cast the operands, or "
            "choose 'auto' in compute.implementation"
        )
    # A device that is not there has a name, one that is there also says what it can do.
    here = jax.devices()[0]
    is_hopper = getattr(here, "compute_capability", None) == _CAPABILITY
    if not is_hopper and target_chip() not in _HOPPERS:
        raise NotImplementedError(
            f"{kernel_name}: 'pallas_gpu' needs a GPU of compute capability {_CAPABILITY} (Hopper: "
            f"H100, H200), and this program is for a {here.device_kind!r}; choose 'auto' in "
            "compute.implementation"
        )


def specialise(compute: Callable[[Array], None], copy: Callable[[], None]) -> None:
    """Runs `compute(index)` in the warpgroups that calculate and `copy()` in the other."""
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == COMPUTE)
    def _():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        copy()


def kernel(
    body: Callable[..., None],
    out_type: Any,
    scratch: Any,
    grid: dict[str, int],
    cost: pl.CostEstimate,
    interpret: bool,
) -> Callable[..., Any]:
    """Returns the function that runs `body` on a grid; the first axis of the grid runs fastest."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        cost_estimate=cost,
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
