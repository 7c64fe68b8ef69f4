import dataclasses
import functools
import json
import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from kimi_jax.analysis import hlo
from kimi_jax.analysis.compiled_program import report_device
from kimi_jax.configs.optimizer import (
    NewtonSchulzDtype,
    OptimizerConfig,
    OptimizerName,
    ScheduleConfig,
)
from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import MATRIX, ROUTER, named_specs
from kimi_jax.model import transformer
from kimi_jax.optimizers import muon_clip as mc
from kimi_jax.optimizers.matrix_views import matrix_views
from kimi_jax.optimizers.muon import scale_by_muon
from kimi_jax.parallel import placement
from tests.optimizers import toy_plans
from tests.support import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "optimizer"

# Both sides compute in float32, torch in another order; weights are of order 1.
FLOAT32_ATOL = 3e-5
# bfloat16 keeps 8 bits, and torch rounds each product and sum while ours keeps sums in float32: an
# update of rms 0.2 moves by up to a few percent, times lr 0.02 and 8 steps.
BFLOAT16_ATOL = 8e-3


def config(**options) -> OptimizerConfig:
    peak = options.pop("peak", 0.02)
    return OptimizerConfig(schedule=ScheduleConfig(peak=peak), **options)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if "/" in key}
        return arrays, json.loads(str(file["options"]))


def trajectory(arrays, optimizer_config, plan):
    """Feeds the recorded gradients to our optimizer; returns weights after every step."""
    optimizer = mc.muon_clip(optimizer_config, plan, num_steps=100)
    params = {name: jnp.asarray(arrays[f"initial/{name}"]) for name in plan}
    state = optimizer.init(params)

    @jax.jit
    def step(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for number in range(len(arrays[f"gradients/{next(iter(plan))}"])):
        gradients = {name: jnp.asarray(arrays[f"gradients/{name}"][number]) for name in plan}
        params, state = step(gradients, state, params)
        history.append(params)
    return {name: np.stack([params[name] for params in history]) for name in plan}


def golden_plan(arrays):
    return {
        name: toy_plans.matrix(arrays[f"initial/{name}"].shape, (ax.EMBED, ax.FFN), (ax.EMBED,))
        for name in ("tall", "wide", "square")
    }


class GoldenTest(parameterized.TestCase):
    @parameterized.product(name=["muon_nesterov", "muon_heavy_ball"], dtype=list(NewtonSchulzDtype))
    def test_muon_follows_torch_for_eight_steps(self, name, dtype):
        arrays, options = golden(f"{name}_{dtype.value}")
        ours = trajectory(
            arrays,
            config(
                peak=options["lr"],
                weight_decay=options["weight_decay"],
                momentum=options["momentum"],
                nesterov=options["nesterov"],
                newton_schulz_dtype=dtype,
                max_grad_norm=None,
            ),
            golden_plan(arrays),
        )
        atol = FLOAT32_ATOL if dtype is NewtonSchulzDtype.FLOAT32 else BFLOAT16_ATOL
        for matrix, weights in ours.items():
            np.testing.assert_allclose(weights, arrays[f"weights/{matrix}"], atol=atol)

    def test_adamw_follows_torch_for_eight_steps(self):
        arrays, options = golden("adamw")
        ours = trajectory(
            arrays,
            config(
                name=OptimizerName.ADAMW,
                peak=options["lr"],
                weight_decay=options["weight_decay"],
                adam_b1=options["betas"][0],
                adam_b2=options["betas"][1],
                adam_eps=options["eps"],
                max_grad_norm=None,
            ),
            golden_plan(arrays),
        )
        for matrix, weights in ours.items():
            np.testing.assert_allclose(weights, arrays[f"weights/{matrix}"], atol=FLOAT32_ATOL)


class LabelsTest(parameterized.TestCase):
    def test_every_leaf_has_exactly_the_label_of_its_kind(self):
        plan = toy_plans.model_plan()
        labels = jax.tree.leaves(mc.label_parameters(plan, config()))
        specs = [spec for _, spec in named_specs(plan)]
        self.assertLen(labels, len(specs))
        for label, spec in zip(labels, specs, strict=True):
            expected = {MATRIX: "muon", "selection_bias": "balanced"}.get(spec.kind, "adamw")
            self.assertEqual(label, expected)

    def test_embedding_and_head_are_adamw_and_experts_and_router_are_muon(self):
        plan = toy_plans.model_plan()
        labels = mc.label_parameters(plan, config())
        self.assertEqual((labels["embedding"], labels["head"]), ("adamw", "adamw"))
        feed_forward = labels["moe_blocks"]["feed_forward"]
        self.assertEqual(set(feed_forward["experts"].values()), {"muon"})
        self.assertEqual(feed_forward["router"]["w_router"], "muon")
        self.assertEqual(feed_forward["router"]["selection_bias"], "balanced")

    def test_adamw_takes_the_matrices_when_named(self):
        labels = mc.label_parameters(toy_plans.model_plan(), config(name=OptimizerName.ADAMW))
        self.assertEqual(set(jax.tree.leaves(labels)), {"adamw", "balanced"})

    def test_table_counts_every_value_once(self):
        plan = toy_plans.model_plan()
        rows = [line.split() for line in mc.describe_labels(plan, config()).splitlines()[1:]]
        self.assertEqual([row[0] for row in rows], ["adamw", "balanced", "muon"])
        total = sum(spec.size for _, spec in named_specs(plan))
        self.assertEqual(sum(int(row[3].replace(",", "")) for row in rows), total)
        self.assertEqual(sum(int(row[1]) for row in rows), len(list(named_specs(plan))))
        # 8 MLA matrices in 3 layers, 3 dense, and per MoE layer 3 shared, 3 x 4 experts, 1 router.
        self.assertEqual(int(rows[2][2]), 8 * 3 + 3 + 2 * (3 + 12 + 1))


LEARNING_RATE, DECAY = 0.5, 0.1
PLAN = toy_plans.model_plan()


@functools.cache
def compiled_step(name):
    """One compilation for all tests of a rule; returns updates and the new state."""
    options = config(name=name, peak=LEARNING_RATE, weight_decay=DECAY)
    optimizer = mc.muon_clip(options, PLAN, num_steps=100)
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))


class OneStepTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.params = toy_plans.random_like(PLAN, seed=0)
        self.gradients = toy_plans.random_like(PLAN, seed=1)

    def step(self, name=OptimizerName.MUON_CLIP):
        return compiled_step(name)(self.gradients, self.params)

    def directions(self, updates):
        """Updates before learning rate and decay."""
        return jax.tree.map(lambda u, p: -u / LEARNING_RATE - DECAY * p, updates, self.params)

    def test_each_matrix_has_the_update_rms_of_adamw(self):
        # Jordan's iteration ends with singular values in 0.68 .. 1.2 for all but tiny ones, so that
        # a random matrix's update has 0.2 times their root mean square.
        updates, _ = self.step()
        leaves = jax.tree.leaves(self.directions(updates))
        for (name, spec), update in zip(named_specs(PLAN), leaves, strict=True):
            if spec.kind == MATRIX:
                stack_dims = 2 if "experts" in name else 1
                matrices = update.reshape(*update.shape[:stack_dims], -1)
                rms = np.sqrt(np.mean(np.square(matrices), axis=-1))
                self.assertTrue(np.all((rms > 0.13) & (rms < 0.24)), (name, rms))

    def test_metrics_report_the_rms_by_label_and_role(self):
        updates, state = self.step()
        metrics = mc.optimizer_metrics(state)
        self.assertBetween(float(metrics["optimizer/update_rms_muon"]), 0.13, 0.24)
        np.testing.assert_allclose(
            metrics["optimizer/update_rms_of/embedding"],
            np.sqrt(np.mean(np.square(self.directions(updates)["embedding"]))),
            rtol=1e-5,
        )
        self.assertNotIn("optimizer/update_rms/balanced", metrics)
        self.assertNotIn("optimizer/update_rms_of/selection_bias", metrics)
        self.assertIn("optimizer/update_rms_of/w_q_rope", metrics)

    @parameterized.parameters(list(OptimizerName))
    def test_without_gradients_only_decay_acts_and_not_on_selection_biases(self, name):
        self.gradients = jax.tree.map(jnp.zeros_like, self.gradients)
        updates, _ = self.step(name)
        expected = jax.tree.map(lambda p: -LEARNING_RATE * DECAY * p, self.params)
        router = expected["moe_blocks"]["feed_forward"]["router"]
        router["selection_bias"] = jnp.zeros_like(router["selection_bias"])
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)

    @parameterized.parameters(0.0, 0.1)
    def test_bfloat16_updates_meet_the_weights_in_float32(self, weight_decay):
        plan = {"w_gate": PLAN["moe_blocks"]["feed_forward"]["shared"]["w_gate"]}
        params, gradients = (toy_plans.random_like(plan, seed=s) for s in (0, 1))
        options = config(weight_decay=weight_decay, max_grad_norm=None, peak=0.3)
        optimizer = mc.muon_clip(options, plan, num_steps=100)
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        muon = scale_by_muon(options, plan)
        direction, _ = jax.jit(muon.update)(gradients, muon.init(params))
        self.assertEqual(direction["w_gate"].dtype, jnp.bfloat16)
        direction = np.asarray(direction["w_gate"], np.float64)
        expected = -0.3 * (direction + weight_decay * np.asarray(params["w_gate"], np.float64))
        self.assertEqual(updates["w_gate"].dtype, jnp.float32)
        np.testing.assert_allclose(updates["w_gate"], expected, rtol=1e-6, atol=1e-8)

    @parameterized.parameters(list(OptimizerName))
    def test_selection_biases_do_not_move(self, name):
        updates, _ = self.step(name)
        bias = updates["moe_blocks"]["feed_forward"]["router"]["selection_bias"]
        np.testing.assert_array_equal(bias, np.zeros_like(bias))

    def test_gradient_norm_counts_everything_but_selection_biases(self):
        _, state = self.step(OptimizerName.ADAMW)
        squares = sum(
            np.sum(np.square(np.asarray(gradient, np.float64)))
            for (name, _), gradient in zip(
                named_specs(PLAN), jax.tree.leaves(self.gradients), strict=True
            )
            if not name.endswith("selection_bias")
        )
        norm = mc.optimizer_metrics(state)["optimizer/gradient_norm"]
        np.testing.assert_allclose(norm, np.sqrt(squares), rtol=1e-5)

    def test_state_keeps_its_structure_and_dtypes(self):
        _, state = self.step()
        initial = mc.muon_clip(config(), PLAN, num_steps=100).init(self.params)
        chex.assert_trees_all_equal_shapes_and_dtypes(initial, state)

    def test_no_threshold_measures_and_changes_nothing(self):
        gradients = {"a": jnp.array([3.0, 4.0])}
        clip = mc.clip_by_global_norm(None, {"a": True})
        clipped, state = clip.update(gradients, clip.init(gradients))
        chex.assert_trees_all_equal(clipped, gradients)
        self.assertEqual(float(state.norm), 5.0)

    @parameterized.parameters((0.5, 0.1), (100.0, 1.0))
    def test_gradients_are_scaled_only_above_the_threshold(self, threshold, scale):
        gradients = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([7.0])}
        clip = mc.clip_by_global_norm(threshold, {"a": True, "b": False})
        clipped, state = clip.update(gradients, clip.init(gradients))
        np.testing.assert_allclose(clipped["a"], np.array([3.0, 4.0]) * scale, rtol=1e-6)
        np.testing.assert_array_equal(clipped["b"], [7.0])
        self.assertEqual(float(state.norm), 5.0)

    def test_gradient_that_is_not_finite_is_not_hidden(self):
        gradients = {"a": jnp.array([3.0, jnp.inf])}
        clip = mc.clip_by_global_norm(1.0, {"a": True})
        clipped, state = clip.update(gradients, clip.init(gradients))
        self.assertFalse(np.isfinite(state.norm))
        self.assertTrue(np.all(np.isnan(clipped["a"])))

    def test_router_is_one_matrix_whose_columns_are_experts(self):
        plan = {"w_router": toy_plans.matrix((16, 4), (ax.EMBED, ax.EXPERTS), (ax.EMBED,), ROUTER)}
        params = toy_plans.random_like(plan, seed=0)
        optimizer = mc.muon_clip(config(peak=1.0, weight_decay=0.0), plan, num_steps=10)
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        values = np.linalg.svd(updates["w_router"], compute_uv=False) / (0.2 * 16**0.5)
        self.assertTrue(np.all((values > 0.6) & (values < 1.25)), values)


