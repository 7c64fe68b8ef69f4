"""Invariances of the decoder; its equality with the published model is in hf_parity_test.py."""

import collections
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import (
    ComputeConfig,
    ComputeDtype,
    Implementation,
    Remat,
    ResidualFormat,
)
from kimi_jax.core import param_spec
from kimi_jax.model import transformer
from kimi_jax.parallel import placement
from tests.support import tiny

_CHOICES = ComputeConfig(dtype=ComputeDtype.FLOAT32)


def _params(config=tiny.MODEL):
    plan = transformer.specs(config)
    return jax.jit(functools.partial(placement.initialize, plan=plan))(jax.random.key(0))


def _hidden(params, tokens, positions, segments, choices=_CHOICES, config=tiny.MODEL):
    run = functools.partial(transformer.forward, config=config, choices=choices)
    return run(params, tokens, positions, segments)[0]


class TransformerTest(parameterized.TestCase):
    def test_a_document_is_unaware_of_its_neighbours_in_the_row(self):
        rng = np.random.default_rng(0)
        row = jnp.asarray(rng.integers(0, tiny.MODEL.vocab_size, (1, 12)), jnp.int32)
        segments = jnp.asarray([[1] * 5 + [2] * 7], jnp.int32)
        positions = jnp.asarray([[*range(5), *range(7)]], jnp.int32)
        with jax.set_mesh(tiny.mesh(1, 1)):
            params = _params()
            packed = _hidden(params, row, positions, segments)
            alone = _hidden(params, row[:, 5:], positions[:, 5:], segments[:, 5:])
        np.testing.assert_allclose(packed[:, 5:], alone, rtol=1e-4, atol=1e-5)

    def test_a_token_is_unaware_of_later_ones(self):
        rng = np.random.default_rng(0)
        row = jnp.asarray(rng.integers(0, tiny.MODEL.vocab_size, (1, 12)), jnp.int32)
        changed = row.at[0, 8].set((row[0, 8] + 1) % tiny.MODEL.vocab_size)
        positions, segments = jnp.arange(12)[None], jnp.ones((1, 12), jnp.int32)
        with jax.set_mesh(tiny.mesh(1, 1)):
            params = _params()
            before = np.asarray(_hidden(params, row, positions, segments))
            after = np.asarray(_hidden(params, changed, positions, segments))
        np.testing.assert_allclose(before[:, :8], after[:, :8], rtol=1e-4, atol=1e-5)
        self.assertGreater(np.abs(before[:, 8:] - after[:, 8:]).max(), 1e-2)

    def test_what_the_backward_pass_recomputes_changes_no_gradient(self):
        batch = tiny.batch(tiny.mesh(1, 1), rows=2)

        def gradient(remat, offload=False):
            choices = dataclasses.replace(_CHOICES, remat=remat, offload_activations=offload)

            def loss(params):
                hidden = _hidden(params, batch.inputs, batch.positions, batch.segments, choices)
                return jnp.sum(jnp.sin(hidden))

            options = {"xla_backend_optimization_level": 0}  # compiling takes the time
            return jax.jit(jax.grad(loss), compiler_options=options)(params)

        with jax.set_mesh(tiny.mesh(1, 1)):
            params = _params()
            kept = gradient(Remat.NONE)
            for remat in (Remat.K2, Remat.FULL):
                chex.assert_trees_all_close(gradient(remat), kept, rtol=1e-4, atol=1e-4)
            offloaded = gradient(Remat.K2, offload=True)
            chex.assert_trees_all_close(offloaded, kept, rtol=1e-4, atol=1e-4)

    # Two stacks of layers. K2 keeps, beside a layer's input, three latents, attention's projected
    # output, the gate and up products of the dense or shared layer, and what the kernels name.
    @parameterized.parameters((Remat.FULL, 2, 2), (Remat.K2, 14, 24))
    def test_what_is_kept_is_sent_to_host_memory(self, remat, least, most):
        batch = tiny.batch(tiny.mesh(1, 1), rows=2)
        choices = dataclasses.replace(_CHOICES, remat=remat, offload_activations=True)

        def loss(params):
            arguments = params, batch.inputs, batch.positions, batch.segments
            return jnp.sum(_hidden(*arguments, choices))

        with jax.set_mesh(tiny.mesh(1, 1)):
            program = str(jax.make_jaxpr(jax.grad(loss))(jax.eval_shape(_params)))
        self.assertBetween(program.count("devices=(MemorySpace.Host"), least, most)

    def test_recomputing_keeps_less_for_the_backward_pass(self):
        config = dataclasses.replace(tiny.MODEL, num_layers=9)
        batch = tiny.batch(tiny.mesh(1, 1), rows=8)

        def temporary_bytes(remat):
            choices = dataclasses.replace(_CHOICES, remat=remat)

            def loss(params):
                arguments = params, batch.inputs, batch.positions, batch.segments
                return jnp.sum(_hidden(*arguments, choices, config))

            compiled = jax.jit(jax.grad(loss)).lower(params).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        with jax.set_mesh(tiny.mesh(1, 1)):
            params = _params(config)
            kept, some, none = (temporary_bytes(r) for r in (Remat.NONE, Remat.K2, Remat.FULL))
        self.assertLess(some, kept)
        self.assertLess(none, some)

    @parameterized.parameters(
        (Remat.K2, Implementation.XLA),
        (Remat.K2, Implementation.XLA_ACCELERATOR),
        (Remat.NONE, Implementation.XLA_ACCELERATOR),
    )
    def test_fp8_codes_are_kept_instead_of_values_and_not_beside_them(self, remat, implementation):
        batch = tiny.batch(tiny.mesh(1, 1), rows=2)

        def kept(residuals):
            choices = dataclasses.replace(
                _CHOICES,
                remat=remat,
                implementation=implementation,
                feed_forward_residuals=residuals,
            )

            def pull_back(params):
                arguments = batch.inputs, batch.positions, batch.segments
                return jax.vjp(lambda p: _hidden(p, *arguments, choices), params)[1]

            leaves = jax.tree.leaves(jax.eval_shape(pull_back, jax.eval_shape(_params)))
            shapes = collections.defaultdict(collections.Counter)
            for leaf in leaves:
                shapes[leaf.dtype.name][leaf.shape] += 1
            return shapes

        with jax.set_mesh(tiny.mesh(1, 1)):
            values, coded = map(kept, ResidualFormat)
        codes = coded["float8_e4m3fn"]
        self.assertGreaterEqual(codes.total(), 6)  # of the dense, the shared and the routed part
        self.assertLessEqual(codes, values["float32"] - coded["float32"])

    @parameterized.parameters(0, 3)
    def test_all_blocks_may_be_of_one_kind(self, num_dense_layers):
        config = dataclasses.replace(tiny.MODEL, num_dense_layers=num_dense_layers)
        plan = transformer.specs(config)
        self.assertEqual(plan.dense_blocks is None, num_dense_layers == 0)
        self.assertEqual(plan.moe_blocks is None, num_dense_layers == 3)
        batch = tiny.batch(tiny.mesh(1, 1), rows=1)
        with jax.set_mesh(tiny.mesh(1, 1)):
            run = functools.partial(transformer.forward, config=config, choices=_CHOICES)
            arguments = _params(config), batch.inputs, batch.positions, batch.segments
            hidden, stats = jax.eval_shape(run, *arguments)
        self.assertEqual(hidden.shape, (1, tiny.LENGTH, config.embed_dim))
        self.assertEqual(stats.max_logit.shape, (3, config.num_heads))
        self.assertEqual(stats.expert_load is None, num_dense_layers == 3)

    def test_every_leaf_of_the_plan_has_a_distinct_name(self):
        names = [name for name, _ in param_spec.named_specs(transformer.specs(tiny.MODEL))]
        self.assertLen(set(names), len(names))
        self.assertIn("moe_blocks.feed_forward.experts.w_gate", names)


if __name__ == "__main__":
    absltest.main()
