from unittest import mock

from absl.testing import absltest

from kimi_jax.model import accounting
from kimi_jax.training import throughput
from tests.support import tiny

PEAK = 1e9


class ThroughputTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(throughput, "measure_matmul_peak", lambda dtype: PEAK))
        self.clock = self.enterContext(mock.patch.object(throughput.time, "perf_counter"))
        self.clock.return_value = 0.0
        self.config = tiny.experiment()
        self.throughput = throughput.Throughput(self.config)

    def _tick(self, now, steps_left=10):
        self.clock.return_value = now
        return self.throughput.tick(steps_left)

    def test_rates_are_work_over_time(self):
        metrics = self._tick(2.0)
        tokens = tiny.NUM_ROWS * tiny.LENGTH
        flops = accounting.train_flops_per_step(tiny.MODEL, tiny.NUM_ROWS, tiny.LENGTH)
        self.assertEqual(metrics["throughput/step_seconds"], 2.0)
        self.assertEqual(metrics["throughput/tokens_per_second"], tokens / 2.0)
        self.assertEqual(metrics["throughput/model_flops_per_second"], flops / 2.0)
        self.assertEqual(metrics["throughput/share_of_peak"], flops / 2.0 / PEAK)
        self.assertGreater(metrics["memory/bytes_in_use"], 0)

    def test_work_outside_the_step_does_not_count(self):
        self._tick(1.0)
        self.clock.return_value = 50.0
        self.throughput.restart()
        self.assertEqual(self._tick(51.0)["throughput/step_seconds"], 1.0)

    def test_time_left_forgets_the_compilation_of_the_first_step(self):
        self.assertEqual(self._tick(60.0)["time/seconds_left"], 600.0)
        self.assertEqual(self._tick(61.0)["time/seconds_left"], 10.0)
        self.assertEqual(self._tick(62.0, steps_left=0)["time/seconds_left"], 0.0)


if __name__ == "__main__":
    absltest.main()
