from absl.testing import absltest, parameterized

from kimi_jax.analysis import hlo
from kimi_jax.analysis.integer_values import entry_frame

# A loop as the TPU compiler writes it: no stated trip count, the bound in the condition or passed
# through the state.
_LOOP = """
%body (p: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %p = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, f32[8]{{0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %bound = s32[] get-tuple-element(%p), index=1
  %x = f32[8]{{0}} get-tuple-element(%p), index=2
  ROOT %state = (s32[], s32[], f32[8]{{0}}) tuple(%next, %bound, %x)
}}

%condition (q: (s32[], s32[], f32[8])) -> pred[] {{
  %q = (s32[], s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] {limit}
  ROOT %on = pred[]{{:T(512)}} compare(%j, %limit), direction={direction}
}}

ENTRY %main (x: f32[8], n: s32[]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %n = s32[] parameter(1)
  %first = s32[] constant({first})
  %device = u32[] partition-id()
  %slice = u32[] custom-call(), custom_call_target="SliceId"
  %devices = u32[] constant(4)
  %before = u32[] multiply(%slice, %devices)
  %global = u32[] add(%before, %device)
  %signed = s32[] convert(%global)
  %table = s32[8]{{0}} constant({{9, 8, 7, 6, 5, 4, 3, 2}})
  %looked_up = s32[1]{{0}} dynamic-slice(%table, %signed), dynamic_slice_sizes={{1}}
  %entry = s32[] bitcast(%looked_up)
  %copied = s32[] copy(%first)
  %init = (s32[], s32[], f32[8]{{0}}) tuple(%copied, {bound}, %x)
  ROOT %loop = (s32[], s32[], f32[8]{{0}}) while(%init), condition=%condition, body=%body
}}
"""
_PASSED = "get-tuple-element(%q), index=1"


def _trip_count(*, device=0, **parts):
    defaults = {"first": 0, "step": 1, "limit": _PASSED, "direction": "LT", "bound": "%n"}
    module = hlo.parse("HloModule m, num_partitions=4\n\n" + _LOOP.format(**defaults | parts))
    return entry_frame(module, device).trip_count(module.entry.root)


class TripCountTest(parameterized.TestCase):
    @parameterized.parameters(
        (0, 1, "constant(61)", "LT", 61),
        (3, 1, "constant(61)", "LE", 59),
        (0, 7, "constant(20)", "LT", 3),
        (60, -1, "constant(0)", "GT", 60),
        (5, 1, "constant(5)", "LT", 0),
        (0, 0, "constant(5)", "LT", None),  # never ends
    )
    def test_a_bound_in_the_condition(self, first, step, limit, direction, expected):
        trips = _trip_count(first=first, step=step, limit=limit, direction=direction)
        self.assertEqual(trips, expected)

    def test_a_bound_that_the_state_passes_on(self):
        self.assertEqual(_trip_count(bound="%first", first=0, limit="constant(4)"), 4)
        self.assertEqual(_trip_count(bound="%entry"), 9)

    def test_a_bound_that_depends_on_the_device(self):
        self.assertEqual([_trip_count(bound="%entry", device=d) for d in (1, 7)], [8, 2])

    def test_a_bound_that_is_data_is_unknown(self):
        self.assertIsNone(_trip_count(bound="%n"))


if __name__ == "__main__":
    absltest.main()
