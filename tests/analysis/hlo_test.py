from absl.testing import absltest

from kimi_jax.analysis import hlo

# A few lines as the TPU compiler writes them.
_TEXT = """
HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "step.py"

%fused.1 (p.0: bf16[4,8,16], p.1: s32[]) -> bf16[8,16] {
  %p.0 = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %slice.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,8,16}
}

ENTRY %main.2 (stack: bf16[4,8,16], n: s32[]) -> bf16[8,16] {
  %stack = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="state.params.w"}
  %n = s32[]{:T(128)} parameter(1)
  %pair = (bf16[4,8,16]{2,1,0:T(8,128)(2,1)}, /*index=1*/s32[]{:T(128)}) tuple(%stack, %n)
  ROOT %fusion.3 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} fusion(%stack, %n), kind=kLoop, calls=%fused.1, metadata={op_name="jit(step)/model/block/slice" stack_frame_id=7}, backend_config={"flag_configs":[]}
}
"""  # noqa: E501


class HloTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.module = hlo.parse(_TEXT)

    def test_computations_and_instructions_are_found_by_name(self):
        self.assertEqual(list(self.module.computations), ["fused.1", "main.2"])
        self.assertEqual(self.module.entry.name, "main.2")
        self.assertEqual(list(self.module.entry.instructions), ["stack", "n", "pair", "fusion.3"])
        self.assertEqual(self.module.entry.root.name, "fusion.3")

    def test_an_instruction_knows_what_it_calls_reads_and_comes_from(self):
        fusion = self.module.entry.instructions["fusion.3"]
        self.assertEqual(fusion.opcode, "fusion")
        self.assertEqual(fusion.operands, ("stack", "n"))
        self.assertEqual(fusion.called, ("fused.1",))
        self.assertEqual(fusion.operation_name, "jit(step)/model/block/slice")
        users = self.module.entry.users["n"]
        self.assertEqual([user.name for user in users], ["pair", "fusion.3"])

    def test_memory_on_the_chip_is_no_main_memory(self):
        fusion = self.module.entry.instructions["fusion.3"]
        self.assertEqual(fusion.arrays[0].bytes, 8 * 16 * 2)
        self.assertEqual(fusion.arrays[0].main_memory_bytes, 0)
        self.assertEqual(self.module.entry.instructions["stack"].arrays[0].main_memory_bytes, 1024)

    def test_tuples_have_several_arrays(self):
        pair = self.module.entry.instructions["pair"]
        self.assertEqual([array.dims for array in pair.arrays], [(4, 8, 16), ()])

    def test_small_types_take_parts_of_a_byte(self):
        (codes, scales, keys) = hlo.parse_arrays("(s4[3,5]{1,0}, f8e4m3fn[7]{0}, token[])")
        self.assertEqual([codes.bytes, scales.bytes, keys.bytes], [8, 7, 0])

    def test_text_that_is_no_program_is_refused(self):
        with self.assertRaisesRegex(ValueError, "ENTRY"):
            hlo.parse("HloModule empty")


if __name__ == "__main__":
    absltest.main()
