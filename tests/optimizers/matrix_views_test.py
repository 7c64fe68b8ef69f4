import jax
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.optimizer import MatrixGranularity
from kimi_jax.core.param_spec import MATRIX, is_spec, named_specs
from kimi_jax.optimizers.matrix_views import count_matrices, matrix_views
from tests.optimizers import toy_plans

FUSED, ROLE, HEAD = MatrixGranularity.FUSED, MatrixGranularity.ROLE, MatrixGranularity.HEAD


def views_by_name(plan, granularity):
    return {name: view for view in matrix_views(plan, granularity) for name in view.names}


class MatrixViewsTest(parameterized.TestCase):
    @parameterized.parameters(list(MatrixGranularity))
    def test_every_matrix_leaf_is_in_exactly_one_view(self, granularity):
        plan = toy_plans.model_plan()
        names = [name for view in matrix_views(plan, granularity) for name in view.names]
        matrices = [name for name, spec in named_specs(plan) if spec.kind == MATRIX]
        self.assertCountEqual(names, matrices)

    @parameterized.parameters(
        # toy sizes: D 16, Q 8, N 2, H 4, R 2, U 4, C 8, M 8, E 4; two layers
        (ROLE, "attention.w_q_nope", (2,), (8, 8)),
        (ROLE, "attention.w_out", (2,), (8, 16)),
        (ROLE, "feed_forward.experts.w_gate", (2, 4), (16, 8)),
        (ROLE, "feed_forward.experts.w_down", (2, 4), (8, 16)),
        (ROLE, "feed_forward.router.w_router", (2,), (16, 4)),
        (FUSED, "attention.w_q_nope", (2,), (8, 12)),
        (FUSED, "attention.w_k_rope", (2,), (16, 10)),
        (FUSED, "attention.w_value", (2,), (8, 16)),
        (FUSED, "attention.w_out", (2,), (8, 16)),
        (HEAD, "attention.w_q_rope", (2, 2), (8, 2)),
        (HEAD, "attention.w_value", (2, 2), (8, 4)),
        (HEAD, "attention.w_out", (2,), (8, 16)),
    )
    def test_matrices_have_the_shape_of_the_granularity(self, granularity, name, stack, shape):
        view = views_by_name(toy_plans.model_plan(), granularity)[f"moe_blocks.{name}"]
        self.assertEqual(view.stack_shape, stack)
        self.assertEqual(view.matrix_shape, shape)

    def test_fused_views_do_not_mix_blocks(self):
        view = views_by_name(toy_plans.model_plan(), FUSED)["moe_blocks.attention.w_k_nope"]
        self.assertEqual(
            view.names, ("moe_blocks.attention.w_k_nope", "moe_blocks.attention.w_value")
        )

    @parameterized.parameters(list(MatrixGranularity))
    def test_splitting_undoes_joining(self, granularity):
        plan = toy_plans.model_plan()
        leaves = jax.tree.leaves(toy_plans.random_like(plan, seed=0))
        for view in matrix_views(plan, granularity):
            stacks = view.to_stacks(leaves)
            join, split = view.join, view.split
            for _ in view.stack_shape:
                join, split = jax.vmap(join), jax.vmap(split)
            matrices = join(stacks)
            self.assertEqual(matrices.shape, view.stack_shape + view.matrix_shape)
            for index, leaf in view.from_stacks(split(matrices)).items():
                np.testing.assert_array_equal(leaf, leaves[index])

    def test_head_view_holds_the_columns_of_one_head(self):
        plan = toy_plans.model_plan()
        leaves = jax.tree.leaves(toy_plans.random_like(plan, seed=0))
        names = [name for name, _ in named_specs(plan)]
        name = "moe_blocks.attention.w_k_nope"
        (stack,) = views_by_name(plan, HEAD)[name].to_stacks(leaves)
        leaf = leaves[names.index(name)]  # [L, C, N, H]
        np.testing.assert_array_equal(stack[1, 0], leaf[1, :, 0])

    def test_counting_agrees_with_the_stack(self):
        plan = toy_plans.model_plan()
        for view in matrix_views(plan, HEAD):
            values = sum(jax.tree.leaves(plan, is_leaf=is_spec)[m.index].size for m in view.members)
            self.assertEqual(count_matrices(view) * np.prod(view.matrix_shape), values)


if __name__ == "__main__":
    absltest.main()
