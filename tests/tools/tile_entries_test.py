import json

from absl.testing import absltest

from tools import tile_entries


def _entry(microseconds, block=1, kernel="op", rows=64):
    return {
        "kernel": kernel,
        "shape": {"rows": rows},
        "tiles": {"block": block},
        "microseconds": microseconds,
        "how": "schedule",
    }


class MergeTest(absltest.TestCase):
    def test_an_entry_that_is_as_fast_stays_unless_it_is_to_be_replaced(self):
        table = [_entry(10.0, block=1)]
        for microseconds in (10.0, 11.0):
            found = [_entry(microseconds, block=2)]
            self.assertEqual(tile_entries.merge(table, found, replace=False), table)
            self.assertEqual(tile_entries.merge(table, found, replace=True), found)

    def test_a_faster_entry_replaces_that_of_its_shape_alone(self):
        table = [_entry(10.0, rows=16), _entry(10.0), _entry(10.0, kernel="other")]
        faster = _entry(9.0, block=2)
        merged = tile_entries.merge(table, [faster], replace=False)
        self.assertCountEqual(merged, [table[0], faster, table[2]])

    def test_a_table_is_written_in_one_order_with_a_line_for_each_entry(self):
        entries = [_entry(1.0), _entry(2.0, rows=32)]
        first, second = (
            tile_entries.to_text(tile_entries.merge([], found, replace=False))
            for found in (entries, entries[::-1])
        )
        self.assertEqual(first, second)
        self.assertCountEqual(json.loads(first), entries)
        self.assertLen(first.splitlines(), 4)


if __name__ == "__main__":
    absltest.main()
