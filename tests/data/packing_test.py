import chex
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.data import packing

PAD = 999


def make_corpus(seed, lengths):
    """Returns stored tokens and offsets; every token of the corpus is different."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.random.default_rng(seed).permutation(int(offsets[-1])).astype(np.uint16)
    return tokens, offsets


def pack_slowly(tokens, offsets, order, length):
    """The oracle: documents one token at a time, in plain Python."""
    stream = []
    for place, document in enumerate(order):
        for k in range(offsets[document], offsets[document + 1]):
            stream.append((int(tokens[k]), place))
    rows = []
    for first in range(0, len(stream) - 1, length):
        row = {name: [] for name in ("inputs", "targets", "segments", "positions", "weights")}
        segment, position = 0, 0
        for k in range(first, first + length):
            if k + 1 >= len(stream):
                for name, fill in zip(row, (PAD, PAD, 0, 0, 0), strict=True):
                    row[name].append(fill)
                continue
            (token, document), (target, next_document) = stream[k], stream[k + 1]
            begins = k == first or document != stream[k - 1][1]
            segment, position = (segment + 1, 0) if begins else (segment, position + 1)
            row["inputs"].append(token)
            row["targets"].append(target)
            row["segments"].append(segment)
            row["positions"].append(position)
            row["weights"].append(float(document == next_document))
        rows.append(row)
    return rows


class PackRowTest(parameterized.TestCase):
    @parameterized.parameters(
        ([5, 3, 9, 2, 2, 2, 30], 8),
        ([17], 8),
        ([16], 8),
        ([3], 8),  # the only row is padded
        ([2, 2, 2, 2, 2], 3),
        ([40, 2, 41], 1),
        ([9, 8], 16),  # the stream fills one row exactly
    )
    def test_rows_equal_those_of_a_plain_loop_over_documents(self, lengths, length):
        tokens, offsets = make_corpus(0, lengths)
        order = packing.permutation(len(lengths), 3)
        stream = packing.arrange(tokens, offsets, order)
        expected = pack_slowly(tokens, offsets, order, length)
        self.assertLen(expected, packing.count_rows(len(tokens), length))
        for number, row in enumerate(expected):
            got = packing.pack_row(stream, number, length, PAD)
            chex.assert_trees_all_equal(got, {name: np.array(row[name]) for name in row})
            self.assertEqual(got["inputs"].dtype, np.int32)
            self.assertEqual(got["weights"].dtype, np.float32)

    def test_every_token_but_the_first_of_each_document_is_predicted_once(self):
        lengths = np.random.default_rng(1).integers(2, 30, 50)
        tokens, offsets = make_corpus(1, lengths)
        stream = packing.arrange(tokens, offsets, packing.permutation(50, 7))
        rows = [
            packing.pack_row(stream, r, 16, PAD) for r in range(packing.count_rows(len(tokens), 16))
        ]
        predicted = np.concatenate([row["targets"][row["weights"] > 0] for row in rows])
        first = set(tokens[offsets[:-1]].tolist())
        self.assertCountEqual(predicted.tolist(), set(tokens.tolist()) - first)

    def test_segments_positions_and_weights_tell_the_same_documents(self):
        lengths = np.random.default_rng(2).integers(2, 12, 80)
        tokens, offsets = make_corpus(2, lengths)
        owner = np.empty(len(tokens), int)
        owner[tokens] = np.repeat(np.arange(80), lengths)
        stream = packing.arrange(tokens, offsets, packing.permutation(80, 1))
        for number in range(packing.count_rows(len(tokens), 32)):
            row = packing.pack_row(stream, number, 32, PAD)
            real = row["segments"] > 0
            same_segment = row["segments"][real][:, None] == row["segments"][real][None]
            documents = owner[row["inputs"][real]]
            np.testing.assert_array_equal(same_segment, documents[:, None] == documents[None])
            np.testing.assert_array_equal(
                row["weights"][real], documents == owner[row["targets"][real]]
            )
            starts = np.diff(row["segments"], prepend=0) > 0
            np.testing.assert_array_equal(starts[real], row["positions"][real] == 0)
            self.assertFalse(row["weights"][~real].any())


class PermutationTest(absltest.TestCase):
    def test_every_number_appears_once(self):
        np.testing.assert_array_equal(np.sort(packing.permutation(1000, 4)), np.arange(1000))

    def test_order_depends_on_every_seed(self):
        orders = [packing.permutation(100, *seeds) for seeds in ((0, 1), (1, 0), (0, 2), (0,))]
        for i, first in enumerate(orders):
            for second in orders[i + 1 :]:
                self.assertTrue((first != second).any())

    def test_order_stays_the_same_for_ever(self):
        # By hand from SplitMix64; a change here would reorder every run.
        def mix(z):
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
            return z ^ (z >> 31)

        gamma = 0x9E3779B97F4A7C15
        state = mix((gamma + 5) % 2**64)
        keys = [mix((state + k * gamma) % 2**64) for k in range(1, 21)]
        expected = sorted(range(20), key=keys.__getitem__)
        self.assertEqual(packing.permutation(20, 5).tolist(), expected)

    def test_shuffles_well(self):
        order = packing.permutation(10_000, 0)
        self.assertLess(abs(np.corrcoef(order, np.arange(10_000))[0, 1]), 0.05)


if __name__ == "__main__":
    absltest.main()
