import subprocess
import sys

from absl.testing import absltest

# Touches and frees a block in a thread that is not the first one, as XLA does.
_PROGRAM = """
import ctypes, platform, resource, sys, threading
if platform.libc_ver()[0] != "glibc":
    sys.exit(3)
from kimi_jax.core.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory(one_heap=True)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def touch():
    for _ in range(5):
        block = ctypes.c_void_p(libc.malloc(2**26))
        libc.memset(block, 1, 2**26)
        libc.free(block)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
thread = threading.Thread(target=touch)
thread.start()
thread.join()
print((faults() - before) * resource.getpagesize() / 2**26)
"""


def _blocks_faulted(mode: str) -> float:
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=False
    )
    if result.returncode == 3:
        raise absltest.SkipTest("only glibc has these settings")
    return float(result.stdout)


class KeepFreedMemoryTest(absltest.TestCase):
    def test_a_block_that_is_allocated_again_is_not_faulted_in_again(self):
        self.assertGreater(_blocks_faulted("return"), 4)
        self.assertLess(_blocks_faulted("keep"), 2)


if __name__ == "__main__":
    absltest.main()
