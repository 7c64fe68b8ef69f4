"""MLA against its equations written with numpy in float64, one position and head at a time."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import ComputeConfig, ComputeDtype
from kimi_jax.core import param_spec
from kimi_jax.model import mla, rope
from kimi_jax.parallel import rules
from kimi_jax.parallel.rules import BATCH, TOKENS
from tests.support import tiny

_CHOICES = ComputeConfig(dtype=ComputeDtype.FLOAT32)
_SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 2, 3, 3, 3, 3]], np.int32)
_POSITIONS = np.array([[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 3]], np.int32)


def _params(config, seed=0):
    rng = np.random.default_rng(seed)
    return param_spec.map_specs(
        lambda spec: jnp.float32(rng.standard_normal(spec.shape) * 0.5), mla.specs(config)
    )


def _norm(x, gain, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def _rotate(x, position, config):
    angles = position * rope.inverse_frequencies(config)
    first, second = x[0::2], x[1::2]
    rotated = np.empty_like(x)
    rotated[0::2] = first * np.cos(angles) - second * np.sin(angles)
    rotated[1::2] = second * np.cos(angles) + first * np.sin(angles)
    return rotated


def _reference(params, x, config):
    """Returns the output and each row's and head's largest logit."""
    p = jax.tree.map(np.float64, params)
    out = np.zeros_like(x)
    maxima = np.full((x.shape[0], config.num_heads), -np.inf)
    for b in range(x.shape[0]):
        c_q = x[b]
        if p.w_q_down is not None:
            c_q = _norm(x[b] @ p.w_q_down, p.q_norm, config.norm_eps)
        c_kv = _norm(x[b] @ p.w_kv_down, p.kv_norm, config.norm_eps)
        keys = x[b] @ p.w_k_rope
        k_rope = [_rotate(keys[s], _POSITIONS[b, s], config) for s in range(x.shape[1])]
        for n in range(config.num_heads):
            for t in range(x.shape[1]):
                seen = [s for s in range(t + 1) if _SEGMENTS[b, s] == _SEGMENTS[b, t]]
                q_nope = c_q[t] @ p.w_q_nope[:, n]
                q_rope = _rotate(c_q[t] @ p.w_q_rope[:, n], _POSITIONS[b, t], config)
                logits = rope.attention_scale(config) * np.array(
                    [q_nope @ (c_kv[s] @ p.w_k_nope[:, n]) + q_rope @ k_rope[s] for s in seen]
                )
                weights = np.exp(logits - logits.max())
                values = np.array([c_kv[s] @ p.w_value[:, n] for s in seen])
                out[b, t] += (weights / weights.sum()) @ values @ p.w_out[n]
                maxima[b, n] = max(maxima[b, n], logits.max())
    return out, maxima


class MlaTest(parameterized.TestCase):
    @parameterized.named_parameters(("with_query_latent", 16), ("without", None))
    def test_output_and_largest_logits_follow_the_equations(self, q_latent_dim):
        config = dataclasses.replace(tiny.MODEL, q_latent_dim=q_latent_dim)
        params = _params(config)
        x = np.random.default_rng(1).standard_normal((2, 6, config.embed_dim))
        run = functools.partial(mla.mla, config=config, choices=_CHOICES)
        with jax.set_mesh(tiny.mesh(1, 1)):
            inputs = [jax.reshard(i, BATCH) for i in (_POSITIONS, _SEGMENTS)]
            inputs = [jax.reshard(jnp.float32(x), TOKENS), *inputs]
            out, maxima = jax.jit(run)(params, *inputs)
        expected_out, expected_maxima = _reference(params, x, config)
        np.testing.assert_allclose(maxima, expected_maxima, rtol=1e-4)
        np.testing.assert_allclose(out, expected_out, rtol=1e-3, atol=1e-3)

    def test_latents_are_gathered_and_heads_are_exchanged_for_positions(self):
        config = dataclasses.replace(tiny.MODEL, num_heads=4)
        plan = mla.specs(config)
        mesh = tiny.mesh(1, 1, context=2, tensor=2)
        shape = (2, 8)

        def abstract(shape, dtype, layout):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, layout))

        with jax.set_mesh(mesh):
            layouts = rules.partition_specs(plan, rules.COMPUTE)
            params = param_spec.map_specs(
                lambda spec, layout: abstract(spec.shape, jnp.float32, layout), plan, layouts
            )
            whole = abstract(shape, jnp.int32, BATCH)
            x = abstract((*shape, config.embed_dim), jnp.float32, TOKENS)
            run = jax.jit(functools.partial(mla.mla, config=config, choices=_CHOICES))
            text = run.lower(params, x, whole, whole).compile().as_text()
        counts = {
            name: len(re.findall(rf"= [^=]*\b{name}(?:-start)?\(", text))
            for name in ("all-gather", "all-to-all", "all-reduce", "collective-permute")
        }
        # The latents and the rotary key; heads for positions; w_out's partial sums.
        self.assertEqual(
            counts, {"all-gather": 3, "all-to-all": 1, "all-reduce": 1, "collective-permute": 0}
        )


if __name__ == "__main__":
    absltest.main()
