"""Every error that a user can cause, one class per thing that has to be changed.

A message says what was wrong, what was given, what would be right, and where to change it.
"""


class KimiError(Exception):
    """Base of the errors that are reported to the user without a traceback."""


class ConfigError(KimiError):
    """An option is unknown, has a wrong type or value, or does not fit another option."""


class DataError(KimiError):
    """A file of the corpus or of a tokenizer is missing, empty, unreadable or malformed."""


class CheckpointMismatchError(KimiError):
    """A work directory or checkpoint was made by another configuration."""


class CheckpointFileError(KimiError):
    """A file of a checkpoint is missing, damaged, or holds other tensors than it should."""


class TrainingFailedError(KimiError):
    """Training cannot go on: the loss or the gradient is no longer finite."""


class TrainingInterruptedError(KimiError):
    """The run was asked to stop, and can be resumed."""

    def __init__(self, steps_done: int, num_steps: int, signal: str, workdir: object):
        """Says where the run stands; all steps done are in a checkpoint in `workdir`."""
        super().__init__(
            f"stopped by {signal} after step {steps_done} of {num_steps}, which is saved in "
            f"{workdir}; the same command goes on from there"
        )


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
