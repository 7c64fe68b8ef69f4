import pathlib
import signal
import subprocess
import sys
import time

import jax
from absl.testing import absltest, parameterized

from kimi_jax.core.errors import ConfigError
from kimi_jax.parallel import multihost, watch
from tests.support import tiny

QUIET_SECONDS = 2.0
# What `python watch.py` runs, with less patience.
_PROGRAM = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(watch.__file__).parent)!r})
import watch
watch.BEAT_SECONDS, watch.QUIET_SECONDS, watch.FAILURE_SECONDS = 0.2, {QUIET_SECONDS}, 1.0
watch.main()
"""


class JobTest(parameterized.TestCase):
    @parameterized.parameters(
        (None, 2, 0, "are for --coordinator=HOST:PORT"),
        ("auto", 2, None, "are for --coordinator=HOST:PORT"),
        ("localhost:1234", None, None, "needs --num_processes"),
        ("localhost:1234", 2, None, "needs --num_processes"),
        ("localhost:1234", 2, 2, "got 2 and 2"),
        ("localhost", 2, 0, "must be auto or HOST:PORT, got 'localhost'"),
    )
    def test_options_that_do_not_fit_say_what_would(self, coordinator, count, index, message):
        with self.assertRaisesRegex(ConfigError, message):
            multihost.Job(coordinator, count, index)

    def test_one_process_needs_nothing_of_it(self):
        with multihost.Job(None, None, None):
            self.assertTrue(multihost.is_first())
            multihost.wait_for_all("nobody")
            with multihost.first_before_others("nobody"):
                pass
            multihost.check_mesh(tiny.mesh(1, 1))
            self.assertEqual(multihost.Maximum(tiny.mesh(2, 4))(7), 7)
        self.assertFalse(jax.distributed.is_initialized())


class WatcherTest(absltest.TestCase):
    """Three watchers on this machine, with this test in place of their processes."""

    def setUp(self):
        super().setUp()
        first = self._start("0", "3")
        port = first.stdout.readline().strip()
        self.watchers = [first, *(self._start(str(i), "3", f"localhost:{port}") for i in (1, 2))]
        time.sleep(0.5)  # for their names to arrive

    def _start(self, *arguments):
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.enterContext(watcher)
        self.addCleanup(watcher.kill)
        return watcher

    def _say(self, index, line):
        self.watchers[index].stdin.write(line + "\n")
        self.watchers[index].stdin.flush()

    def _expect(self, index, code, message):
        found = self.watchers[index].wait(timeout=20)
        errors = self.watchers[index].stderr.read()
        self.assertEqual(found, code, errors)
        self.assertRegex(errors, message or "^$")

    def test_all_hear_of_a_process_that_is_gone(self):
        self.watchers[2].stdin.close()
        for index in (0, 1):
            self._expect(index, watch.LOST_EXIT, r"PeerLostError: process 2 \(.*\) was lost")
        self._expect(2, 0, None)

    def test_all_hear_of_the_first_process_though_their_own_goes_with_it(self):
        for index in (2, 1, 0):  # JAX ends the others before their watchers hear of anything
            self.watchers[index].stdin.close()
        for index in (1, 2):
            self._expect(index, watch.LOST_EXIT, r"process 0 \(.*\) was lost")

    def test_all_hear_why_a_process_failed_unless_they_fail_too(self):
        self._say(1, "failed DataError: no documents")
        self._say(2, "failed DataError: no documents")
        self._expect(0, watch.LOST_EXIT, r"process [12] \(.*\) failed: DataError: no documents\.")
        self.watchers[1].stdin.close()
        self.watchers[2].stdin.close()
        self._expect(1, 0, None)
        self._expect(2, 0, None)

    def test_processes_that_have_agreed_to_leave_do_so_in_silence(self):
        for index in (1, 0, 2):
            self._say(index, "end")
            self.watchers[index].stdin.close()
            self._expect(index, 0, None)
            time.sleep(0.2)  # the others hear of it while they still work

    def test_all_hear_of_a_host_that_is_silent(self):
        # It says nothing more, and keeps its connection open.
        self.watchers[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        for index in (0, 2):
            self._expect(index, watch.LOST_EXIT, r"process 1 \(.*\) has been silent for 2 seconds")
        self.assertGreater(time.monotonic() - stopped, QUIET_SECONDS / 2)


if __name__ == "__main__":
    absltest.main()
