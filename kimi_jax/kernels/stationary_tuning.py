"""What the tuning tool needs to know of products whose weight is made tile by tile."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels import stationary
from kimi_jax.kernels.int4_cases import Case
from kimi_jax.kernels.stationary import TRANSPOSED, Weight
from kimi_jax.kernels.tunable import Tiles, Tunable


def tunables(
    name: str,
    operands: Callable[[Case, Array], dict[str, Any]],
    weight: Callable[[Any], Weight],
) -> dict[str, Tunable]:
    """Returns the product with a weight, and that with its transpose, by their names.

    Args:
      name: the weight's.
      operands: of a case, with the rows `x` and `w`.
      weight: what is made from `w`; also from its shapes and dtypes.
    """
    return {
        name: _tunable(name, operands, weight, transposed=False),
        name + TRANSPOSED: _tunable(name + TRANSPOSED, operands, weight, transposed=True),
    }


def _tunable(
    name: str,
    operands: Callable[[Case, Array], dict[str, Any]],
    weight: Callable[[Any], Weight],
    transposed: bool,
) -> Tunable:
    def of_product(case: Case, key: Array) -> dict[str, Any]:
        given = operands(case, key)
        x = jnp.zeros((case.rows, case.outputs), given["x"].dtype) if transposed else given["x"]
        return given | {"x": x}

    def candidates(case: Case, chip: str) -> list[dict[str, int]]:
        given = jax.eval_shape(lambda: operands(case, jax.random.key(0)))
        shape = weight(given["w"]).product_shape(case.rows, transposed)
        return stationary.candidates(shape, chip)

    def frequencies(case: Case, chip: str, tiles: Tiles) -> dict[str, tuple[float, ...]]:
        del chip
        return {name: stationary.branch_shares(case.rows, stationary.Tiles(**tiles))}

    def run(given: dict[str, Any], tiles: Tiles) -> Array:
        return stationary.multiply(
            given["x"],
            weight(given["w"]),
            transposed=transposed,
            tiles=stationary.Tiles(**tiles),
            interpret=False,
        )

    return Tunable(
        shape=lambda case: {"rows": case.rows, "inputs": case.inputs, "outputs": case.outputs},
        operands=of_product,
        candidates=candidates,
        frequencies=frequencies,
        run=run,
    )
