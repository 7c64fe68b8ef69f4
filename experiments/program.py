"""What all programs share: flags in, one call, and errors that a person can read."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from kimi_jax.configs import convert
from kimi_jax.core.errors import ConfigError, KimiError, TrainingInterruptedError

_USAGE_ERROR = 2
_INTERRUPTED = 130


def run(main: Callable[[], None]) -> None:
    """Parses flags and calls `main`; the user's own errors are one message without a traceback."""

    def guarded(argv: list[str]) -> None:
        del argv
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax tells the story of every file
        try:
            main()
        except TrainingInterruptedError as stop:
            print(stop, file=sys.stderr)
            sys.exit(_INTERRUPTED)
        except KeyboardInterrupt:
            print("interrupted; what is written stays", file=sys.stderr)
            sys.exit(_INTERRUPTED)
        except KimiError as error:
            _fail(error)

    app.run(guarded, flags_parser=_parse_flags)


def load_config(flag: flags.FlagHolder, cls: type) -> Any:
    """Returns what a config flag holds, overrides included, as a config dataclass.

    Raises:
      ConfigError: the file is missing, or an option is unknown or does not fit.
    """
    try:
        values = flag.value.to_dict()  # a file that could not be read is reported here
    except OSError as error:
        raise ConfigError(_unreadable(error)) from error
    return convert.from_mapping(cls, values)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; a mistake ends the program with one line that names the option."""
    try:
        program, *unexpected = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(error)
    except KeyError as error:
        name, _, hint = str(error.args[0]).partition("\n")
        _fail(f"an override of --config names {name}, which is no group of options. {hint}".strip())
    except OSError as error:
        _fail(_unreadable(error))
    except KimiError as error:  # of the config file itself
        _fail(error)
    if unexpected:
        _fail(f"unexpected arguments: {' '.join(unexpected)}; options are written --name=value")
    return [program]


def _unreadable(error: OSError) -> str:
    return f"--config cannot be read: {str(error).splitlines()[-1].strip()}"


def _fail(error: Exception | str) -> None:
    kind = "ConfigError" if not isinstance(error, KimiError) else type(error).__name__
    print(f"{kind}: {error}", file=sys.stderr)
    sys.exit(_USAGE_ERROR)
