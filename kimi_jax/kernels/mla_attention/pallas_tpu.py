"""Attention in Pallas for TPUs: blocks in VMEM, float32 softmax, nothing per pair in HBM.

Grid of every kernel: sequences, heads, and the causal triangle of panels, folded to a rectangle
(`pallas_tpu_cells.Folded`) so that no step is spent above the diagonal. In a panel, cells whose
documents do not meet are skipped; cells whose pairs are all visible take a path without masks.

Bytes: queries, outputs and their gradients cross HBM once; keys and values once for each panel of
queries (forward), queries once for each panel of keys (backward). Of a query, one float32 (the log
of its sum) is kept for the backward pass beside its output.

Invariant: the diagonal's cell is a query's last forward, so that a query sees itself before its
output is written, whatever was masked before.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kimi_jax.core.platform import target_chip
from kimi_jax.kernels import tile_table, tpu
from kimi_jax.kernels.mla_attention.pallas_tpu_backward import Kept, backward
from kimi_jax.kernels.mla_attention.pallas_tpu_cells import F32, Operands
from kimi_jax.kernels.mla_attention.pallas_tpu_forward import forward
from kimi_jax.kernels.tpu import LANES

_BLOCK = 512  # positions, where no table says otherwise
_PADDING = np.iinfo(np.int32).max  # document of padding
_PANEL = 2048  # positions; longer ones save nothing more


def mla_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N R"],
    k_nope: Float[Array, "B T N H"],
    k_rope: Float[Array, "B T R"],
    value: Float[Array, "B T N U"],
    segments: Int[Array, "B T"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N"]]:
    """Computes what the package's `mla_attention` describes; `interpret` runs it on a CPU.

    Raises:
      ValueError: the scale is not positive: the running maximum is one of logits before scaling.
    """
    operands = (q_nope, q_rope, k_nope, k_rope, value, segments)
    tiles = default_tiles(value.shape[1], q_nope.shape[-1], q_rope.shape[-1], value.shape[-1])
    return attend(operands, scale=scale, tiles=tiles, interpret=interpret)


def attend(
    operands: tuple[Array, ...], *, scale: float, tiles: dict[str, int], interpret: bool = False
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N"]]:
    """Is `mla_attention` with tiles of one's own choice.

    Args:
      operands: those of `mla_attention`, in order.
      scale: likewise.
      tiles: positions of `forward_queries`, `forward_keys`, `backward_queries` and
        `backward_keys`, the blocks that meet in a cell; of a `panel`, a multiple of each, of which
        several wait in VMEM; and `vmem_mib`, the memory there.
      interpret: whether to run on a CPU.
    """
    if scale <= 0:
        raise ValueError(f"mla_attention: scale must be positive, got {scale}")
    q_nope, q_rope, k_nope, k_rope, value, segments = operands
    positions = value.shape[1]
    padding = -positions % tiles["panel"]
    padded = Operands(
        q_nope=_pad(q_nope.transpose(0, 2, 3, 1), 3, padding),
        q_rope=_pad(q_rope.transpose(0, 2, 3, 1), 3, padding),
        k_nope=_pad(k_nope.transpose(0, 2, 1, 3), 2, padding),
        k_rope=_pad(k_rope, 1, padding),
        value=_pad(value.transpose(0, 2, 1, 3), 2, padding),
        # Padded positions come last, so that no query sees them, and see only each other. Numbers
        # of documents grow, so that the last one's is outside the range of all earlier blocks.
        segments=_pad(segments.astype(jnp.int32)[:, None], 2, padding, fill=_PADDING),
    )
    out, largest = _attend(padded, scale, tuple(tiles.items()), interpret)
    max_logit = jnp.max(largest[:, :, 0, :positions], axis=2)
    return out[:, :, :positions].transpose(0, 2, 1, 3), max_logit


def default_tiles(positions: int, nope: int, rope: int, value: int) -> dict[str, int]:
    """Returns the tabulated blocks, or ones that suit every chip, cut to a short sequence."""
    shape = {"rows": positions, "nope": nope, "rope": rope, "value": value}
    enough = LANES * 2 ** max(0, math.ceil(math.log2(positions / LANES)))
    blocks = {}
    for direction in ("forward", "backward"):
        found = tile_table.tiles(f"mla_attention_{direction}", **shape)
        sizes = found or {"queries": _BLOCK, "keys": _BLOCK}
        blocks |= {f"{direction}_{side}": min(sizes[side], enough) for side in ("queries", "keys")}
    return with_panel(blocks, positions, target_chip())


def with_panel(blocks: dict[str, int], positions: int, chip: str | None) -> dict[str, int]:
    """Adds the panel to blocks, and the memory of the chip."""
    panel = largest = max(blocks.values())
    # Longer panels where they need no more padding.
    while panel < _PANEL and -positions % (2 * panel) == -positions % largest:
        panel *= 2
    return blocks | {"panel": panel, "vmem_mib": tpu.facts(chip).vmem_mib}


def _pad(x: Array, axis: int, amount: int, fill: int = 0) -> Array:
    if amount == 0:
        return x
    widths = [(0, amount if dimension == axis else 0) for dimension in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _attend(operands: Operands, scale: float, tiles: tuple, interpret: bool) -> tuple[Array, Array]:
    out, largest, _ = forward(operands, scale, dict(tiles), interpret)
    return out, largest


def _attend_forward(operands: Operands, scale: float, tiles: tuple, interpret: bool):
    out, largest, log_sum = forward(operands, scale, dict(tiles), interpret)
    out = checkpoint_name(out, "attention_out")
    log_sum = checkpoint_name(log_sum, "attention_log_sum")
    return (out, largest), (operands, out, log_sum)


def _attend_backward(scale: float, tiles: tuple, interpret: bool, residuals, cotangents):
    operands, out, log_sum = residuals
    d_out = cotangents[0]
    inner = jnp.sum(out.astype(F32) * d_out.astype(F32), axis=-1)[:, :, None]
    kept = Kept(d_out, log_sum, inner)
    return (backward(operands, kept, scale, dict(tiles), interpret),)


_attend.defvjp(_attend_forward, _attend_backward)
