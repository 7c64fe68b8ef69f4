import jax
from absl.testing import absltest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kimi_jax.core import axes as ax
from kimi_jax.core.errors import ConfigError
from kimi_jax.core.param_spec import MATRIX, NORM, ROUTED_EXPERT, ParamSpec
from kimi_jax.parallel import rules

_SIZES = {"pipe": 1, "replica": 1, "data": 2, "expert": 4, "context": 1, "tensor": 1}


def _spec(shape, axes, *tags):
    tags = frozenset(tags or {MATRIX})
    return ParamSpec(
        shape=shape,
        axes=axes,
        init=jax.nn.initializers.zeros,
        tags=tags,
        inputs=() if NORM in tags else axes[-2:-1],
    )


class RulesTest(absltest.TestCase):
    def test_a_dense_matrix_is_stored_over_the_whole_mesh_and_computed_whole(self):
        spec = _spec((16, 24), (ax.EMBED, ax.FFN))
        self.assertEqual(
            rules.partition_spec(spec, rules.STORAGE, _SIZES), P(("data", "expert"), None)
        )
        self.assertEqual(rules.partition_spec(spec, rules.COMPUTE, _SIZES), P(None, None))

    def test_an_expert_stays_on_the_expert_axis_and_its_width_takes_the_rest(self):
        spec = _spec((8, 16, 24), (ax.EXPERTS, ax.EMBED, ax.EXPERT_FFN), MATRIX, ROUTED_EXPERT)
        self.assertEqual(
            rules.partition_spec(spec, rules.STORAGE, _SIZES), P("expert", "data", None)
        )
        self.assertEqual(rules.partition_spec(spec, rules.COMPUTE, _SIZES), P("expert", None, None))

    def test_an_axis_that_does_not_divide_leaves_the_dimension_whole(self):
        spec = _spec((6, 24), (ax.EMBED, ax.FFN))
        self.assertEqual(rules.partition_spec(spec, rules.STORAGE, _SIZES), P("data", None))
        spec = _spec((5, 24), (ax.EMBED, ax.FFN))
        self.assertEqual(rules.partition_spec(spec, rules.STORAGE, _SIZES), P(None, None))

    def test_heads_are_computed_apart_over_tensor_and_context(self):
        sizes = _SIZES | {"context": 2, "tensor": 4}
        spec = _spec((16, 8, 24), (ax.Q_LATENT, ax.HEADS, ax.HEAD_NOPE))
        self.assertEqual(
            rules.partition_spec(spec, rules.COMPUTE, sizes), P(None, ("tensor", "context"), None)
        )
        self.assertEqual(
            rules.partition_spec(spec, rules.STORAGE, sizes),
            P(("data", "expert"), ("tensor", "context"), None),
        )

    def test_two_dimensions_that_want_one_axis_are_served_in_the_order_of_the_table(self):
        sizes = _SIZES | {"context": 2, "tensor": 4}
        spec = _spec((64, 24), (ax.EMBED, ax.FFN))
        layout = P(("data", "expert", "context"), "tensor")
        self.assertEqual(rules.partition_spec(spec, rules.STORAGE, sizes), layout)

    def test_replicas_hold_copies(self):
        spec = _spec((16, 24), (ax.EMBED, ax.FFN))
        layout = rules.partition_spec(spec, rules.STORAGE, _SIZES | {"replica": 2})
        self.assertEqual(layout, P(("data", "expert"), None))

    def test_stages_share_every_weight_in_storage_and_deal_out_whole_layers_to_compute(self):
        spec = _spec((8, 16, 24), (ax.EXPERTS, ax.EMBED, ax.EXPERT_FFN), MATRIX, ROUTED_EXPERT)
        layout = rules.partition_spec(spec, rules.STORAGE, _SIZES | {"pipe": 2})
        self.assertEqual(layout, P("expert", ("data", "pipe"), None))
        self.assertEqual(rules.without(layout, {"pipe"}), P("expert", ("data",), None))

    def test_a_layout_leaves_out_what_is_manual_where_it_is_used(self):
        mesh = jax.sharding.AbstractMesh(
            (2, 2), ("pipe", "data"), axis_types=(AxisType.Manual, AxisType.Explicit)
        )
        layout = P(("pipe", "data"), "pipe", None)
        with jax.sharding.use_abstract_mesh(mesh):
            self.assertEqual(rules.here(layout), P(("data",), None, None))
        self.assertEqual(rules.here(layout), layout)

    def test_a_dimension_names_its_axes_the_slowest_first(self):
        axes = [rules.entry_axes(entry) for entry in P(("pipe", "data"), "tensor", None)]
        self.assertEqual(axes, [("pipe", "data"), ("tensor",), ()])

    def test_a_table_with_an_unknown_or_repeated_axis_is_refused(self):
        spec = _spec((16, 24), (ax.EMBED, ax.FFN))
        with self.assertRaisesRegex(ConfigError, "'ffn' names the mesh axes .'model'.; the mesh"):
            rules.partition_spec(spec, {ax.FFN: ("data", "model")}, _SIZES)
        with self.assertRaisesRegex(ConfigError, "'ffn' names a mesh axis twice"):
            rules.partition_spec(spec, {ax.FFN: ("data", "data")}, _SIZES)

    def test_vectors_are_kept_whole(self):
        spec = _spec((16,), (ax.EMBED,), NORM)
        self.assertEqual(rules.partition_spec(spec, rules.STORAGE, _SIZES), P())


if __name__ == "__main__":
    absltest.main()