class OffloadTest(absltest.TestCase):
    def test_momentum_in_host_memory_changes_no_bit(self):
        feed_forward = PLAN["moe_blocks"]["feed_forward"]
        plan = {"w_gate": feed_forward["shared"]["w_gate"], "embedding": PLAN["embedding"]}
        gradients = toy_plans.random_like(plan, seed=1)

        def two_steps(offload_state):
            optimizer = mc.muon_clip(config(offload_state=offload_state), plan, 100)
            params = toy_plans.random_like(plan, seed=0)
            state = jax.jit(optimizer.init)(params)
            for _ in range(2):
                updates, state = jax.jit(optimizer.update)(gradients, state, params)
                params = optax.apply_updates(params, updates)
            kinds = {
                leaf.shape: leaf.sharding.memory_kind for leaf in jax.tree.leaves(state["rules"])
            }
            return params, kinds, mc.optimizer_metrics(state)

        kept, kinds, metrics = two_steps(offload_state=False)
        moved, moved_kinds, moved_metrics = two_steps(offload_state=True)
        momentum, moments = plan["w_gate"].shape, plan["embedding"].shape
        self.assertEqual((kinds[momentum], moved_kinds[momentum]), ("device", "pinned_host"))
        self.assertEqual((kinds[moments], moved_kinds[moments]), ("device", "device"))
        chex.assert_trees_all_equal((moved, moved_metrics), (kept, metrics))


