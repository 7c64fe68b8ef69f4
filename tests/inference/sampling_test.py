import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.configs.quantization import WeightFormat
from kimi_jax.inference.sampling import sample
from kimi_jax.model import transformer
from tests.support import tiny

ROWS, PROMPT, ADDED = 4, 3, 6
COLD = 1e-5  # logits differ by more than this times the noise
_GROUP = 8
_PLAIN = tiny.experiment()
_ROUNDED = tiny.experiment(quantization={"format": WeightFormat.INT4, "group_size": _GROUP})
_QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all of the time


class SamplingTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # The length, 9, is no multiple of the context axis.
        mesh = tiny.mesh(2, 1, context=2)
        cls.enterClassContext(jax.set_mesh(mesh))
        cls.params = tiny.parameters(mesh)
        cls.prompts = jnp.asarray(np.arange(ROWS * PROMPT).reshape(ROWS, PROMPT), jnp.int32)

    def _sample(self, seed, temperature, params=None, config=_PLAIN):
        tokens = sample(
            self.params if params is None else params,
            self.prompts,
            jax.random.key(seed),
            num_tokens=ADDED,
            temperature=temperature,
            config=config.model,
            choices=config.compute,
            quantization=config.quantization,
        )
        return np.asarray(tokens)

    def test_the_prompt_stays_and_the_length_is_right(self):
        tokens = self._sample(0, 1.0)
        self.assertEqual(tokens.shape, (ROWS, PROMPT + ADDED))
        np.testing.assert_array_equal(tokens[:, :PROMPT], self.prompts)
        self.assertTrue(np.all((tokens >= 0) & (tokens < tiny.MODEL.vocab_size)))

    def test_the_key_decides(self):
        tokens = self._sample(0, 1.0)
        np.testing.assert_array_equal(self._sample(0, 1.0), tokens)
        self.assertTrue(np.any(self._sample(1, 1.0) != tokens))

    def test_a_run_that_rounds_samples_with_rounded_weights(self):
        on_grid = jax.jit(functools.partial(tiny.round_experts, group_size=_GROUP))(self.params)
        rounded = self._sample(0, 1.0, config=_ROUNDED)
        np.testing.assert_array_equal(rounded, self._sample(0, 1.0, on_grid))

    def test_rows_and_positions_draw_different_noise(self):
        hot = self._sample(0, 1e6)[:, PROMPT:]  # uniform over the vocabulary
        self.assertGreater(len(np.unique(hot)), ROWS * ADDED // 2)

    def test_a_cold_sample_takes_the_largest_logit_of_a_plain_forward_pass(self):
        tokens = self._sample(0, COLD)
        choices = tiny.experiment().compute

        @functools.partial(jax.jit, compiler_options=_QUICK)
        def logits(tokens):
            hidden, _ = transformer.forward(
                self.params,
                tokens,
                jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
                jnp.ones_like(tokens),
                config=tiny.MODEL,
                choices=choices,
            )
            return transformer.logits(self.params, hidden, config=tiny.MODEL, choices=choices)

        best = np.argmax(np.asarray(logits(jnp.asarray(tokens[:, :-1]))), axis=-1)
        np.testing.assert_array_equal(tokens[:, PROMPT:], best[:, PROMPT - 1 :])


if __name__ == "__main__":
    absltest.main()
