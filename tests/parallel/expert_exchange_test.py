"""The exchange against a dense sum over one-hot choices, forward and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.parallel.expert_exchange import exchange_per_shard
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.per_shard import per_shard
from kimi_jax.parallel.rules import BATCH

_TOKENS, _WIDTH, _EXPERTS, _CHOSEN = 16, 6, 8, 3
_SUMMATION_ERROR = 1e-5  # relative: float32 sums in another order


def _linear_experts(matrices, x, ids, weights):
    """Stands for the experts: expert e is the matrix e; foreign ids contribute nothing."""
    local = jnp.arange(matrices.shape[0])
    share = jnp.sum((ids[:, :, None] == local) * weights[:, :, None], axis=1)
    return jnp.einsum("wd,edf,we->wf", x, matrices, share)


def _exchange_per_shard(matrices, x, ids, weights):
    return exchange_per_shard(
        functools.partial(_linear_experts, matrices),
        x,
        ids,
        weights,
        num_local_experts=matrices.shape[0],
    )


def _choices(kind):
    rng = np.random.default_rng(1)
    if kind == "spread":
        return np.argsort(rng.random((_TOKENS, _EXPERTS)))[:, :_CHOSEN]
    if kind == "one_shard":  # experts 6 and 7 live on the last shard only
        return np.tile(np.array([7, 6, 7]), (_TOKENS, 1))
    return np.full((_TOKENS, _CHOSEN), 0)


class ExpertExchangeTest(parameterized.TestCase):
    @parameterized.product(
        mesh_shape=[(1, 1), (8, 1), (1, 8), (2, 4)], kind=["spread", "one_shard", "one_expert"]
    )
    def test_sums_and_gradients_are_those_of_a_dense_computation(self, mesh_shape, kind):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((_TOKENS, _WIDTH)).astype(np.float32)
        matrices = rng.standard_normal((_EXPERTS, _WIDTH, _WIDTH)).astype(np.float32)
        weights = rng.random((_TOKENS, _CHOSEN)).astype(np.float32)
        ids = _choices(kind).astype(np.int32)
        cotangent = rng.standard_normal((_TOKENS, _WIDTH)).astype(np.float32)

        def loss(matrices, x, weights):
            exchange = per_shard(
                _exchange_per_shard,
                in_specs=(P("expert"), BATCH, BATCH, BATCH),
                out_specs=BATCH,
            )
            y = exchange(matrices, x, jax.reshard(ids, BATCH), weights)
            return jnp.sum(y * jax.reshard(cotangent, BATCH)), y

        mesh = make_mesh(ParallelConfig(data=mesh_shape[0], expert=mesh_shape[1]), _EXPERTS)
        with jax.set_mesh(mesh):
            layouts = [jax.NamedSharding(mesh, spec) for spec in (P("expert"), BATCH, BATCH)]
            arguments = jax.device_put([matrices, x, weights], layouts)
            gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
        expected_y, *expected = _dense(matrices, x, weights, ids, cotangent)
        np.testing.assert_allclose(y, expected_y, rtol=_SUMMATION_ERROR, atol=_SUMMATION_ERROR)
        for actual, wanted in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(
                actual, wanted, rtol=_SUMMATION_ERROR, atol=10 * _SUMMATION_ERROR
            )


def _dense(matrices, x, weights, ids, cotangent):
    """Outputs and gradients in float64."""
    matrices, x, weights, cotangent = (
        a.astype(np.float64) for a in (matrices, x, weights, cotangent)
    )
    outputs = np.einsum("wd,edf->wef", x, matrices)[np.arange(_TOKENS)[:, None], ids]
    hits = ids[:, :, None] == np.arange(_EXPERTS)
    share = np.einsum("wke,wk->we", hits, weights)
    return (
        np.einsum("wkf,wk->wf", outputs, weights),
        np.einsum("wd,we,wf->edf", x, share, cotangent),
        np.einsum("we,edf,wf->wd", share, matrices, cotangent),
        np.einsum("wkf,wf->wk", outputs, cotangent),
    )


if __name__ == "__main__":
    absltest.main()
