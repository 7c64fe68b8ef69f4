"""The exchange against a dense sum over one-hot choices, forward and gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.compute import ComputeConfig, Exchange
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.parallel.expert_exchange import exchange_per_shard
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.per_shard import per_shard
from kimi_jax.parallel.rules import BATCH

_TOKENS, _WIDTH, _EXPERTS, _CHOSEN = 16, 6, 16, 3
_SUMMATION_ERROR = 1e-5  # relative: float32 sums in another order


def _linear_experts(matrices, x, ids, weights):
    """Stands for the experts: expert e is the matrix e; foreign ids contribute nothing.

    An empty place, the only one whose weight is 0, that comes with an expert spoils the result.
    """
    local = jnp.arange(matrices.shape[0])
    is_local = ids[:, :, None] == local
    share = jnp.sum(is_local * weights[:, :, None], axis=1)
    spoilt = jnp.any(is_local & (weights[:, :, None] == 0))
    return jnp.einsum("wd,edf,we->wf", x, matrices, share) + jnp.where(spoilt, jnp.nan, 0.0)


def _exchange_per_shard(matrices, x, ids, weights, *, choices):
    y, dropped = exchange_per_shard(
        functools.partial(_linear_experts, matrices),
        x,
        ids,
        weights,
        num_local_experts=matrices.shape[0],
        choices=choices,
    )
    return y, dropped[None]


def _run(mesh_shape, ids, choices):
    """Returns outputs, dropped assignments by device, gradients, and the same in float64."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((_TOKENS, _WIDTH)).astype(np.float32)
    matrices = rng.standard_normal((_EXPERTS, _WIDTH, _WIDTH)).astype(np.float32)
    weights = rng.random((_TOKENS, _CHOSEN)).astype(np.float32)
    cotangent = rng.standard_normal((_TOKENS, _WIDTH)).astype(np.float32)

    def loss(matrices, x, weights):
        exchange = per_shard(
            functools.partial(_exchange_per_shard, choices=choices),
            in_specs=(P("expert"), BATCH, BATCH, BATCH),
            out_specs=BATCH,
        )
        y, dropped = exchange(matrices, x, jax.reshard(ids, BATCH), weights)
        return jnp.sum(y * jax.reshard(cotangent, BATCH)), (y, dropped)

    mesh = make_mesh(ParallelConfig(data=mesh_shape[0], expert=mesh_shape[1]), _EXPERTS)
    with jax.set_mesh(mesh):
        layouts = [jax.NamedSharding(mesh, spec) for spec in (P("expert"), BATCH, BATCH)]
        arguments = jax.device_put([matrices, x, weights], layouts)
        gradients, (y, dropped) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
            *arguments
        )
    kept = _kept(ids, mesh_shape[1], choices)
    return (y, *gradients), dropped, _dense(matrices, x, weights * kept, ids, cotangent, kept)


def _kept(ids, devices, choices):
    """Says which assignments find room, by walking over them one after the other; data axis 1."""
    kept = np.ones(ids.shape)
    if choices.exchange_capacity is None or choices.exchange is Exchange.GATHER or devices == 1:
        return kept
    tokens = _TOKENS // devices
    even = choices.exchange_capacity * tokens * _CHOSEN
    room = {Exchange.RAGGED: math.ceil(even / 8) * 8, Exchange.PADDED: math.ceil(even / devices)}
    taken = {}
    for sender in range(devices):
        own = [(ids[t, k], t, k) for t in range(sender * tokens, (sender + 1) * tokens)
               for k in range(_CHOSEN)]  # fmt: skip
        for expert, token, k in sorted(own):
            receiver = expert // (_EXPERTS // devices)
            key = receiver if choices.exchange is Exchange.RAGGED else (sender, receiver)
            taken[key] = taken.get(key, 0) + 1
            kept[token, k] = taken[key] <= room[choices.exchange]
    return kept


def _choices(kind):
    rng = np.random.default_rng(1)
    if kind == "spread":
        ids = np.argsort(rng.random((_TOKENS, _EXPERTS)))[:, :_CHOSEN]
    elif kind == "few_experts":  # the last device has one of them, most devices have none
        ids = np.argsort(rng.random((_TOKENS, 4)))[:, :_CHOSEN] * 5
    else:  # on 4 devices, experts 12 to 15 are the last one's
        ids = np.tile(np.array([15, 12, 13]), (_TOKENS, 1))
    return ids.astype(np.int32)


class ExpertExchangeTest(parameterized.TestCase):
    @parameterized.product(
        mesh_shape=[(1, 8), (2, 4)],
        kind=["spread", "few_experts", "one_shard"],
        exchange=[Exchange.GATHER, Exchange.PADDED, Exchange.RAGGED],
    )
    def test_sums_and_gradients_are_those_of_a_dense_computation(self, mesh_shape, kind, exchange):
        self._check_nothing_is_dropped(mesh_shape, kind, exchange)

    @parameterized.parameters((1, 1), (8, 1))
    def test_an_axis_of_one_device_exchanges_nothing(self, *mesh_shape):
        self._check_nothing_is_dropped(mesh_shape, "spread", Exchange.RAGGED)

    def _check_nothing_is_dropped(self, mesh_shape, kind, exchange):
        choices = ComputeConfig(exchange=exchange)
        actual, dropped, expected = _run(mesh_shape, _choices(kind), choices)
        self._assert_close(actual, expected)
        np.testing.assert_array_equal(dropped, 0)

    @parameterized.product(
        exchange=[Exchange.PADDED, Exchange.RAGGED],
        kind=["spread", "one_shard"],
        capacity=[0.5, 1.5],
    )
    def test_what_finds_no_room_is_left_out_and_counted(self, exchange, kind, capacity):
        ids = _choices(kind)
        choices = ComputeConfig(exchange=exchange, exchange_capacity=capacity)
        actual, dropped, expected = _run((1, 4), ids, choices)
        self._assert_close(actual, expected)
        lost = (1 - _kept(ids, 4, choices)).reshape(4, -1).sum(axis=1)
        np.testing.assert_array_equal(dropped, lost)
        self.assertGreater(lost.sum() + (kind == "spread" and capacity > 1), 0)

    def _assert_close(self, actual, expected):
        for one, wanted in zip(actual, expected, strict=True):
            np.testing.assert_allclose(
                one, wanted, rtol=_SUMMATION_ERROR, atol=10 * _SUMMATION_ERROR
            )


def _dense(matrices, x, weights, ids, cotangent, kept):
    """Outputs and gradients in float64; an assignment that is not kept has weight 0."""
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
        np.einsum("wkf,wf->wk", outputs, cotangent) * kept,
    )


if __name__ == "__main__":
    absltest.main()
