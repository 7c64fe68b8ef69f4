import dataclasses

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.configs import presets
from kimi_jax.configs.model import YarnConfig
from kimi_jax.model import rope

_K2 = presets.kimi_k2()
_NATIVE = dataclasses.replace(_K2, yarn=None)


def _rotated_score(config, q, k, position_q, position_k):
    """The product of one rotated query and key."""
    rotated = []
    for x, position in ((q, position_q), (k, position_k)):
        cos, sin = rope.cos_sin(config, jnp.array([[position]]))
        rotated.append(np.asarray(rope.rotate(jnp.float32(x)[None, None], cos, sin))[0, 0])
    return rotated[0] @ rotated[1]


class RopeTest(absltest.TestCase):
    def test_published_scales(self):
        # kimi_k2's softmax scales without YaRN, with factor 32 and with factor 64.
        self.assertAlmostEqual(rope.attention_scale(_NATIVE), 0.0721688, places=7)
        self.assertAlmostEqual(rope.attention_scale(_K2), 0.1308608, places=7)
        longer = dataclasses.replace(_K2.yarn, factor=64.0)
        scale = rope.attention_scale(dataclasses.replace(_K2, yarn=longer))
        self.assertAlmostEqual(scale, 0.1446796, places=7)

    def test_k2s_yarn_is_a_step_between_the_20th_and_the_21st_frequency(self):
        ratio = rope.inverse_frequencies(_NATIVE) / rope.inverse_frequencies(_K2)
        np.testing.assert_allclose(ratio[:20], 1.0)
        np.testing.assert_allclose(ratio[20:], 32.0)

    def test_the_common_default_of_beta_fast_would_be_a_ramp(self):
        default = dataclasses.replace(_K2.yarn, beta_fast=32.0)
        config = dataclasses.replace(_K2, yarn=default)
        ratio = rope.inverse_frequencies(_NATIVE) / rope.inverse_frequencies(config)
        np.testing.assert_allclose(ratio[:9], 1.0)
        np.testing.assert_allclose(ratio[20:], 32.0)
        self.assertTrue(np.all(np.diff(ratio[8:21]) > 0))

    def test_equal_low_and_high_do_not_divide_by_zero(self):
        tight = YarnConfig(factor=4.0, original_max_position=1, beta_fast=1.0, beta_slow=1.0)
        config = dataclasses.replace(_K2, yarn=tight)
        self.assertTrue(np.all(np.isfinite(rope.inverse_frequencies(config))))

    def test_scores_depend_on_the_distance_only(self):
        rng = np.random.default_rng(0)
        q, k = rng.standard_normal((2, _K2.head_rope_dim))
        near = _rotated_score(_K2, q, k, 7, 3)
        np.testing.assert_allclose(_rotated_score(_K2, q, k, 1007, 1003), near, rtol=1e-3)
        self.assertGreater(abs(_rotated_score(_K2, q, k, 8, 3) - near), 1e-2)

    def test_angles_are_right_at_the_last_of_two_million_positions(self):
        positions = np.arange(2**21 - 64, 2**21)
        cos, sin = rope.cos_sin(_K2, jnp.asarray(positions, jnp.int32)[None])
        angles = positions[:, None] * rope.inverse_frequencies(_K2)
        # An angle is off by half of 2^-32 turns a position; float32 products are off by 0.1.
        np.testing.assert_allclose(cos[0], np.cos(angles), atol=2e-3)
        np.testing.assert_allclose(sin[0], np.sin(angles), atol=2e-3)

    def test_pairs_are_adjacent_members(self):
        # Only dimensions 2 and 3 are set, so that only frequency 1 matters.
        x = np.zeros(_K2.head_rope_dim)
        x[2:4] = 1.0, 0.0
        angle = 5 * rope.inverse_frequencies(_K2)[1]
        np.testing.assert_allclose(_rotated_score(_K2, x, x, 5, 0), np.cos(angle), rtol=1e-5)


if __name__ == "__main__":
    absltest.main()
