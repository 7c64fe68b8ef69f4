import functools

from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.core.param_spec import (
    EMBEDDING,
    HEAD,
    ROUTED_EXPERT,
    SELECTION_BIAS,
    count_parameters,
    named_specs,
)
from kimi_jax.model import transformer

_BILLION = 1e9


@functools.cache
def _plan(preset):
    return transformer.specs(preset())


def _count(preset, tag):
    return sum(spec.size for _, spec in named_specs(_plan(preset)) if tag in spec.tags)


def _active(preset):
    """Parameters that one token meets."""
    config, routed = preset(), _count(preset, ROUTED_EXPERT)
    resting = config.num_routed_experts - config.experts_per_token
    return count_parameters(_plan(preset)) - routed * resting // config.num_routed_experts


class ParameterCountTest(parameterized.TestCase):
    def test_k2_has_as_many_parameters_as_the_released_checkpoint(self):
        # The sum over the checkpoint's 139,644 tensors, without scales and stray buffers.
        self.assertEqual(count_parameters(_plan(presets.kimi_k2)), 1_026_408_232_448)

    def test_k2_has_one_selection_bias_for_every_routed_expert(self):
        self.assertEqual(_count(presets.kimi_k2, SELECTION_BIAS), 60 * 384)

    def test_k2_keeps_most_parameters_in_routed_experts(self):
        self.assertEqual(_count(presets.kimi_k2, ROUTED_EXPERT), 60 * 384 * 3 * 7168 * 2048)

    def test_k2_uses_33_billion_parameters_for_a_token(self):
        active = _active(presets.kimi_k2)
        embedding, head = (_count(presets.kimi_k2, tag) for tag in (EMBEDDING, HEAD))
        self.assertEqual(round(active / _BILLION, 2), 32.86)
        self.assertEqual(round((active - embedding) / _BILLION, 2), 31.69)
        self.assertEqual(round((active - embedding - head) / _BILLION, 2), 30.51)

    def test_moonlight_has_the_parameters_its_report_counts(self):
        # arXiv 2502.16982 leaves embedding and head out: 15.29 B, of which 2.24 B are active.
        ends = sum(_count(presets.moonlight_16b, tag) for tag in (EMBEDDING, HEAD))
        total = count_parameters(_plan(presets.moonlight_16b)) - ends
        self.assertEqual(round(total / _BILLION, 2), 15.29)
        self.assertEqual(round((_active(presets.moonlight_16b) - ends) / _BILLION, 2), 2.24)

    def test_deepseek_v3_has_671_billion_parameters_of_which_37_are_active(self):
        # arXiv 2412.19437, section 4.2. Its 37 B do not count the embedding's rows.
        self.assertEqual(round(count_parameters(_plan(presets.deepseek_v3)) / _BILLION), 671)
        active = _active(presets.deepseek_v3) - _count(presets.deepseek_v3, EMBEDDING)
        self.assertEqual(round(active / _BILLION), 37)


if __name__ == "__main__":
    absltest.main()
