import dataclasses

from absl.testing import absltest, parameterized

from kimi_jax.configs.optimizer import OptimizerConfig, OptimizerName, ScheduleConfig
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.configs.training import TrainingConfig
from kimi_jax.core.errors import ConfigError

_OPTIMIZER = OptimizerConfig(schedule=ScheduleConfig(peak=1e-3))


class OptimizerConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(momentum=1.0), r"optimizer.momentum must be in \[0, 1\)"),
        (dict(adam_b2=-0.1), r"optimizer.adam_b2 must be in \[0, 1\)"),
        (dict(weight_decay=-1.0), "optimizer.weight_decay must not be negative"),
        (dict(newton_schulz_steps=0), "optimizer.newton_schulz_steps must be greater than 0"),
        (dict(qk_clip_threshold=0.0), "optimizer.qk_clip_threshold must be greater than 0"),
        (dict(offload_state=True, name=OptimizerName.ADAMW), "offload_state moves Muon's momentum"),
    )
    def test_an_impossible_value_is_named(self, change, message):
        with self.assertRaisesRegex(ConfigError, message):
            dataclasses.replace(_OPTIMIZER, **change)

    def test_k2s_values_are_the_defaults(self):
        self.assertEqual(_OPTIMIZER.qk_clip_threshold, 100.0)
        self.assertEqual(_OPTIMIZER.weight_decay, 0.1)
        self.assertEqual(_OPTIMIZER.update_rms, 0.2)

    @parameterized.parameters(
        (dict(peak=0.0), "optimizer.schedule.peak must be greater than 0"),
        (dict(peak=1e-3, warmup_steps=-1), "optimizer.schedule.warmup_steps must not be negative"),
        (dict(peak=1e-3, stable_steps=-1), "optimizer.schedule.stable_steps must not be negative"),
    )
    def test_an_impossible_schedule_is_named(self, values, message):
        with self.assertRaisesRegex(ConfigError, message):
            ScheduleConfig(**values)


class OtherConfigsTest(absltest.TestCase):
    def test_mesh_axes_are_positive(self):
        with self.assertRaisesRegex(ConfigError, "parallel.expert must be greater than 0, got -1"):
            ParallelConfig(expert=-1)

    def test_a_batch_splits_into_its_micro_batches(self):
        with self.assertRaisesRegex(ConfigError, r"training.batch_sequences \(6\) must be a mult"):
            TrainingConfig(num_steps=1, batch_sequences=6, accumulation_steps=4)


if __name__ == "__main__":
    absltest.main()
