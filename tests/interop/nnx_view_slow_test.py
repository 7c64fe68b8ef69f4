"""The view in the hands of the programs that it is for: Tunix trains it, Qwix rounds its values."""

import importlib.util
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest
from flax import nnx
from flax.errors import TraceContextError

from kimi_jax.core.param_spec import MATRIX, ROUTER, map_specs
from kimi_jax.interop.nnx_view import NnxView, SelectionBias
from kimi_jax.model import transformer
from tests.support import tiny

pytestmark = [
    pytest.mark.slow,
    # Those of the libraries are not ours to heed.
    pytest.mark.filterwarnings("ignore"),
]
_CONFIG = tiny.experiment()
_PLAN = transformer.specs(tiny.MODEL)
_STEPS = 4


def _loss(view, input_tokens, input_mask):
    logits = view(input_tokens)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, input_tokens[:, 1:])
    return jnp.sum(losses * input_mask[:, 1:]) / jnp.sum(input_mask[:, 1:])


class NnxViewSlowTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        mesh = tiny.mesh(2, 2)
        self.enterContext(jax.set_mesh(mesh))
        self.params = tiny.parameters(mesh)
        self.view = NnxView(self.params, _CONFIG.model, _CONFIG.compute)
        self.tokens = jax.random.randint(jax.random.key(0), (4, 16), 0, tiny.MODEL.vocab_size)

    @unittest.skipUnless(importlib.util.find_spec("tunix"), "needs google-tunix")
    def test_tunix_trains_the_view_as_a_loop_of_ones_own(self):
        from tunix.sft import peft_trainer

        mask = jnp.ones_like(self.tokens)
        batch = peft_trainer.TrainingInput(input_tokens=self.tokens, input_mask=mask)
        config = peft_trainer.TrainingConfig(eval_every_n_steps=_STEPS + 1, max_steps=_STEPS)
        trainer = peft_trainer.PeftTrainer(self.view, optax.sgd(0.1), config)
        trainer.with_loss_fn(_loss).with_gen_model_input_fn(
            lambda batch: {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask}
        )
        trainer.train([batch] * _STEPS)

        own = NnxView(self.params, _CONFIG.model, _CONFIG.compute)
        optimizer = nnx.Optimizer(own, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(view, optimizer):
            loss, gradients = nnx.value_and_grad(_loss)(view, self.tokens, mask)
            optimizer.update(view, gradients)
            return loss

        losses = [float(step(own, optimizer)) for _ in range(_STEPS)]
        self.assertLess(losses[-1], losses[0] - 0.1)
        trained, expected = self.view.params(), own.params()

        def compare(theirs, ours):
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
            self.assertTrue(theirs.sharding.is_equivalent_to(ours.sharding, ours.ndim))

        jax.tree.map(compare, trained, expected)
        (bias,) = jax.tree.leaves(nnx.state(self.view, SelectionBias))
        np.testing.assert_array_equal(
            bias, self.params.moe_blocks.feed_forward.router.selection_bias
        )

    @unittest.skipUnless(importlib.util.find_spec("qwix"), "needs qwix")
    def test_qwix_rounds_the_values_of_variables(self):
        import qwix

        def rounded(spec, weight):
            if MATRIX not in spec.tags or ROUTER in spec.tags:
                return weight
            axes = [i for i, axis in enumerate(spec.axes) if axis not in spec.inputs]
            codes = qwix.quantize(weight, jnp.int8, channelwise_axes=axes)
            self.assertEqual(codes.qvalue.dtype, jnp.int8)
            return jax.device_put(qwix.dequantize(codes), weight.sharding)

        logits = jax.jit(lambda view, tokens: view(tokens))
        exact = logits(self.view, self.tokens)
        params = map_specs(rounded, _PLAN, self.view.params())
        nnx.update(self.view, nnx.state(NnxView(params, _CONFIG.model, _CONFIG.compute)))
        error = np.abs(np.asarray(logits(self.view, self.tokens) - exact))
        self.assertGreater(np.max(error), 0.0)
        self.assertLess(np.mean(error), 0.1 * np.std(exact))

    @unittest.skipUnless(importlib.util.find_spec("qwix"), "needs qwix")
    def test_qwixs_replacement_of_products_does_not_fit(self):
        """Says when the note in the docstring of the view is out of date."""
        import qwix

        rule = qwix.QtRule(module_path=".*", weight_qtype=jnp.int8)
        with self.assertRaisesRegex(ValueError, "does not match the specs of the input"):
            qwix.quantize_model(self.view, qwix.QtProvider([rule]), self.tokens)
        low_rank = qwix.apply_lora_to_model(
            self.view,
            qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0),
            self.tokens,
            rngs=nnx.Rngs(0),
        )
        added = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(low_rank, nnx.LoRAParam))}
        self.assertEqual(added, {"head_lora_a", "head_lora_b"})
        with self.assertRaisesRegex(TraceContextError, "different trace level"):
            jax.jit(lambda view, tokens: view(tokens))(low_rank, self.tokens)


if __name__ == "__main__":
    absltest.main()
