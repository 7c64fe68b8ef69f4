import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest
from flax import nnx

from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat
from kimi_jax.core.errors import ConfigError
from kimi_jax.core.param_spec import ROUTED_EXPERT, SELECTION_BIAS, map_specs, named_specs
from kimi_jax.core.trees import leaf_names
from kimi_jax.interop.nnx_view import NnxView, QuantizedPart, SelectionBias
from kimi_jax.model import transformer
from kimi_jax.parallel.placement import abstract_parameters
from kimi_jax.training import packed
from tests.support import tiny

# Compiling takes nearly all of the time.
_QUICK = {"xla_backend_optimization_level": 0}
_CONFIG = tiny.experiment()
_INT4 = QuantizationConfig(format=WeightFormat.INT4, group_size=8)
_PLAN = transformer.specs(tiny.MODEL)
_ROWS = 4  # one for each device


def _functional_logits(params, tokens, positions, segments, quantization):
    options = {"config": _CONFIG.model, "choices": _CONFIG.compute}
    ready = transformer.prepare(params, quantization=quantization, **options)
    hidden, _ = transformer.forward(ready, tokens, positions, segments, **options)
    return transformer.logits(ready, hidden, **options)


def _cross_entropy(logits, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.mean(losses * batch.weights)


@functools.partial(jax.jit, compiler_options=_QUICK)
def _functional_loss_and_gradients(params, batch):
    def loss(params):
        rows = (batch.inputs, batch.positions, batch.segments)
        return _cross_entropy(_functional_logits(params, *rows, QuantizationConfig()), batch)

    return jax.value_and_grad(loss)(params)


def _loss_and_gradients(view, batch):
    def loss(view):
        return _cross_entropy(view(batch.inputs, batch.positions, batch.segments), batch)

    return nnx.value_and_grad(loss)(view)


_compiled_loss_and_gradients = jax.jit(_loss_and_gradients, compiler_options=_QUICK)


def _program(function, *arguments):
    """The program that a function is traced to, without addresses in memory."""
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*arguments)))


