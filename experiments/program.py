"""What all programs share: flags in, one call, and errors that a person can read."""

import sys
from collections.abc import Callable

from absl import app

from kimi_jax.core.errors import KimiError, TrainingInterruptedError

_USAGE_ERROR = 2
_INTERRUPTED = 130


def run(main: Callable[[], None]) -> None:
    """Parses flags and calls `main`; the user's own errors are printed without a traceback."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        try:
            main()
        except TrainingInterruptedError as stop:
            print(stop, file=sys.stderr)
            sys.exit(_INTERRUPTED)
        except KimiError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(_USAGE_ERROR)

    app.run(guarded)
