import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.core import param_spec
from kimi_jax.optimizers.qk_clip import clipped_heads, qk_clip
from tests.optimizers import toy_plans

TAU = 100.0
NUM_LAYERS = 2
# Weights are float32; the oracle's logits are float64 sums of products of five of them.
RTOL = 2e-6


def rms_norm(x, gain):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain


def logits(params, x, layer):
    """Attention logits [N, T, T] of one layer, by a numpy MLA without positions."""
    p = {name: np.asarray(leaf[layer], np.float64) for name, leaf in params.items()}
    queries = rms_norm(x @ p["w_q_down"], p["q_norm"])
    keys = rms_norm(x @ p["w_kv_down"], p["kv_norm"])
    q_nope = np.einsum("tq,qnh->nth", queries, p["w_q_nope"])
    q_rope = np.einsum("tq,qnr->ntr", queries, p["w_q_rope"])
    k_nope = np.einsum("sc,cnh->nsh", keys, p["w_k_nope"])
    k_rope = x @ p["w_k_rope"]
    return np.einsum("nth,nsh->nts", q_nope, k_nope) + np.einsum("ntr,sr->nts", q_rope, k_rope)


def clip_by_max_over_layers(params, plan, max_logit, *, threshold):
    """A faulty rule: under a scan, one layer's maximum clips the head in all layers."""
    everywhere = jnp.broadcast_to(jnp.max(max_logit, axis=0), max_logit.shape)
    return qk_clip(params, plan, everywhere, threshold=threshold)


def clip_by_minimum_of_one(params, plan, max_logit, *, threshold):
    """A faulty rule: min(1, tau / max) is negative for negative maxima, and its root is NaN."""
    gamma = jnp.minimum(1.0, threshold / max_logit)

    def clip(spec, leaf):
        powers = {"query_nope": 0.5, "key_nope": 0.5, "query_rope": 1.0}
        for tag, power in powers.items():
            if tag in spec.tags:
                return leaf * (gamma**power)[:, None, :, None]
        return leaf

    return param_spec.map_specs(clip, plan, params)


class QkClipTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.plan = param_spec.stack(toy_plans.attention_plan(num_heads=3), NUM_LAYERS)
        self.params = toy_plans.random_like(self.plan, seed=0)
        self.x = np.random.default_rng(1).standard_normal((6, 16))

    def assert_heads_equal(self, clipped, layer, head):
        for name in ("w_q_nope", "w_q_rope", "w_k_nope", "w_value"):
            np.testing.assert_array_equal(
                np.asarray(clipped[name])[layer, :, head],
                np.asarray(self.params[name])[layer, :, head],
                err_msg=f"{name} layer {layer} head {head}",
            )

    def check_scaled_exactly(self, rule):
        max_logit = jnp.array([[50.0, 400.0, 100.0], [101.0, -3.0, 99.9]])
        gamma = np.array([[1, 0.25, 1], [100 / 101, 1, 1]])
        clipped = rule(self.params, self.plan, max_logit, threshold=TAU)
        for layer in range(NUM_LAYERS):
            before = logits(self.params, self.x, layer)
            after = logits(clipped, self.x, layer)
            np.testing.assert_allclose(
                after, gamma[layer][:, None, None] * before, rtol=RTOL, atol=1e-5
            )

    def check_untouched(self, rule):
        max_logit = jnp.array([[50.0, 400.0, 100.0], [101.0, 12.0, 99.9]])
        clipped = rule(self.params, self.plan, max_logit, threshold=TAU)
        for layer, head in ((0, 0), (0, 2), (1, 1), (1, 2)):
            self.assert_heads_equal(clipped, layer, head)

    def check_negative_maxima(self, rule):
        max_logit = jnp.array([[-3.0, 0.0, -jnp.inf], [-1e-30, -200.0, 5.0]])
        clipped = rule(self.params, self.plan, max_logit, threshold=TAU)
        chex.assert_trees_all_equal(clipped, self.params)

    def test_clip_scales_the_logits_of_a_head_by_exactly_gamma(self):
        self.check_scaled_exactly(qk_clip)

    def test_clip_leaves_heads_below_threshold_untouched(self):
        self.check_untouched(qk_clip)

    def test_negative_zero_and_missing_maxima_are_not_clipped(self):
        self.check_negative_maxima(qk_clip)

    def test_clipping_by_the_maximum_over_layers_is_caught(self):
        with self.assertRaises(AssertionError):
            self.check_untouched(clip_by_max_over_layers)

    def test_minimum_of_one_is_caught_at_negative_maxima(self):
        with self.assertRaises(AssertionError):
            self.check_negative_maxima(clip_by_minimum_of_one)

    def test_maximum_over_micro_batches_clips_nothing_where_their_sum_would(self):
        micro_batches = jnp.full((4, NUM_LAYERS, 3), 60.0)
        kept = qk_clip(self.params, self.plan, jnp.max(micro_batches, axis=0), threshold=TAU)
        chex.assert_trees_all_equal(kept, self.params)
        summed = qk_clip(self.params, self.plan, jnp.sum(micro_batches, axis=0), threshold=TAU)
        with self.assertRaises(AssertionError):
            self.assert_heads_equal(summed, 0, 0)

    def test_clipping_to_the_measured_maximum_leaves_the_threshold(self):
        maxima = np.stack([logits(self.params, self.x, i).max((1, 2)) for i in range(NUM_LAYERS)])
        threshold = float(np.median(maxima))
        clipped = qk_clip(
            self.params, self.plan, jnp.asarray(maxima, jnp.float32), threshold=threshold
        )
        after = np.stack([logits(clipped, self.x, i).max((1, 2)) for i in range(NUM_LAYERS)])
        np.testing.assert_allclose(after, np.minimum(maxima, threshold), rtol=1e-5)

    def test_shared_rotary_key_values_and_everything_else_stay(self):
        clipped = qk_clip(self.params, self.plan, jnp.full((NUM_LAYERS, 3), 1e4), threshold=TAU)
        changed = {
            name
            for name, leaf in clipped.items()
            if np.any(np.asarray(leaf) != np.asarray(self.params[name]))
        }
        self.assertEqual(changed, {"w_q_nope", "w_q_rope", "w_k_nope"})

    def test_clipped_heads_are_those_above_the_threshold(self):
        flags = clipped_heads(jnp.array([[99.0, 100.0, 100.1]]), threshold=TAU)
        np.testing.assert_array_equal(flags, [[False, False, True]])

    def test_traced_threshold_side_is_the_same_under_jit(self):
        max_logit = jnp.array([[50.0, 400.0, 100.0], [101.0, -3.0, 99.9]])
        clip = jax.jit(lambda p, m: qk_clip(p, self.plan, m, threshold=TAU))
        chex.assert_trees_all_close(
            clip(self.params, max_logit),
            qk_clip(self.params, self.plan, max_logit, threshold=TAU),
            rtol=1e-6,
        )


if __name__ == "__main__":
    absltest.main()
