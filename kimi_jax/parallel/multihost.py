"""Runs of several processes: joining them, what only the first may do, and leaving together.

On a single process everything here does nothing and costs nothing.
"""

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.core.errors import ConfigError, KimiError, TrainingInterruptedError, require
from kimi_jax.parallel import watch

AUTO = "auto"  # coordinator that JAX finds by itself
# For all processes to leave once each has said that it is done, or for one to leave that failed.
_SHUTDOWN_SECONDS = 10
# A collective that fails is often the echo of a lost process, which the watcher is about to name.
_ECHO_SECONDS = 3.0
_LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000  # process 0 may tokenise for days; the watcher sees deaths
_WATCHER_PORT = "kimi_jax/watcher_port"


class Job:
    """A context manager: the processes that train together.

    Enter it before the first array is made. While it is open, a process that dies, hangs up or
    fails ends all others within `watch.QUIET_SECONDS`, with a message that names it. Leaving it
    waits for all processes.
    """

    def __init__(
        self, coordinator: str | None, num_processes: int | None, process_id: int | None
    ) -> None:
        """Joins nothing yet.

        Args:
          coordinator: host:port of process 0; "auto" where JAX recognises the cluster (TPU pods,
            SLURM, Kubernetes, Open MPI); None runs this process alone.
          num_processes: of the job; None for "auto" and None.
          process_id: of this process, from 0; None for "auto" and None.

        Raises:
          ConfigError: they do not fit each other.
        """
        counted = num_processes is not None and process_id is not None
        if coordinator in (None, AUTO):
            require(
                num_processes is None and process_id is None,
                "--num_processes and --process_id are for --coordinator=HOST:PORT, the address of "
                f"process 0; got --coordinator={coordinator}",
            )
        else:
            require(
                counted and 0 <= process_id < num_processes,
                f"--coordinator={coordinator} needs --num_processes, and --process_id from 0 to "
                f"one less; got {num_processes} and {process_id}. Or let JAX find them, with "
                f"--coordinator={AUTO}",
            )
            host, _, port = coordinator.rpartition(":")
            require(
                bool(host) and port.isdigit(),
                f"--coordinator must be {AUTO} or HOST:PORT, got {coordinator!r}",
            )
        self._arguments = (coordinator, num_processes, process_id)
        self._watcher: subprocess.Popen | None = None

    def __enter__(self) -> "Job":
        coordinator, num_processes, process_id = self._arguments
        if coordinator is None:
            return self
        # It catches SIGTERM, which training.faults does.
        jax.config.update("jax_enable_preemption_service", False)
        automatic = coordinator == AUTO
        try:
            jax.distributed.initialize(
                None if automatic else coordinator,
                num_processes,
                process_id,
                # Otherwise SLURM's variables would give each process one GPU even so.
                cluster_detection_method=None if automatic else "deactivate",
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
        except ValueError as error:
            raise ConfigError(
                f"--coordinator={coordinator} found no cluster ({error}); give "
                "--coordinator=HOST:PORT, --num_processes and --process_id"
            ) from error
        self._watcher = _start_watcher()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._watcher is None:
            return
        if error is None or isinstance(error, TrainingInterruptedError):
            wait_for_all("end of the job")
            self._tell("end")
            jax.distributed.shutdown()
        else:
            if not isinstance(error, KimiError):
                time.sleep(_ECHO_SECONDS)
            reason = next(iter(str(error).splitlines()), "")
            self._tell(f"failed {type(error).__name__}: {reason}")
            _leave_without_the_others()

    def _tell(self, line: str) -> None:
        self._watcher.stdin.write(line.encode() + b"\n")
        self._watcher.stdin.flush()


def _start_watcher() -> subprocess.Popen:
    """Starts the watcher of this process, and a thread that ends the process when it says so."""
    state = _runtime()
    index, count = state.process_id, state.num_processes
    # The watcher needs neither JAX nor this package, and starts in milliseconds without.
    arguments = [str(index), str(count)]
    if index != 0:
        host = state.coordinator_address.rpartition(":")[0]
        port = state.client.blocking_key_value_get(_WATCHER_PORT, 1000 * int(watch.START_SECONDS))
        arguments.append(f"{host}:{port}")
    command = [sys.executable, "-I", "-S", watch.__file__, *arguments]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if index == 0:
        port = watcher.stdout.readline().decode().strip()
        state.client.key_value_set(_WATCHER_PORT, port)

    def obey() -> None:
        if watcher.wait():
            os._exit(watch.LOST_EXIT)  # the main thread may hang in a collective for ever

    threading.Thread(target=obey, name="watcher", daemon=True).start()
    return watcher


def _leave_without_the_others() -> None:
    """Keeps JAX from waiting for the others when Python ends, and from aborting this process."""
    state = _runtime()
    for part in (state.client, state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))  # it is never taken down
    state.client = state.service = None


def _runtime():
    """The distributed runtime's state; JAX has no public name for its barriers and key-value store.

    Orbax uses the same.
    """
    from jax._src import distributed

    return distributed.global_state


def is_first() -> bool:
    """True in the process that writes files and speaks to the terminal."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has called it with the same, unique `what`."""
    if jax.process_count() > 1:
        _runtime().client.wait_at_barrier(what, _LONGEST_WAIT_MS)


@contextlib.contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """Runs a block in process 0, and when that is done in all other processes.

    Args:
      what: unique name of the block.
    """
    if not is_first():
        wait_for_all(what)
    yield
    if is_first():
        wait_for_all(what)


def check_mesh(mesh: Mesh) -> None:
    """Raises `ConfigError` unless the mesh has all devices of a job of several processes."""
    require(
        jax.process_count() == 1 or mesh.size == jax.device_count(),
        f"the mesh has {mesh.size} of the {jax.device_count()} devices of the job's "
        f"{jax.process_count()} processes; raise the sizes in parallel to use all of them, or "
        "start fewer processes",
    )


class Maximum:
    """The largest of the processes' numbers, one call late, so that no process waits for it.

    One small all-reduce a call; nothing on a single process. Every process must call equally often.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Compiles nothing yet.

        Args:
          mesh: all devices of the job.
        """
        self._layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._maximum = jax.jit(jnp.max, out_shardings=self._whole)
        self._running: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Returns the largest number that a process gave in the call before; 0 in the first call.

        On a single process returns `number`.
        """
        if jax.process_count() == 1:
            return number
        before = self._running
        own = np.full(1, number, np.int32)
        numbers = jax.make_array_from_callback(
            (self._layout.mesh.size,), self._layout, lambda _: own
        )
        self._running = self._maximum(numbers)
        return 0 if before is None else int(before)
