"""What the tuning tool needs to know of attention on TPUs."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kimi_jax.core.platform import target_chip
from kimi_jax.kernels.cost import Cost
from kimi_jax.kernels.mla_attention import cases
from kimi_jax.kernels.mla_attention.cases import Case
from kimi_jax.kernels.mla_attention.pallas_tpu import with_panel
from kimi_jax.kernels.mla_attention.pallas_tpu_backward import Kept, backward, is_fused
from kimi_jax.kernels.mla_attention.pallas_tpu_cells import Folded, Operands
from kimi_jax.kernels.mla_attention.pallas_tpu_forward import forward
from kimi_jax.kernels.tunable import Tiles, Tunable

_SIZES = (256, 512, 1024)
_LARGEST_CELL = 1024 * 1024
_ITEM_BYTES = 2


def _shape(case: Case) -> dict[str, int]:
    return {"rows": case.positions, "nope": case.nope, "rope": case.rope, "value": case.value}


def _candidates(case: Case, chip: str) -> list[dict[str, int]]:
    del chip  # the compiler says what does not fit
    fitting = [size for size in _SIZES if size <= max(_SIZES[0], case.positions)]
    return [{"queries": q, "keys": k} for q in fitting for k in fitting if q * k <= _LARGEST_CELL]


def _all_tiles(tiles: Tiles, positions: int, chip: str | None) -> dict[str, int]:
    """Returns the kernels' tiles, with the same blocks in both directions."""
    blocks = {f"{d}_{side}": tiles[side] for d in ("forward", "backward") for side in tiles}
    return with_panel(blocks, positions, chip)


def _operands(case: Case, key: Array) -> dict[str, Any]:
    """Returns the operands as the kernels want them; positions must fill whole panels."""
    given = cases.operands(case, key)
    q_nope, q_rope = (given[name].transpose(0, 2, 3, 1) for name in ("q_nope", "q_rope"))
    k_nope, value = (given[name].transpose(0, 2, 1, 3) for name in ("k_nope", "value"))
    segments = given["segments"].astype(jnp.int32)[:, None]
    row = jnp.zeros((case.batch, case.heads, 1, case.positions), jnp.float32)
    return {
        "operands": Operands(q_nope, q_rope, k_nope, given["k_rope"], value, segments),
        "kept": Kept(d_out=value, log_sum=row, inner=row),
    }


def _cells(case: Case, tiles: Tiles) -> tuple[int, int, int]:
    """Counts a head's cells: all that are met, those without masks, and those with masks."""
    document = np.arange(case.positions) * case.documents // case.positions
    of_queries, of_keys = (document.reshape(-1, tiles[side]) for side in ("queries", "keys"))
    q_low, q_high = of_queries[:, :1], of_queries[:, -1:]
    k_low, k_high = of_keys[:, 0], of_keys[:, -1]
    first_query = np.arange(len(of_queries))[:, None] * tiles["queries"]
    first_key = np.arange(len(of_keys)) * tiles["keys"]
    met = first_key < first_query + tiles["queries"]
    shared = met & (k_low <= q_high) & (q_low <= k_high)
    visible = (q_low == k_high) & (q_high == k_low) & (first_key + tiles["keys"] <= first_query + 1)
    return int(met.sum()), int((shared & visible).sum()), int((shared & ~visible).sum())


def _frequencies(
    case: Case, chip: str, tiles: Tiles, *, is_backward: bool
) -> dict[str, tuple[float, ...]]:
    """Follows the kernels: sums set to zero, cells, sums written."""
    given = _all_tiles(tiles, case.positions, chip)
    panels = case.positions // given["panel"]
    rows, columns = Folded(panels, is_by_keys=is_backward).grid
    steps = rows * columns
    met, visible, masked = _cells(case, tiles)
    blocks = given["panel"] // tiles["queries"]
    cells = (met / (steps * blocks), visible / met, masked / met)
    of_panel, of_head = panels / steps, 1 / steps
    plain = (of_panel, *cells, of_panel)
    if not is_backward:
        return {"mla_attention_forward": plain}
    if is_fused(case.positions, case.nope + case.rope, _ITEM_BYTES, given["vmem_mib"]):
        return {"mla_attention_backward": (of_panel, of_head, *cells, of_panel, of_head)}
    return {"mla_attention_dkv": plain, "mla_attention_dq": plain}


def _cost(case: Case, tiles: Tiles, *, is_backward: bool) -> Cost:
    """Counts whole cells; five products backward, two forward."""
    _, visible, masked = _cells(case, tiles)
    pairs = case.batch * case.heads * (visible + masked) * tiles["queries"] * tiles["keys"]
    width = case.nope + case.rope
    widths = 3 * width + 2 * case.value if is_backward else width + case.value
    # Backward: operands and d_out are read, gradients written.
    return Cost(flops=2 * pairs * widths, bytes=cases.cost(case).bytes * (2 if is_backward else 1))


def _run(operands: dict[str, Any], tiles: Tiles, *, is_backward: bool) -> Any:
    given, kept = operands["operands"], operands["kept"]
    scale = (given.k_nope.shape[-1] + given.k_rope.shape[-1]) ** -0.5
    all_tiles = _all_tiles(tiles, given.value.shape[2], target_chip())
    if is_backward:
        return backward(given, kept, scale, all_tiles, interpret=False)
    return forward(given, scale, all_tiles, interpret=False)


def _tunable(is_backward: bool) -> Tunable:
    return Tunable(
        shape=_shape,
        operands=_operands,
        candidates=_candidates,
        frequencies=functools.partial(_frequencies, is_backward=is_backward),
        run=functools.partial(_run, is_backward=is_backward),
        cost=functools.partial(_cost, is_backward=is_backward),
    )


TUNABLE = {"mla_attention_forward": _tunable(False), "mla_attention_backward": _tunable(True)}
