from absl.testing import absltest, parameterized

from kimi_jax.analysis.scopes import BACKWARD, FORWARD, RECOMPUTED, Scope, read_scope

_STEP = "jit(train_step)/train_step"
_LAYER = "while/body/eval_jaxpr"


class ScopesTest(parameterized.TestCase):
    @parameterized.parameters(
        (
            f"{_STEP}/jvp(transformer)/{_LAYER}/block/mla/queries/btd,dq->btq/dot_general",
            "transformer/block/mla/queries",
            FORWARD,
        ),
        (
            f"{_STEP}/transpose(jvp(transformer))/{_LAYER}/checkpoint/rematted_computation/block/"
            "moe/shard_map/experts/grouped_swiglu/dot_general",
            "transformer/block/moe/experts",
            RECOMPUTED,
        ),
        (
            f"{_STEP}/transpose(jvp(transformer))/{_LAYER}/checkpoint/block/rms_norm/mul",
            "transformer/block/rms_norm",
            BACKWARD,
        ),
        (
            f"{_STEP}/optimizer/newton_schulz/shard_map/cond/branch_0_fun/while/body/vmap()/mul",
            "optimizer/newton_schulz",
            FORWARD,
        ),
    )
    def test_names_of_the_step_become_scopes(self, operation_name, name, phase):
        scope = read_scope(operation_name, depth=4, skip=("train_step",))
        self.assertEqual(scope, Scope(name, phase))

    @parameterized.parameters("", "state.params.head", f"{_STEP}/while/body/add")
    def test_names_without_scopes_have_none(self, operation_name):
        self.assertIsNone(read_scope(operation_name, depth=4, skip=("train_step",)))


if __name__ == "__main__":
    absltest.main()
