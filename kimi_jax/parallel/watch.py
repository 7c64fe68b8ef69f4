"""Ends every process of a job when one of them is gone, and says which.

A process that loses a peer hangs in its next collective, or is aborted by JAX before its own Python
threads can say why. So each training process starts a watcher: this file, run as a program, without
JAX. The watcher of process 0 listens and the others connect to it. A watcher leaves when its
training process does, because its standard input ends, and that closes its connection. A host that
goes down without closing anything is noticed because nothing comes from it any more.

Messages are lines, from the training process on standard input and between the watchers:

    (empty)            still here; sent every `BEAT_SECONDS`
    name TEXT          who is speaking
    end                leaves as agreed with all others
    failed TEXT        leaves because of this error
    lost SECONDS TEXT  from watcher 0: in so many seconds end the process and say TEXT
"""

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable

BEAT_SECONDS = 2.0
QUIET_SECONDS = 20.0  # without a message, after which a host counts as down
START_SECONDS = 60.0  # for all watchers to connect
# A process that saw another fail may be about to report the same error, in better words.
FAILURE_SECONDS = 5.0
LOST_EXIT = 75  # exit code of a process that lost another: sysexits.h's "try again"
# JAX aborts a process that has lost process 0: its watcher stays to hear of that.
_ECHO_SECONDS = 1.0
_LOST = "was lost: it was killed or crashed"
_ADVICE = (
    f"This process ends with exit code {LOST_EXIT}, and so do the others. The cause is in the log "
    "of the process named here; the same command on all hosts goes on from the last checkpoint."
)


class _Lines:
    """Splits what arrives into lines."""

    def __init__(self, receive: Callable[[], bytes]):
        self._receive = receive
        self._rest = b""

    def read(self) -> list[str] | None:
        """Returns the lines that are complete by now; None at the end."""
        received = self._receive()
        if not received:
            return None
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


class _Link:
    """A connection to another watcher."""

    def __init__(self, connection: socket.socket, name: str):
        connection.settimeout(BEAT_SECONDS)
        self.connection = connection
        self.name = name
        self.lines = _Lines(self._receive)
        self.heard = time.monotonic()
        self.leaving = False

    def send(self, line: str) -> None:
        with contextlib.suppress(OSError):  # what ended the connection is seen when it is read
            self.connection.sendall(line.encode() + b"\n")

    def _receive(self) -> bytes:
        try:
            return self.connection.recv(4096)
        except OSError:
            return b""


class Watcher:
    """Watches the connections of one process."""

    def __init__(self, index: int, count: int, address: str | None = None):
        """Opens the connections.

        Args:
          index: of the process it runs beside.
          count: processes in the job.
          address: host:port of watcher 0; None for watcher 0 itself, which prints its port.
        """
        self._name = f"process {index} ({socket.gethostname()})"
        self._selector = selectors.DefaultSelector()
        self._stdin = _Lines(lambda: os.read(sys.stdin.fileno(), 4096))
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._hear_own_process)
        self._links: list[_Link] = []
        self._is_first = address is None
        self._unconnected = count - 1 if self._is_first else 1
        self._started = time.monotonic()
        self._next_beat = 0.0
        self._stay_until: float | None = None  # when to leave, once the own process is gone
        self._leaving = False  # the own process is about to go, and has said why
        self._verdict: tuple[float, str] | None = None  # when to end, and what to say
        if self._is_first:
            self._listen()
        else:
            host, _, port = address.rpartition(":")
            self._add(socket.create_connection((host, int(port)), START_SECONDS), "process 0")

    def run(self) -> int:
        """Returns the exit code: 0 when the own process has left, LOST_EXIT when another has."""
        while True:
            for key, _ in self._selector.select(self._next_due() - time.monotonic()):
                key.data()
            now = time.monotonic()
            if now >= self._next_beat:
                self._beat(now)
                self._next_beat = now + BEAT_SECONDS
            gone = self._stay_until is not None
            if self._verdict and not self._leaving and (gone or now >= self._verdict[0]):
                sys.stderr.write(f"PeerLostError: {self._verdict[1]}. {_ADVICE}\n")
                return LOST_EXIT
            if gone and now >= self._stay_until:
                return 0

    def _next_due(self) -> float:
        due = [self._next_beat]
        if self._stay_until is not None:
            due.append(self._stay_until)
        if self._verdict is not None and not self._leaving:
            due.append(self._verdict[0])
        return min(due)

    def _listen(self) -> None:
        listener = socket.create_server(("", 0))
        self._selector.register(
            listener,
            selectors.EVENT_READ,
            lambda: self._add(listener.accept()[0], "a process that did not give its name"),
        )
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()

    def _add(self, connection: socket.socket, name: str) -> None:
        link = _Link(connection, name)
        self._links.append(link)
        self._unconnected -= 1
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(link))
        link.send(f"name {self._name}")

    def _hear_own_process(self) -> None:
        lines = self._stdin.read()
        if lines is None:
            self._selector.unregister(sys.stdin)
            self._stay_until = time.monotonic()
            if self._is_first and not self._leaving:
                self._tell_all(f"lost 0 {self._name} {_LOST}")
            elif not self._leaving:
                self._stay_until += _ECHO_SECONDS
            return
        for line in lines:
            self._leaving = True
            kind, _, text = line.partition(" ")
            if kind == "failed" and self._is_first:
                self._tell_all(f"lost {FAILURE_SECONDS} {self._name} failed: {text}")
            else:
                self._tell_all(line)

    def _hear(self, link: _Link) -> None:
        lines = link.lines.read()
        if lines is None:
            self._selector.unregister(link.connection)
            self._links.remove(link)
            if not link.leaving:
                self._lose(0.0, f"{link.name} {_LOST}")
            return
        link.heard = time.monotonic()
        for line in lines:
            self._obey(link, line)

    def _obey(self, link: _Link, line: str) -> None:
        kind, _, text = line.partition(" ")
        link.leaving |= kind in ("end", "failed", "lost")
        match kind:
            case "name":
                link.name = text
            case "failed":
                self._lose(FAILURE_SECONDS, f"{link.name} failed: {text}")
            case "lost":
                seconds, _, message = text.partition(" ")
                self._lose(float(seconds), message)

    def _beat(self, now: float) -> None:
        self._tell_all("")
        if self._unconnected > 0 and now > self._started + START_SECONDS:
            self._lose(0.0, f"{self._unconnected} processes were lost before they had started")
        for link in self._links:
            if not link.leaving and now > link.heard + QUIET_SECONDS:
                self._lose(
                    0.0,
                    f"{link.name} has been silent for {QUIET_SECONDS:.0f} seconds: "
                    "its host or the network is down",
                )

    def _lose(self, seconds: float, message: str) -> None:
        if self._verdict is not None:
            return
        self._verdict = (time.monotonic() + seconds, message)
        if self._is_first:
            self._tell_all(f"lost {seconds} {message}")

    def _tell_all(self, line: str) -> None:
        for link in self._links:
            link.send(line)


def main() -> None:
    """Runs the watcher that the arguments describe."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the training process
        signal.signal(number, signal.SIG_IGN)
    sys.exit(Watcher(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]).run())


if __name__ == "__main__":
    main()
