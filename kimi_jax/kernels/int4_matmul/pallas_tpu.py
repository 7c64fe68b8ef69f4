"""The product with INT4 weights on TPUs: codes are unpacked and scaled in VMEM, once.

Grid, blocks and invariant: `kernels.stationary`. Bytes: 4.5 bits for a weight, with its share of a
scale. A word of eight codes is reinterpreted as int4 values, which the chip converts four times
faster than a program of shifts does.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kimi_jax.core.platform import target_chip
from kimi_jax.kernels import stationary, tpu
from kimi_jax.kernels.int4_matmul import cases
from kimi_jax.kernels.int4_matmul.cases import Case
from kimi_jax.kernels.stationary import Shape, Tiles
from kimi_jax.kernels.tpu import LANES, up_to_multiple
from kimi_jax.kernels.tunable import Tunable
from kimi_jax.quantization.int4 import CODES_PER_WORD, Int4Weight

# Eight nibbles of 8, which stand for zeros; as a mask, they turn code + 8 into two's complement.
_ZEROS = -0x77777778
# Rows of a weight that fill whole vectors of words and, for groups of up to 32, of scales.
_INPUTS = 256


def int4_matmul(
    x: Float[Array, "W K"],
    w: Int4Weight,
    *,
    tiles: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> Float[Array, "W N"]:
    """Computes what the package's `int4_matmul` describes.

    Args:
      x: activations.
      w: one matrix.
      tiles: rows and outputs of a tile; otherwise the chip's table or a rule says.
      interpret: runs on any platform, slowly.
    """
    return _int4_matmul(x, w, None if tiles is None else Tiles(**tiles), interpret)


def int4_matmul_transposed(
    d_y: Float[Array, "W N"],
    w: Int4Weight,
    *,
    tiles: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> Float[Array, "W K"]:
    """Returns d_y dequantize(w)^T, the gradient of x; a tile's `outputs` are rows of w."""
    given = None if tiles is None else Tiles(**tiles)
    return _product(d_y, w, transposed=True, tiles=given, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _int4_matmul(x: Array, w: Int4Weight, tiles: Tiles | None, interpret: bool) -> Array:
    return _product(x, w, transposed=False, tiles=tiles, interpret=interpret)


def _forward(x: Array, w: Int4Weight, tiles: Tiles | None, interpret: bool):
    return _int4_matmul(x, w, tiles, interpret), w


def _backward(tiles: Tiles | None, interpret: bool, w: Int4Weight, d_y: Array):
    del tiles  # of the forward product
    return _product(d_y, w, transposed=True, tiles=None, interpret=interpret), None


_int4_matmul.defvjp(_forward, _backward)


def _shape(rows: int, contracted: int, outputs: int) -> Shape:
    return Shape(rows, contracted, outputs, stored_bytes=contracted * 9 // 16)


def _product(
    x: Array, w: Int4Weight, *, transposed: bool, tiles: Tiles | None, interpret: bool
) -> Array:
    """Pads everything to whole tiles, multiplies, and cuts the result."""
    inputs, outputs = w.shape
    name = "int4_matmul_transposed" if transposed else "int4_matmul"
    sizes = {"rows": x.shape[0], "inputs": inputs, "outputs": outputs}
    inputs = up_to_multiple(inputs, max(_INPUTS, w.group_size))
    outputs = up_to_multiple(outputs, LANES)
    contracted, results = (outputs, inputs) if transposed else (inputs, outputs)
    if tiles is None:
        tiles = stationary.choose(name, sizes, _shape(x.shape[0], contracted, results))
    rows = up_to_multiple(x.shape[0], tiles.rows)
    y = stationary.product(
        stationary.pad(x, rows, contracted),
        (
            stationary.pad(w.codes, inputs // CODES_PER_WORD, outputs, _ZEROS),
            stationary.pad(w.scales, inputs // w.group_size, outputs),
        ),
        functools.partial(_dequantize, group_size=w.group_size, dtype=x.dtype),
        outputs=results,
        transposed=transposed,
        tiles=tiles,
        name=name,
        interpret=interpret,
    )
    return y[: x.shape[0], : sizes["inputs" if transposed else "outputs"]]


def _dequantize(words: Array, scales: Array, *, group_size: int, dtype) -> Array:
    """Returns code * scale; products of two bfloat16 numbers round once in either format."""
    in_bfloat16 = dtype == jnp.bfloat16 and tpu.facts(target_chip()).bfloat16_vectors
    compute = jnp.bfloat16 if in_bfloat16 else jnp.float32
    codes = pltpu.bitcast(words ^ jnp.int32(_ZEROS), jnp.int4).astype(compute)
    groups = codes.reshape(scales.shape[0], group_size, words.shape[1])
    values = groups * scales.astype(compute)[:, None]
    return values.reshape(codes.shape).astype(dtype)


def _tunable(transposed: bool) -> Tunable:
    kernel = int4_matmul_transposed if transposed else int4_matmul

    def operands(case: Case, key: Array) -> dict:
        given = cases.operands(case, key)
        x = jnp.zeros((case.rows, case.outputs), given["x"].dtype) if transposed else given["x"]
        return given | {"x": x}

    def candidates(case: Case, chip: str) -> list[dict[str, int]]:
        ends = (case.inputs, case.outputs)
        contracted, outputs = reversed(ends) if transposed else ends
        return stationary.candidates(_shape(case.rows, contracted, outputs), chip)

    def frequencies(case: Case, chip: str, tiles: Mapping[str, int]) -> dict:
        return {kernel.__name__: stationary.branch_shares(case.rows, Tiles(**tiles))}

    return Tunable(
        shape=lambda case: {"rows": case.rows, "inputs": case.inputs, "outputs": case.outputs},
        operands=operands,
        candidates=candidates,
        frequencies=frequencies,
        run=lambda operands, tiles: kernel(operands["x"], operands["w"], tiles=tiles),
    )


TUNABLE = {"int4_matmul": _tunable(False), "int4_matmul_transposed": _tunable(True)}
