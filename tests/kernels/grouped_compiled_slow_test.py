"""The TPU's grouped products at Kimi K2's shapes, compiled for chips that are not there."""

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import ResidualFormat
from kimi_jax.kernels.grouped_matmul import cases, pallas_tpu, tpu_tiles
from kimi_jax.kernels.grouped_swiglu import cases as swiglu_cases
from kimi_jax.kernels.grouped_swiglu import grouped_swiglu
from kimi_jax.quantization import int4
from kimi_jax.quantization.fake_quant import FakeQuantized
from tests.support.compile_kernel import TPU_CHIPS, compile_kernel, shapes

pytestmark = pytest.mark.slow

_K2 = list(cases.KIMI_K2)


def _operands(case):
    operands = shapes(cases, case)
    return operands["x"], operands["w"], operands["group_sizes"]


class GroupedCompiledSlowTest(parameterized.TestCase):
    @parameterized.product(chip=TPU_CHIPS, name=_K2)
    def test_every_piece_compiles_and_says_what_it_costs(self, chip, name):
        case = cases.KIMI_K2[name]
        x, w, sizes = _operands(case)
        d_y = jax.ShapeDtypeStruct((case.rows, case.outputs), x.dtype)
        pieces = {
            pallas_tpu.forward: (x, w, sizes),
            pallas_tpu.input_gradient: (d_y, w, sizes),
        }
        if not case.int4:  # the gradient of a weight does not see its format
            pieces[pallas_tpu.weight_gradient] = (x, d_y, sizes)
        for piece, operands in pieces.items():
            with self.subTest(piece.__name__):
                compiled = compile_kernel(self, chip, piece, *operands)
                products = 2 * case.rows * case.inputs * case.outputs
                self.assertEqual(compiled.cost_analysis()["flops"] // products, 1)
                # No copy of rows or matrices is made; the list of visits is small.
                self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 2**20)

    @parameterized.parameters(*TPU_CHIPS)
    def test_odd_sizes_compile(self, chip):
        for case in (*cases.TOY.values(), *cases.TOY_INT4.values()):
            x, w, sizes = _operands(case)
            d_y = jax.ShapeDtypeStruct((case.rows, case.outputs), x.dtype)
            compile_kernel(self, chip, pallas_tpu.forward, x, w, sizes)
            compile_kernel(self, chip, pallas_tpu.input_gradient, d_y, w, sizes)
            compile_kernel(self, chip, pallas_tpu.weight_gradient, x, d_y, sizes)

    @parameterized.parameters(*TPU_CHIPS)
    def test_experts_in_training_stay_packed(self, chip):
        case = swiglu_cases.KIMI_K2
        up, down = (case.experts, case.embed, case.inner), (case.experts, case.inner, case.embed)
        w_up, w_down = (
            jax.eval_shape(int4.quantize, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
            for shape in (up, down)
        )
        x = jax.ShapeDtypeStruct((case.tokens, case.embed), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((case.tokens, case.per_token), jnp.int32)
        share = jax.ShapeDtypeStruct((case.tokens, case.per_token), jnp.float32)

        def step(x, carriers, packed, ids, share, d_y):
            def run(x, carriers, share):
                matrices = map(FakeQuantized, carriers, packed)
                return grouped_swiglu(x, *matrices, ids, share, residuals=ResidualFormat.FP8)

            return jax.vjp(run, x, carriers, share)[1](d_y)

        packed = [w_up, w_up, w_down]
        carriers = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (up, up, down)]
        compiled = compile_kernel(self, chip, step, x, carriers, packed, ids, share, x)
        text = compiled.as_text()
        for piece in (tpu_tiles.FORWARD, tpu_tiles.INPUT_GRADIENT, tpu_tiles.WEIGHT_GRADIENT):
            self.assertIn(f"grouped_matmul_{piece}", text)
        self.assertNotIn("ragged-dot", text)
        # The carriers are never read, and no matrix is unpacked in main memory.
        unpacked = f"bf16[{case.experts},{case.embed},{case.inner}]"
        made = [line for line in text.splitlines() if f"= {unpacked}" in line]
        self.assertLen([m for m in made if "custom-call" in m], 2)


if __name__ == "__main__":
    absltest.main()
