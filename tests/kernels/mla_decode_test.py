import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.mla_decode import cases, mla_decode, pallas_tpu
from kimi_jax.parallel.per_shard import per_shard
from tests.support.decode_oracle import SCALE, decode_inputs, decode_oracle
from tests.support.gradients import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE, assert_close

_KERNEL = functools.partial(pallas_tpu.mla_decode, scale=SCALE, tiles={"block": 16}, interpret=True)
_PROGRAMS = {
    "pallas_tpu": _KERNEL,
    "xla": functools.partial(mla_decode, scale=SCALE, implementation=Implementation.XLA),
    "reference": functools.partial(
        mla_decode, scale=SCALE, implementation=Implementation.REFERENCE
    ),
}


def _arrays(operands, lengths, dtype=jnp.float32):
    return *(jnp.asarray(a, dtype) for a in operands), jnp.asarray(lengths, jnp.int32)


class MlaDecodeTest(parameterized.TestCase):
    @parameterized.product(program=list(_PROGRAMS), name=list(cases.TOY))
    def test_output_equals_float64(self, program, name):
        operands, lengths = decode_inputs(cases.TOY[name])
        actual = jax.jit(_PROGRAMS[program])(*_arrays(operands, lengths))
        assert_close(actual, decode_oracle(*operands, lengths), FLOAT32_TOLERANCE)

    @parameterized.parameters(*_PROGRAMS)
    def test_bfloat16_output_is_near_float64(self, program):
        operands, lengths = decode_inputs(cases.TOY["ragged"])
        actual = jax.jit(_PROGRAMS[program])(*_arrays(operands, lengths, jnp.bfloat16))
        self.assertEqual(actual.dtype, jnp.bfloat16)
        assert_close(actual, decode_oracle(*operands, lengths), BFLOAT16_TOLERANCE)

    @parameterized.parameters(*_PROGRAMS)
    def test_what_lies_behind_the_end_is_not_used(self, program):
        operands, lengths = decode_inputs(cases.TOY["ragged"])
        expected = decode_oracle(*operands, lengths)
        behind = np.arange(operands[2].shape[1]) >= lengths[:, None]
        for cached in (2, 3):
            operands[cached] = np.where(behind[..., None], np.nan, operands[cached])
        actual = jax.jit(_PROGRAMS[program])(*_arrays(operands, lengths))
        assert_close(actual, expected, FLOAT32_TOLERANCE)

    def test_it_equals_attention_that_makes_keys_and_values(self):
        operands, lengths = decode_inputs(cases.TOY["whole_blocks"])
        _, q_rope, latents, k_rope = operands
        rng = np.random.default_rng(1)
        (batch, heads, _), width = q_rope.shape, 5
        q_nope = rng.standard_normal((batch, heads, width))
        w_k_nope, w_value = rng.standard_normal((2, latents.shape[-1], heads, width))
        expected = np.zeros((batch, heads, width))
        for b, length in enumerate(lengths):
            key = np.einsum("sc,cnh->snh", latents[b, :length], w_k_nope)
            value = np.einsum("sc,cnu->snu", latents[b, :length], w_value)
            logits = np.einsum("nh,snh->ns", q_nope[b], key)
            logits = SCALE * (logits + q_rope[b] @ k_rope[b, :length].T)
            weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            expected[b] = np.einsum("ns,snu->nu", weights, value)
        q_latent = np.einsum("bnh,cnh->bnc", q_nope, w_k_nope)
        out = _KERNEL(*_arrays((q_latent, q_rope, latents, k_rope), lengths))
        actual = np.einsum("bnc,cnu->bnu", np.asarray(out, np.float64), w_value)
        assert_close(actual, expected, FLOAT32_TOLERANCE)

    def test_it_runs_in_per_shard_with_a_replicated_query(self):
        operands, lengths = decode_inputs(cases.TOY["whole_blocks"])
        arrays = _arrays(operands, lengths)
        arrays = (arrays[0][:1], *arrays[1:])

        def run(q_latent, q_rope, *cache):
            return _KERNEL(
                jnp.broadcast_to(q_latent, (q_rope.shape[0], *q_latent.shape[1:])), q_rope, *cache
            )

        expected = run(*arrays)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        split = (P(), *(P("data"),) * 4)
        with jax.set_mesh(mesh):
            sharded = per_shard(run, in_specs=split, out_specs=P("data"))
            actual = jax.jit(sharded)(*map(jax.reshard, arrays, split))
        np.testing.assert_array_equal(actual, expected)

    def test_a_gradient_raises(self):
        operands, lengths = decode_inputs(cases.TOY["one_position"])
        *arrays, lengths = _arrays(operands, lengths)

        def total(q_latent):
            return jnp.sum(mla_decode(q_latent, *arrays[1:], lengths, scale=SCALE))

        with self.assertRaisesRegex(NotImplementedError, "differentiate mla_attention instead"):
            jax.grad(total)(arrays[0])

    def test_operands_that_do_not_fit_raise(self):
        operands, lengths = decode_inputs(cases.TOY["ragged"])
        *arrays, lengths = _arrays(operands, lengths)
        arrays[3] = arrays[3].astype(jnp.bfloat16)
        with self.assertRaisesRegex(ValueError, "operands must have one dtype"):
            mla_decode(*arrays, lengths, scale=SCALE)


if __name__ == "__main__":
    absltest.main()
