import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.configs.compute import ComputeConfig, ComputeDtype
from kimi_jax.model import loss, transformer
from kimi_jax.model.transformer import TransformerParams
from kimi_jax.parallel.rules import TOKENS
from tests.support import tiny

_WHOLE = ComputeConfig(dtype=ComputeDtype.FLOAT32)
_HEAD_ONLY = functools.partial(TransformerParams, None, None, None, None)


def _inputs():
    rng = np.random.default_rng(0)
    head = jnp.float32(rng.standard_normal((tiny.MODEL.embed_dim, tiny.MODEL.vocab_size)))
    hidden = jnp.float32(rng.standard_normal((2, 5, tiny.MODEL.embed_dim)))
    targets = jnp.asarray(rng.integers(0, tiny.MODEL.vocab_size, (2, 5)), jnp.int32)
    return head, hidden, targets


def _losses(head, hidden, targets, choices=_WHOLE):
    params = _HEAD_ONLY(head)
    hidden = jax.reshard(hidden, TOKENS)
    return loss.token_losses(params, hidden, targets, config=tiny.MODEL, choices=choices)


class LossTest(absltest.TestCase):
    def test_equals_the_negative_log_likelihood_in_float64(self):
        head, hidden, targets = _inputs()
        logits = np.float64(hidden) @ np.float64(head)
        log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
        with jax.set_mesh(tiny.mesh(1, 1)):
            actual = _losses(head, hidden, targets)
        np.testing.assert_allclose(actual, log_sum - picked, rtol=1e-4)

    def test_chunks_change_neither_losses_nor_gradients(self):
        head, hidden, targets = _inputs()

        def compute(choices):
            total = lambda *args: jnp.sum(jnp.sin(_losses(*args, targets, choices)))  # noqa: E731
            return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(head, hidden)

        with jax.set_mesh(tiny.mesh(1, 1)):
            whole = compute(_WHOLE)
            for chunk in (1, 3, 5, 100):
                chunked = compute(dataclasses.replace(_WHOLE, logits_chunk_tokens=chunk))
                chex.assert_trees_all_close(chunked, whole, rtol=1e-5, atol=1e-5)

    def test_chunks_bound_how_many_logits_there_are(self):
        head, hidden, targets = _inputs()
        head = jnp.tile(head, (1, 1000))
        choices = dataclasses.replace(_WHOLE, logits_chunk_tokens=2)
        vocab = head.shape[1]
        with jax.set_mesh(tiny.mesh(1, 1)):
            program = jax.jit(functools.partial(_losses, choices=choices))
            text = program.lower(head, hidden, targets).compile().as_text()
        self.assertIn(f"f32[2,{vocab}]", text)
        self.assertNotIn(f"f32[10,{vocab}]", text)

    def test_logits_are_those_the_loss_is_made_of(self):
        head, hidden, targets = _inputs()
        with jax.set_mesh(tiny.mesh(1, 1)):
            params = _HEAD_ONLY(head)
            logits = transformer.logits(params, hidden, config=tiny.MODEL, choices=_WHOLE)
            losses = _losses(head, hidden, targets)
        log_probabilities = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(losses, -picked, rtol=1e-5)


if __name__ == "__main__":
    absltest.main()
