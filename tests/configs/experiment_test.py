from absl.testing import absltest, parameterized

from kimi_jax.core.errors import ConfigError
from tests.support import tiny


class ExperimentConfigTest(parameterized.TestCase):
    def test_rows_longer_than_the_model_can_count_are_refused(self):
        with self.assertRaisesRegex(
            ConfigError, r"data.sequence_length \(65\) exceeds model.max_position \(64\)"
        ):
            tiny.experiment(data={"sequence_length": 65})
        tiny.experiment(data={"sequence_length": 64})

    def test_a_batch_has_sequences_times_length_tokens(self):
        self.assertEqual(tiny.experiment().batch_tokens, tiny.NUM_ROWS * tiny.LENGTH)

    @parameterized.parameters(
        (
            {"context": 3},
            r"parallel.context \(3\) must divide data.sequence_length \(32\), which it splits; 1 "
            "would fit, or a multiple of 3 in data.sequence_length",
        ),
        (
            {"context": 2, "tensor": 2},
            r"parallel.context \(2\) \* parallel.tensor \(2\) must divide model.num_heads \(2\)",
        ),
        ({"tensor": 4}, "model.num_heads"),
        (
            {"pipe": 3},
            r"parallel.pipe \(3\) must divide the number of mixture blocks \(2\), which it splits",
        ),
    )
    def test_axes_that_do_not_divide_what_they_split_are_refused(self, axes, message):
        with self.assertRaisesRegex(ConfigError, message):
            tiny.experiment(parallel=axes)

    @parameterized.parameters("vocab_size", "dense_ffn_dim", "expert_ffn_dim")
    def test_the_tensor_axis_divides_each_width_it_splits(self, width):
        message = rf"parallel.tensor \(2\) must divide model.{width} \(7\).* 1 would fit"
        with self.assertRaisesRegex(ConfigError, message):
            tiny.experiment(parallel={"tensor": 2}, model={width: 7})
        tiny.experiment(model={width: 7})


if __name__ == "__main__":
    absltest.main()
