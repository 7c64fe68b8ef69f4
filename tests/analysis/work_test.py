from absl.testing import absltest, parameterized

from kimi_jax.analysis import hlo, work

_FUSED = """
%sliced (p0: f32[60,128,128], p1: s32[]) -> f32[1,128,128] {
  %p0 = f32[60,128,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %ds = f32[1,128,128]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,128,128}
}

%updated (q0: f32[60,128,128], q1: f32[1,128,128], q2: s32[]) -> f32[60,128,128] {
  %q0 = f32[60,128,128]{2,1,0} parameter(0)
  %q1 = f32[1,128,128]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %dus = f32[60,128,128]{2,1,0} dynamic-update-slice(%q0, %q1, %q2)
}

"""


def _entry(*lines: str) -> tuple[hlo.Instruction, hlo.Computation, hlo.Module]:
    """Reads a program of these lines, the last of which is meant."""
    body = "".join(f"  {line}\n" for line in lines)
    module = hlo.parse(f"{_FUSED}ENTRY %main () -> f32[] {{\n{body}}}\n")
    return list(module.entry.instructions.values())[-1], module.entry, module


class FlopsTest(parameterized.TestCase):
    # Products as the TPU compiler writes them: the last has a batch of 16 as a window that is
    # stretched so far that each position reads one matrix.
    @parameterized.parameters(
        ("f32[32,64]", "f32[64,48]", "f32[32,48]", "dim_labels=bf_io->bf", 2 * 32 * 64 * 48),
        ("f32[32,64]", "f32[64,48]", "f32[48,32]", "dim_labels=bf_io->fb", 2 * 32 * 64 * 48),
        ("f32[64,32]", "f32[48,64]", "f32[32,48]", "dim_labels=fb_oi->bf", 2 * 32 * 64 * 48),
        (
            "f32[16,32,64]",
            "f32[16,64,48]",
            "f32[16,32,48]",
            "window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf",
            16 * 2 * 32 * 64 * 48,
        ),
        (  # a contraction over heads as a window
            "f32[4,32,64]",
            "f32[4,64,48]",
            "f32[1,32,48]",
            "window={size=4}, dim_labels=0bf_0io->0bf",
            4 * 2 * 32 * 64 * 48,
        ),
        (  # an ordinary convolution: of three positions, the border has two
            "f32[2,5,8]",
            "f32[3,8,7]",
            "f32[2,5,7]",
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * 2 * 8 * 7 * (2 + 3 + 3 + 3 + 2),
        ),
    )
    def test_convolutions_count_products_with_data_only(self, left, right, out, how, expected):
        instruction, computation, _ = _entry(
            f"%a = {left}{{1,0}} parameter(0)",
            f"%b = {right}{{1,0}} parameter(1)",
            f"ROOT %c = {out}{{1,0}} convolution(%a, %b), {how}",
        )
        self.assertEqual(work.flops(instruction, computation), expected)

    def test_ragged_products_count_each_row_once(self):
        rows = (
            "%a = bf16[100,64]{1,0} parameter(0)",
            "%s = s32[5]{0} parameter(2)",
        )
        forward, computation, _ = _entry(
            *rows,
            "%b = bf16[5,64,48]{2,1,0} parameter(1)",
            "ROOT %c = bf16[100,48]{1,0} ragged-dot(%a, %b, %s), lhs_contracting_dims={1}, "
            "rhs_contracting_dims={1}, lhs_ragged_dims={0}, rhs_group_dims={0}",
        )
        self.assertEqual(work.flops(forward, computation), 2 * 100 * 64 * 48)
        weights, computation, _ = _entry(
            *rows,
            "%b = bf16[100,48]{1,0} parameter(1)",
            "ROOT %c = bf16[5,64,48]{2,1,0} ragged-dot(%a, %b, %s), lhs_contracting_dims={0}, "
            "rhs_contracting_dims={0}, lhs_ragged_dims={0}",
        )
        self.assertEqual(work.flops(weights, computation), 2 * 100 * 64 * 48)

    @parameterized.parameters(
        ('custom_call_target="tpu_custom_call"', None),
        ('custom_call_target="AllocateBuffer"', 0.0),
        (
            'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":'
            '"TUz","cost_estimate":{"flops":"1234","transcendentals":"5"}}}',
            1234.0,
        ),
        (
            'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            2.0 * 32 * 64 * 48,
        ),
    )
    def test_custom_calls_cost_what_is_stated_or_are_unknown(self, attributes, expected):
        instruction, computation, _ = _entry(
            "%a = f32[32,64]{1,0} parameter(0)",
            "%b = f32[64,48]{1,0} parameter(1)",
            f"ROOT %c = f32[32,48]{{1,0}} custom-call(%a, %b), {attributes}",
        )
        self.assertEqual(work.flops(instruction, computation), expected)


class IntegerCallTest(absltest.TestCase):
    def test_a_custom_call_that_makes_integers_is_no_product(self):
        instruction, computation, _ = _entry(
            "%sizes = s32[8]{0} parameter(0)",
            "ROOT %c = (s32[9]{0}, s32[71]{0}) custom-call(%sizes), "
            'custom_call_target="tpu_custom_call"',
        )
        self.assertEqual(work.flops(instruction, computation), 0.0)


class BytesTest(parameterized.TestCase):
    @parameterized.parameters(
        ("%x = f32[1,128,128]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%sliced", 2),
        ("%x = f32[60,128,128]{2,1,0} fusion(%stack, %one, %i), kind=kLoop, calls=%updated", 2),
        ("%x = f32[1,128,128]{2,1,0} copy(%one)", 2),
        ("%x = f32[1,128,128]{2,1,0:S(1)} copy(%one)", 1),
        ("%x = f32[1,128,128]{2,1,0:S(1)} copy(%near)", 0),
        ("%x = (f32[1,128,128]{2,1,0:S(1)}, f32[1,128,128], u32[]{:S(2)}) copy-start(%one)", 1),
        ("%x = (f32[1,128,128], f32[1,128,128]{2,1,0:S(1)}, u32[]{:S(2)}) copy-start(%near)", 1),
        ("%x = f32[128,128]{1,0} bitcast(%one)", 0),
        ("%x = f32[60,128,128]{2,1,0} negate(%stack)", 120),
    )
    def test_only_what_moves_to_or_from_the_main_memory_counts(self, line, layers):
        instruction, computation, module = _entry(
            "%stack = f32[60,128,128]{2,1,0} parameter(0)",
            "%one = f32[1,128,128]{2,1,0} parameter(1)",
            "%near = f32[1,128,128]{2,1,0:S(1)} parameter(2)",
            "%i = s32[]{:S(6)} parameter(3)",
            line,
        )
        moved = work.main_memory_bytes(instruction, computation, module)
        self.assertEqual(moved, layers * 128 * 128 * 4)


if __name__ == "__main__":
    absltest.main()