def _by_name(state):
    return {".".join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _leaves(params):
    names = jax.tree.leaves(leaf_names(params))
    return dict(zip(names, jax.tree.leaves(params), strict=True))


class NnxViewTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.mesh = tiny.mesh(2, 2)
        cls.enterClassContext(jax.set_mesh(cls.mesh))
        cls.params = tiny.parameters(cls.mesh)
        cls.batch = tiny.batch(cls.mesh, rows=_ROWS)

    def _view(self, params=None, quantization=None):
        params = self.params if params is None else params
        return NnxView(params, _CONFIG.model, _CONFIG.compute, quantization)

    def test_variables_are_the_arrays_themselves_under_our_names(self):
        view = self._view()
        found, given = _by_name(nnx.state(view)), _leaves(self.params)
        self.assertEqual(found.keys(), given.keys())
        self.assertEqual(found.keys(), {name for name, _ in named_specs(_PLAN)})
        for name, array in given.items():
            self.assertIs(found[name], array, name)
        for theirs, ours in zip(
            jax.tree.leaves(view.params()), jax.tree.leaves(self.params), strict=True
        ):
            self.assertIs(theirs, ours)
        self.assertIs(type(view.params()), transformer.TransformerParams)

    def _assert_same_program(self, params, quantization):
        """One traced program for the view and the functions means one result, bit for bit."""
        tokens = self.batch.inputs
        positions = jnp.broadcast_to(jnp.arange(tiny.LENGTH), tokens.shape)
        rows = (tokens, positions, jnp.ones_like(tokens))
        functions = functools.partial(_functional_logits, quantization=quantization)
        expected = _program(functions, params, *rows)

        def view(params, *rows):
            return self._view(params, quantization)(*rows)

        self.assertEqual(_program(view, params, *rows), expected)
        return expected

    def test_a_call_is_the_models_program(self):
        plain = self._assert_same_program(self.params, QuantizationConfig())
        rounded = self._assert_same_program(self.params, _INT4)
        packed_model = self._assert_same_program(self._abstract_packed(), QuantizationConfig())
        self.assertLen({plain, rounded, packed_model}, 3)

    def test_a_call_without_positions_takes_each_row_for_one_document(self):
        view, tokens = self._view(), self.batch.inputs

        def spelled_out(tokens):
            positions = jnp.broadcast_to(jnp.arange(tiny.LENGTH), tokens.shape)
            return view(tokens, positions, jnp.ones_like(tokens))

        self.assertEqual(
            _program(lambda tokens: view(tokens), tokens), _program(spelled_out, tokens)
        )

    def test_loss_and_gradients_are_those_of_the_functions(self):
        expected, gradients = _functional_loss_and_gradients(self.params, self.batch)
        view = self._view()
        loss, found = _compiled_loss_and_gradients(view, self.batch)
        self.assertIs(view.head.get_value(), self.params.head)
        self.assertEqual(float(loss), float(expected))
        found, gradients = _by_name(found), _leaves(gradients)
        trained = {name for name, spec in named_specs(_PLAN) if spec.kind != SELECTION_BIAS}
        self.assertEqual(found.keys(), trained)
        for name in trained:
            np.testing.assert_array_equal(found[name], gradients[name], name)
            self.assertGreater(np.max(np.abs(found[name])), 0.0, name)
            self.assertEqual(found[name].sharding, gradients[name].sharding, name)

    def test_an_optimizer_step_moves_params_as_optax_moves_the_tree(self):
        view = self._view()
        _, gradients = _compiled_loss_and_gradients(view, self.batch)
        optimizer = nnx.Optimizer(view, optax.sgd(0.5), wrt=nnx.Param)
        nnx.jit(lambda optimizer, view, gradients: optimizer.update(view, gradients))(
            optimizer, view, gradients
        )
        gradients = _by_name(gradients)
        for name, old in _leaves(self.params).items():
            new = _leaves(view.params())[name]
            expected = np.asarray(old) - 0.5 * np.asarray(gradients.get(name, 0.0))
            np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-7, err_msg=name)
            self.assertTrue(new.sharding.is_equivalent_to(old.sharding, old.ndim), name)
        self.assertEqual(int(optimizer.step.get_value()), 1)

    def test_split_merge_and_update_carry_every_variable(self):
        view = self._view()
        graph, weights, biases = nnx.split(view, nnx.Param, SelectionBias)
        self.assertEqual(list(_by_name(biases)), ["moe_blocks.feed_forward.router.selection_bias"])
        merged = nnx.merge(graph, weights, biases)
        chex.assert_trees_all_equal(merged.params(), self.params)
        self.assertEqual((merged.config, merged.choices), (view.config, view.choices))
        zeros = jax.tree.map(jnp.zeros_like, weights)
        nnx.update(view, zeros)
        self.assertEqual(float(jnp.max(jnp.abs(view.params().moe_blocks.attention.w_out))), 0.0)

    def test_gradients_leave_out_what_is_packed(self):
        params = self._abstract_packed()
        view = self._view(params)
        experts = view.moe_blocks.feed_forward.experts
        for part in (experts.w_up.codes, experts.w_up.scales):
            self.assertIs(type(part), QuantizedPart)
        self.assertEqual(view.params(), params)
        _, gradients = jax.eval_shape(_loss_and_gradients, view, self.batch)
        trained = {
            name
            for name, spec in named_specs(_PLAN)
            if ROUTED_EXPERT not in spec.tags and spec.kind != SELECTION_BIAS
        }
        self.assertEqual(_by_name(gradients).keys(), trained)

    def _abstract_packed(self):
        config = tiny.experiment(quantization={"format": WeightFormat.INT4, "group_size": 8})
        return packed.abstract_packed(config, self.mesh)

    def test_jit_of_nnx_copies_no_weight_without_updates_of_the_graph(self):
        view = self._view()
        total = nnx.jit(lambda view: jnp.sum(view.final_norm.get_value()), graph_updates=False)
        self.assertEqual(float(total(view)), tiny.MODEL.embed_dim)
        self.assertIs(view.head.get_value(), self.params.head)

    def test_new_parameters_lie_where_the_plan_puts_them(self):
        def new(key):
            return NnxView.initialize(key, _CONFIG.model, _CONFIG.compute).params()

        def check(_, leaf, like):
            self.assertEqual((leaf.shape, leaf.dtype), (like.shape, like.dtype))
            on_devices = jax.NamedSharding(self.mesh, leaf.sharding.spec)
            self.assertTrue(on_devices.is_equivalent_to(like.sharding, leaf.ndim))

        found = jax.eval_shape(new, jax.random.key(0))
        map_specs(check, _PLAN, found, abstract_parameters(_PLAN, self.mesh))

    def test_segments_without_positions_are_refused(self):
        with self.assertRaisesRegex(ConfigError, "segments are given without positions"):
            self._view()(self.batch.inputs, segments=self.batch.segments)


if __name__ == "__main__":
    absltest.main()
