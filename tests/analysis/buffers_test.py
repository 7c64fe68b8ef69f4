import pathlib
import tempfile

import jax
import jax.numpy as jnp
from absl.testing import absltest

from kimi_jax.analysis.buffers import buffers_at_peak, dump_options, read_dump

_ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, page 0, parameter 0, shape |f32[1024]| at ShapeIndex {}:
 value: <53 param @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 1: size 9000, page 0, preallocated-temp:
 value: <55 early @0> (size=8000,offset=0): f32[2000]{0:T(1024)}
 value: <56 pair{} @0> (size=16,offset=8984): (f32[500]{0}, f32[800]{0})
 value: <57 pair{0} @0> (size=2000,offset=0): f32[500]{0:T(1024)}
 value: <58 pair{1} @0> (size=3200,offset=2000): f32[800]{0:T(1024)}
 value: <59 in_place @0> (size=3200,offset=2000): f32[800]{0:T(1024)}
 value: <60 large @0> (size=4000,offset=5000): bf16[10,200]{1,0:T(8,128)(2,1)}
allocation 2: size 9999, color 1, page 0, preallocated-temp:
 value: <61 near @1> (size=9999,offset=0): f32[2000]{0:T(1024)S(1)}
"""
_LIVE = """HloLiveRange (max 9):
  InstructionSequence:
    0:early
  BufferLiveRange:
    param{}:0-9
    early{}:0-2
    pair{}:2-3
    pair{0}:2-7
    pair{1}:2-4
    in_place{}:4-8
    large{}:5-8
    near{}:0-9
"""


class BuffersTest(absltest.TestCase):
    def test_the_fullest_moment_decides_not_the_largest_value(self):
        found = buffers_at_peak(_ASSIGNMENT, _LIVE)
        self.assertEqual([b.name for b in found], ["large", "in_place", "pair"])
        self.assertEqual([b.bytes for b in found], [4000, 3200, 2000])
        self.assertEqual(found[0].shape, "bf16[10,200]")

    def test_the_compiler_of_the_cpu_writes_what_is_read(self):
        @jax.jit
        def step(x):
            with jax.named_scope("widen"):
                wide = jnp.sin(jnp.outer(x, x))
            return wide @ wide

        with tempfile.TemporaryDirectory() as folder:
            lowered = step.lower(jax.ShapeDtypeStruct((300,), jnp.float32))
            lowered.compile(dump_options(folder))
            named = read_dump(pathlib.Path(folder))
        self.assertEqual((named[0].bytes, named[0].shape), (300 * 300 * 4, "f32[300,300]"))
        self.assertIn("widen", named[0].operation_name)

    def test_a_folder_without_a_dump_is_an_error(self):
        with (
            tempfile.TemporaryDirectory() as folder,
            self.assertRaisesRegex(FileNotFoundError, "no buffer assignment"),
        ):
            read_dump(pathlib.Path(folder))


if __name__ == "__main__":
    absltest.main()
