"""What the Mosaic GPU kernels for Hopper share: products, a ring of blocks, and what they ask for.

A kernel has `COMPUTE` warpgroups that calculate and one that copies. That one fills a ring of
blocks in shared memory with the tensor memory accelerator; `full` tells when a slot holds its
block, `empty` when all that calculate are done with it. Interpreted on a CPU the same barriers,
copies, loops and masks run; only products are then JAX's own, since JAX 0.12's interpreter has
neither products from registers nor accumulators that start from a value. Each interpreted
warpgroup blocks a thread of JAX's CPU client, which has as many as cores or simulated devices:
with fewer than about eight the interpreter can wait for ever.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kimi_jax.core.platform import target_chip

COMPUTE = 2  # warpgroups that calculate
ROWS = 64  # of a product that one warpgroup accumulates
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


class Factors(NamedTuple):
    """One product a @ b, or a @ b^T."""

    a: Any  # [m, k], in shared memory or registers
    b: Any  # [k, n], or [n, k] if transposed, in shared memory
    transposed: bool = False


class Sum(NamedTuple):
    """start + the products of all factors, [m, n], accumulated in float32."""

    factors: Sequence[Factors]
    start: Array


def multiply(sums: Sequence[Sum], interpret: bool) -> tuple[Array, ...]:
    """Returns the sums; the tensor cores are given all products before the first is awaited."""
    if interpret:
        return tuple(_multiply_interpreted(*a_sum) for a_sum in sums)

    def accumulate(total_refs):
        for total_ref, (factors, _) in zip(total_refs, sums, strict=True):
            for a, b, transposed in factors:
                plgpu.wgmma(total_ref, a, b.transpose((1, 0)) if transposed else b)

    return pl.run_state(accumulate)(tuple(plgpu.ACC.init(start) for _, start in sums))


def _multiply_interpreted(factors: Sequence[Factors], total: Array) -> Array:
    for a, b, transposed in factors:
        dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
        total += jax.lax.dot_general(a[...], b[...], dimensions, preferred_element_type=jnp.float32)
    return total


def zeros(rows: int, columns: int) -> Array:
    """Returns a start for a sum, [rows, columns]."""
    return jnp.zeros((rows, columns), jnp.float32)


def copy_in(sources: Sequence[Any], targets: Sequence[Any], barrier: Any) -> None:
    """Starts copies into shared memory; each arrives once at the barrier."""
    for source, target in zip(sources, targets, strict=True):
        plgpu.copy_gmem_to_smem(source, target, barrier)


def copy_out(sources: Sequence[Any], targets: Sequence[Any]) -> None:
    """Copies what this warpgroup wrote to shared memory to the device's, and waits."""
    plgpu.commit_smem()
    for source, target in zip(sources, targets, strict=True):
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)


class Ring(NamedTuple):
    """Barriers of blocks in shared memory that are filled and emptied in turn."""

    full: Any  # [slots]
    empty: Any  # [slots]

    def fill(self, num_steps: Array, copies: Callable[..., None]) -> None:
        """Fills slots; `copies(step, slot, barrier)` starts all copies of a step's block."""

        @pl.loop(0, num_steps)
        def _(step):
            slot = self._slot(step)

            @pl.when(step >= self.full.shape[0])
            def _():
                plgpu.barrier_wait(self.empty.at[slot])

            copies(step, slot, self.full.at[slot])

    def use(self, first: Array | int, last: Array, state: Any, visit: Callable[..., Any]) -> Any:
        """Returns the state after `visit(step, slot, state)` for steps first to last - 1."""
        return jax.lax.fori_loop(
            first, last, lambda step, state: self.use_one(step, state, visit), state
        )

    def use_one(self, step: Array, state: Any, visit: Callable[..., Any]) -> Any:
        """Returns the state after one step."""
        slot = self._slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        state = visit(step, slot, state)
        plgpu.barrier_arrive(self.empty.at[slot])
        return state

    def send(self, step: Array, blocks: Any, values: Array) -> None:
        """Gives another warpgroup the block of a step."""
        slot = self._slot(step)

        @pl.when(step >= self.full.shape[0])
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        blocks.at[slot][...] = values
        plgpu.barrier_arrive(self.full.at[slot])

    def await_receipt(self, step: Array) -> None:
        """Waits until the other warpgroup received the block of a step, the last that was sent."""
        plgpu.barrier_wait(self.empty.at[self._slot(step)])

    def receive(self, step: Array, blocks: Any) -> Array:
        """Returns the block that another warpgroup sent."""
        slot = self._slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        values = blocks.at[slot][...]
        plgpu.barrier_arrive(self.empty.at[slot])
        return values

    def _slot(self, step: Array) -> Array:
        return jax.lax.rem(step, self.full.shape[0])


def ring_barriers(num_slots: int, num_copies: int) -> Ring:
    """Describes the barriers of a ring whose blocks are `num_copies` copies each."""
    return Ring(
        full=plgpu.Barrier(num_arrivals=num_copies, num_barriers=num_slots),
        empty=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=num_slots),
    )


def exchange_barriers(num_slots: int) -> Ring:
    """Describes the barriers of a ring that one warpgroup sends to another through."""
    barriers = plgpu.Barrier(num_arrivals=1, num_barriers=num_slots)
    return Ring(full=barriers, empty=barriers)


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
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
