import dataclasses

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from kimi_jax.analysis.compiled_program import read_program
from kimi_jax.analysis.expected_flops import expected_flops, newton_schulz_flops
from kimi_jax.analysis.memory import mesh_sizes
from kimi_jax.configs.compute import Remat
from kimi_jax.configs.optimizer import MatrixGranularity, OptimizerName
from kimi_jax.model import transformer
from kimi_jax.model.accounting import flops_per_token, train_flops_per_step
from kimi_jax.optimizers.newton_schulz import newton_schulz
from tests.support import tiny


def _expected(config, expert=1, **others):
    sizes = mesh_sizes(1, expert, **others)
    return expected_flops(config, transformer.specs(config.model), sizes)


class NewtonSchulzFlopsTest(parameterized.TestCase):
    def test_one_matrix_costs_what_the_compiled_iteration_executes(self):
        options = tiny.experiment().optimizer

        def orthogonalize(x):
            return newton_schulz(
                x,
                steps=options.newton_schulz_steps,
                preset=options.newton_schulz_preset,
                dtype=options.newton_schulz_dtype,
            )

        matrix = jax.ShapeDtypeStruct((24, 40), jnp.float32)
        text = jax.jit(orthogonalize).lower(matrix).compile().as_text()
        closed_form = options.newton_schulz_steps * (4 * 24 * 24 * 40 + 2 * 24**3)
        self.assertEqual(read_program(text, {"data": 1}).total.flops, closed_form)

    def test_every_matrix_of_the_model_counts(self):
        # Of each of 3 layers: queries 32 x 16, 16 x 2 heads x (8 and 4), keys and values 32 x (16
        # and 4), 16 x 2 heads x (8 and 8), output 16 x 32; one layer's three 32 x 48; of the two
        # others 8 + 1 experts with three 32 x 16, and a router 32 x 8.
        shapes = 3 * [(16, 32), (16, 16), (8, 16), (16, 32), (4, 32), (16, 16), (16, 16), (16, 32)]
        shapes += 3 * [(32, 48)] + 2 * 9 * 3 * [(16, 32)] + 2 * [(8, 32)]
        config = tiny.experiment()
        expected = sum(4 * n * n * m + 2 * n**3 for n, m in shapes)
        plan = transformer.specs(config.model)
        counted = newton_schulz_flops(config.optimizer, plan)
        self.assertEqual(counted, config.optimizer.newton_schulz_steps * expected)

    def test_heads_apart_cost_less_and_adamw_nothing(self):
        config = tiny.experiment().optimizer
        plan = transformer.specs(tiny.MODEL)
        apart = dataclasses.replace(config, matrix_granularity=MatrixGranularity.HEAD)
        self.assertLess(newton_schulz_flops(apart, plan), newton_schulz_flops(config, plan))
        adamw = dataclasses.replace(config, name=OptimizerName.ADAMW)
        self.assertEqual(newton_schulz_flops(adamw, plan), 0.0)


class ExpectedFlopsTest(absltest.TestCase):
    def _expect(self, **compute):
        config = tiny.experiment(compute=compute)
        return config, _expected(config)

    def test_forward_and_backward_are_the_models(self):
        config, expected = self._expect()
        model_flops = train_flops_per_step(config.model, tiny.NUM_ROWS, tiny.LENGTH)
        self.assertEqual(expected.forward + expected.backward, model_flops)
        self.assertEqual(expected.backward, 2 * expected.forward)

    def test_rows_of_the_exchanges_buffers_count_filled_or_not(self):
        config, even = self._expect(exchange_capacity=1.0)
        _, roomy = self._expect(exchange_capacity=1.5)
        self.assertEqual(even.forward, roomy.forward)  # one device exchanges nothing
        config = tiny.experiment(compute={"exchange_capacity": 1.5})
        roomy = _expected(config, expert=4)
        of_experts = flops_per_token(config.model, tiny.LENGTH).routed_experts
        added = 0.5 * config.batch_tokens * of_experts
        self.assertAlmostEqual(roomy.forward - even.forward, added, delta=1e-6 * added)

    def test_a_pipeline_computes_as_many_layers_for_nobody_as_it_has_stages_but_one(self):
        config, alone = self._expect()
        piped = _expected(config, pipe=2)
        # The tiny model has two mixture blocks and a dense one, all with the same attention.
        parts = flops_per_token(config.model, tiny.LENGTH)
        mixture = (parts.shared_experts + parts.routed_experts + parts.router) / 2
        attention = (parts.attention_projections + parts.attention_core) / 3
        added = config.batch_tokens * (mixture + attention)
        self.assertAlmostEqual(piped.forward - alone.forward, added, delta=1e-6 * added)

    def test_keeping_more_recomputes_less(self):
        full, k2, none = (
            self._expect(remat=policy)[1].recomputed
            for policy in (Remat.FULL, Remat.K2, Remat.NONE)
        )
        self.assertGreater(full, k2)
        self.assertGreater(k2, none)

    def test_chunks_of_logits_are_computed_twice(self):
        config, whole = self._expect()
        _, chunks = self._expect(logits_chunk_tokens=8)
        head = 2 * config.batch_tokens * config.model.embed_dim * config.model.vocab_size
        self.assertEqual(chunks.recomputed - whole.recomputed, head)


if __name__ == "__main__":
    absltest.main()
