"""Sizes of the tiles that the TPU's grouped products work in."""

from collections.abc import Mapping

from kimi_jax.core.platform import target_chip
from kimi_jax.kernels import tile_table, tpu
from kimi_jax.kernels.tpu import BFLOAT16_ROWS, LANES, up_to_multiple

Tiles = Mapping[str, int]

FORWARD = "forward"
INPUT_GRADIENT = "input_gradient"
WEIGHT_GRADIENT = "weight_gradient"

_MIB = 2**20
_ITEM_BYTES = 2  # of a value in bfloat16
_SUM_BYTES = 4

# By the compiler's schedules at Kimi K2's shapes. Multiplication units of 128 x 128 lose nothing on
# parts of 64 rows; those of 256 x 256 want 128, and 256 where a matrix is turned.
_SMALL_UNITS = {
    FORWARD: {"rows": 512, "part": 64},
    INPUT_GRADIENT: {"rows": 512, "part": 64},
    WEIGHT_GRADIENT: {"rows": 512, "part": 128, "inputs": 1024, "outputs": 1024},
}
_LARGE_UNITS = {
    FORWARD: {"rows": 512, "part": 128},
    INPUT_GRADIENT: {"rows": 512, "part": 256},
    WEIGHT_GRADIENT: {"rows": 512, "part": 256, "inputs": 1024, "outputs": 2048},
}
_LARGE_UNIT = 256
# Wider tiles of a matrix read the rows fewer times, but two cores must share the tiles.
_SMALL_UNITS_MATRIX_BYTES = 7 * _MIB
_LARGE_UNITS_MATRIX_BYTES = 14 * _MIB
COLUMNS = (512, 1024, 1792, 2048, 3584)


def choose(
    piece: str, given: Tiles | None, limits: Mapping[str, int], **shape: int
) -> dict[str, int]:
    """Returns tiles no larger than the arrays: those given, tabulated, or of the chip's rule.

    Rows are whole parts, and may be more than there are.

    Args:
      piece: one of the constants above.
      given: what the caller wants.
      limits: sizes of the arrays, named as the tiles along them.
      **shape: further sizes by which the table is searched.
    """
    chosen = given or tile_table.tiles(f"grouped_matmul_{piece}", **limits, **shape)
    if chosen is None:
        chosen = _by_rule(piece, limits, shape)
    part = min(chosen["part"], up_to_multiple(limits["rows"], BFLOAT16_ROWS))
    whole = {**limits, "rows": up_to_multiple(limits["rows"], part), "part": part}
    return {name: min(chosen[name], size) for name, size in whole.items()}


def _by_rule(piece: str, limits: Mapping[str, int], shape: Mapping[str, int]) -> dict[str, int]:
    """Returns the chip's rule, with tiles of a matrix as wide as it says, and what fits."""
    chip = tpu.facts(target_chip())
    large = chip.matrix_unit == _LARGE_UNIT
    tiles = dict((_LARGE_UNITS if large else _SMALL_UNITS)[piece])
    if piece == WEIGHT_GRADIENT:
        return tiles
    contracted, int4 = shape["contracted"], bool(shape["int4"])
    limit = _LARGE_UNITS_MATRIX_BYTES if large else _SMALL_UNITS_MATRIX_BYTES
    widths = [
        columns
        for columns in COLUMNS
        if limits["columns"] % columns == 0 and columns * contracted * _ITEM_BYTES <= limit
    ]
    tiles["columns"] = max(widths, default=COLUMNS[0])
    while vmem(tiles, contracted, int4) > chip.vmem_bytes:
        if tiles["rows"] > tiles["part"]:
            tiles["rows"] //= 2
        elif tiles["columns"] > LANES and not int4:
            tiles["columns"] //= 2  # scales of fewer than 512 inputs do not fill a vector
        else:
            break  # the compiler says by how much
    return tiles


def vmem(tiles: Tiles, contracted: int, int4: bool) -> int:
    """Bytes of blocks, two of each that is streamed, of a made matrix and of sums."""
    rows = tiles["rows"]
    if "columns" not in tiles:
        inputs, outputs = tiles["inputs"], tiles["outputs"]
        streamed = rows * (inputs + outputs) + inputs * outputs
        return 2 * _ITEM_BYTES * streamed + 2 * _SUM_BYTES * inputs * outputs
    matrix = contracted * tiles["columns"]
    streamed = rows * (contracted + tiles["columns"])
    product = tiles["part"] * tiles["columns"] * _SUM_BYTES
    # A packed matrix has less than a byte for each value in either block, and is made once.
    of_matrix = matrix * (2 + _ITEM_BYTES) if int4 else 2 * _ITEM_BYTES * matrix
    return 2 * _ITEM_BYTES * streamed + of_matrix + product