class CompiledUpdateTest(absltest.TestCase):
    """What each of eight devices does in the update of a model that they divide evenly."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        model = dataclasses.replace(tiny.MODEL, num_layers=8, num_dense_layers=0, embed_dim=64)
        cls.plan = transformer.specs(model)
        optimizer = mc.muon_clip(config(), cls.plan, num_steps=100)
        mesh = tiny.mesh(2, 4)
        with jax.set_mesh(mesh):
            params = placement.abstract_parameters(cls.plan, mesh)
            step = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))
            options = {"xla_backend_optimization_level": 0}  # it is read, not run
            cls.program = hlo.parse(step.lower(params, params).compile(options).as_text())
        cls.axis_sizes = mesh.shape

    def largest_result(self, opcode):
        """Values in the largest result of such an operation; 0 without any."""
        sizes = [
            math.prod(array.dims)
            for computation in self.program.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode in (opcode, f"{opcode}-start")
            for array in instruction.arrays
        ]
        return max(sizes, default=0)

    def test_no_all_gather_brings_a_stack_of_experts_together(self):
        stack = self.plan.moe_blocks.feed_forward.experts.w_gate.size
        self.assertLess(self.largest_result("all-gather"), stack)
        self.assertGreater(self.largest_result("all-to-all"), 0)

    def test_flops_are_those_of_the_iteration_on_each_matrix_once(self):
        expected = 0
        for view in matrix_views(self.plan, config().matrix_granularity):
            short, long = sorted(view.matrix_shape)
            # X X^T, A A and the polynomial times X, of which X is short x long.
            expected += 5 * (4 * short**2 * long + 2 * short**3) * math.prod(view.stack_shape)
        report = report_device(self.program, self.axis_sizes)
        self.assertEmpty(report.unknown_loops)
        self.assertBetween(8 * report.total.flops / expected, 0.95, 1.05)


if __name__ == "__main__":
    absltest.main()
