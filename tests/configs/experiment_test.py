from absl.testing import absltest

from kimi_jax.core.errors import ConfigError
from tests.support import tiny


class ExperimentConfigTest(absltest.TestCase):
    def test_rows_longer_than_the_model_can_count_are_refused(self):
        with self.assertRaisesRegex(
            ConfigError, r"data.sequence_length \(65\) exceeds model.max_position \(64\)"
        ):
            tiny.experiment(data={"sequence_length": 65})
        tiny.experiment(data={"sequence_length": 64})

    def test_a_batch_has_sequences_times_length_tokens(self):
        self.assertEqual(tiny.experiment().batch_tokens, tiny.NUM_ROWS * tiny.LENGTH)


if __name__ == "__main__":
    absltest.main()
