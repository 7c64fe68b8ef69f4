import dataclasses

import jax
import numpy as np
from absl.testing import absltest
from flax import struct

from kimi_jax.core import axes as ax
from kimi_jax.core import param_spec
from kimi_jax.core.param_spec import MATRIX, NORM, Leaf, ParamSpec


@struct.dataclass
class _Params:
    w: Leaf
    gain: Leaf


def _plan():
    return _Params(
        w=ParamSpec(
            shape=(3, 4),
            axes=(ax.EMBED, ax.FFN),
            init=jax.nn.initializers.zeros,
            tags=frozenset({MATRIX}),
            inputs=(ax.EMBED,),
        ),
        gain=ParamSpec(
            shape=(3,), axes=(ax.EMBED,), init=jax.nn.initializers.ones, tags=frozenset({NORM})
        ),
    )


class ParamSpecTest(absltest.TestCase):
    def test_names_are_dotted_paths_in_tree_order(self):
        names = [name for name, _ in param_spec.named_specs({"a": _plan()})]
        self.assertEqual(names, ["a.w", "a.gain"])

    def test_count_is_the_number_of_values(self):
        self.assertEqual(param_spec.count_parameters(_plan()), 15)

    def test_count_does_not_overflow(self):
        huge = dataclasses.replace(_plan().w, shape=(2**40, 2**40))
        self.assertEqual(param_spec.count_parameters(huge), 2**80)

    def test_stack_adds_a_layer_axis_to_every_leaf(self):
        stacked = param_spec.stack(_plan(), 5)
        self.assertEqual(stacked.w.shape, (5, 3, 4))
        self.assertEqual(stacked.gain.axes, (ax.LAYERS, ax.EMBED))
        self.assertEqual(stacked.w.inputs, (ax.EMBED,))

    def test_map_reaches_specs_and_the_leaves_in_their_place(self):
        values = _Params(w=np.ones((3, 4)), gain=np.ones(3))
        shapes = param_spec.map_specs(lambda spec, v: v.shape == spec.shape, _plan(), values)
        self.assertEqual(shapes, _Params(w=True, gain=True))

    def test_a_spec_without_exactly_one_kind_is_our_own_mistake(self):
        with self.assertRaises(AssertionError):
            dataclasses.replace(_plan().gain, tags=frozenset())
        with self.assertRaises(AssertionError):
            dataclasses.replace(_plan().gain, tags=frozenset({NORM, MATRIX}))

    def test_a_matrix_must_say_which_axes_are_its_inputs(self):
        with self.assertRaises(AssertionError):
            dataclasses.replace(_plan().w, inputs=())


if __name__ == "__main__":
    absltest.main()
