import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.analysis import hlo
from kimi_jax.analysis.collectives import axes_of, collective, parse_groups

_MESH = {"data": 2, "expert": 4}


class GroupsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("{{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8], more", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0), more", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['data'=2,'expert'=4] {'expert'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['data'=2,'expert'=4] {'data'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['data'=2,'expert'=4] {'data','expert'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        # Of an axis of 8, the middle factor of 2: numbers that differ by 2.
        ("mesh['all'=8] {'all':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    )
    def test_every_form_of_groups_is_read(self, text, expected):
        np.testing.assert_array_equal(parse_groups(text, 8), expected)

    @parameterized.parameters(
        ([[0, 1, 2, 3], [4, 5, 6, 7]], ("expert",)),
        ([[0, 4], [1, 5]], ("data",)),
        ([[0, 1, 4, 5]], ("data", "expert")),
        ([[3], [4]], ()),
    )
    def test_axes_are_those_along_which_a_group_differs(self, groups, expected):
        self.assertEqual(axes_of(np.asarray(groups), _MESH), expected)


def _read(*lines: str):
    body = "".join(f"  {line}\n" for line in lines)
    module = hlo.parse(f"ENTRY %main () -> f32[] {{\n{body}}}\n")
    instructions = module.entry.instructions.values()
    return [collective(instruction, module.entry, _MESH, 8) for instruction in instructions]


class CollectiveTest(absltest.TestCase):
    def test_what_one_slice_sends_to_the_others_lies_along_the_slowest_axis(self):
        text = """ENTRY %main () -> f32[] {
  %x = f32[8]{0} parameter(0)
  %t = token[] after-all()
  %y = (f32[8]{0}, u32[]{:S(2)}, token[]) send(%x, %t), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
        module = hlo.parse(text)
        sent = collective(module.entry.instructions["y"], module.entry, _MESH, 4)
        self.assertEqual((sent.kind, sent.axes), ("all-reduce", ("data",)))
        self.assertEqual(sent.bytes, 2 * 0.5 * 32)

    def test_an_asynchronous_collective_counts_at_its_start_only(self):
        _, start, done = _read(
            "%x = bf16[8,16]{1,0:T(8,128)} parameter(0)",
            "%s = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%x), replica_groups="
            "[2,4]<=[8], dimensions={0}",
            "%d = bf16[32,16]{1,0} all-gather-done(%s)",
        )
        self.assertIsNone(done)
        self.assertEqual((start.kind, start.axes, start.bytes), ("all-gather", ("expert",), 768))

    def test_a_group_of_one_device_sends_nothing(self):
        _, alone = _read(
            "%x = f32[8]{0} parameter(0)",
            "%y = f32[8]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}",
        )
        self.assertIsNone(alone)

    def test_a_tuple_counts_all_its_arrays(self):
        _, _, both = _read(
            "%x = f32[8]{0} parameter(0)",
            "%y = bf16[8]{0} parameter(1)",
            "%z = (f32[8]{0}, bf16[8]{0}) all-reduce(%x, %y), replica_groups={{0,4},{1,5}}",
        )
        self.assertEqual((both.axes, both.bytes), (("data",), 2 * 0.5 * (32 + 16)))

    def test_a_permutation_lies_along_the_axis_that_it_shifts(self):
        _, shift = _read(
            "%x = f32[8]{0} parameter(0)",
            "%y = f32[8]{0} collective-permute(%x), source_target_pairs={{0,4},{4,0},{1,1}}",
        )
        self.assertEqual((shift.axes, shift.bytes), (("data",), 32))


if __name__ == "__main__":
    absltest.main()
