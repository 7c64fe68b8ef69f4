"""The shipped runs of Kimi K2, in closed form; kimi_k2_slow_test.py compiles them."""

import importlib
import math

from absl.testing import absltest, parameterized

from kimi_jax.analysis import costs, memory
from kimi_jax.configs import convert
from kimi_jax.configs.experiment import ExperimentConfig

_RUNS = (
    ("kimi_k2_pretrain_v5p", "v5p", 512),
    ("kimi_k2_pretrain_v6e", "v6e", 1024),
    ("kimi_k2_pretrain_tpu7x", "tpu7x", 512),
    ("kimi_k2_pretrain_h100", "h100", 1024),
    ("kimi_k2_qat_int4", "v5p", 512),
    ("kimi_k2_context_32k", "v5p", 512),
    ("kimi_k2_context_128k", "v5p", 512),
)


def _load(name):
    module = importlib.import_module(f"experiments.configs.{name}")
    return convert.from_mapping(ExperimentConfig, module.get_config())


class ShippedConfigsTest(parameterized.TestCase):
    @parameterized.parameters(*_RUNS)
    def test_the_run_fits_its_devices(self, name, chip, devices):
        config = _load(name)
        axes = config.parallel
        others = {axis: getattr(axes, axis) for axis in memory.CONFIGURED_AXES}
        sizes = memory.mesh_sizes(axes.data, axes.expert, **others)
        self.assertEqual(math.prod(sizes.values()), devices)
        peak = memory.peak(memory.estimate(config, sizes))
        self.assertLess(peak, 0.9 * costs.CHIPS[chip].memory_bytes)

    @parameterized.parameters(*_RUNS)
    def test_a_step_has_the_published_tokens_and_they_split_evenly(self, name, _, devices):
        config = _load(name)
        self.assertEqual(config.batch_tokens, 67_108_864)
        shards = devices // config.parallel.context * config.training.accumulation_steps
        self.assertEqual(config.training.batch_sequences % shards, 0)


if __name__ == "__main__":
    absltest.main()
