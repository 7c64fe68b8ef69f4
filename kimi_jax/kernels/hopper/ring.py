"""Blocks in shared memory: copies, and a ring that is filled and emptied in turn."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kimi_jax.kernels.hopper.program import COMPUTE, ROWS


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


def keep_rows(block: Any, first: Array | int, end: Array) -> None:
    """Clears the rows of a block in shared memory before `first` and from `end` on."""
    num_rows, width = block.shape
    row = jax.lax.broadcasted_iota(jnp.int32, (num_rows, ROWS), 0)
    row = plgpu.layout_cast(row, plgpu.Layout.WGMMA)
    for left in range(0, width, ROWS):
        part = block.at[:, left : left + ROWS]
        part[...] = jnp.where((row >= first) & (row < end), part[...], 0)


def meet(barrier: Any) -> None:
    """Waits until all warpgroups that calculate are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


class Ring(NamedTuple):
    """Barriers of blocks in shared memory that are filled and emptied in turn."""

    full: Any  # [slots]
    empty: Any  # [slots]

    def await_free(self, step: Array) -> Array:
        """Returns the slot of a step's block, once what it held before is no longer needed."""
        slot = self._slot(step)

        @pl.when(step >= self.full.shape[0])
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        return slot

    def await_block(self, step: Array) -> Array:
        """Returns the slot of a step's block, once it is there."""
        slot = self._slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def give_back(self, step: Array) -> None:
        """Frees the slot of a step's block for this warpgroup."""
        plgpu.barrier_arrive(self.empty.at[self._slot(step)])

    def fill(self, num_steps: Array, copies: Callable[..., None]) -> None:
        """Fills slots; `copies(step, slot, barrier)` starts all copies of a step's block."""

        @pl.loop(0, num_steps)
        def _(step):
            slot = self.await_free(step)
            copies(step, slot, self.full.at[slot])

    def use(self, first: Array | int, last: Array, state: Any, visit: Callable[..., Any]) -> Any:
        """Returns the state after `visit(step, slot, state)` for steps first to last - 1."""
        return jax.lax.fori_loop(
            first, last, lambda step, state: self.use_one(step, state, visit), state
        )

    def use_one(self, step: Array, state: Any, visit: Callable[..., Any]) -> Any:
        """Returns the state after one step."""
        state = visit(step, self.await_block(step), state)
        # Barriers alone do not order what was read without the tensor cores before a copy's writes.
        plgpu.commit_smem()
        self.give_back(step)
        return state

    def send(self, step: Array, blocks: Any, values: Array) -> None:
        """Gives another warpgroup the block of a step."""
        slot = self.await_free(step)
        blocks.at[slot][...] = values
        plgpu.barrier_arrive(self.full.at[slot])

    def await_receipt(self, step: Array) -> None:
        """Waits until the other warpgroup received the block of a step, the last that was sent."""
        plgpu.barrier_wait(self.empty.at[self._slot(step)])

    def receive(self, step: Array, blocks: Any) -> Array:
        """Returns the block that another warpgroup sent."""
        values = blocks.at[self.await_block(step)][...]
        self.give_back(step)
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
