"""The exit codes of a run and of the commands. docs/cluster.md has them in a table, with what a job does after each."""

from __future__ import annotations

from ddk_ds.errors import TemporaryError, UserError

EXIT_DONE = 0
"""Done."""
EXIT_USER_ERROR = 2
"""An error that the user can mend: a new start without a change ends the same way."""
EXIT_WRONG_NUMBERS = 3
"""The run's numbers went wrong, with no roll-back left."""
EXIT_NO_PROGRESS = 4
"""A job was interrupted twice in a row without a newer checkpoint. Only job.sbatch ends with it."""
EXIT_TEMPORARY = 69
"""An error that time may mend: the same command may pass later (EX_UNAVAILABLE of sysexits.h)."""
EXIT_INTERRUPTED = 75
"""After a signal: the run saved, and the same command continues it (EX_TEMPFAIL of sysexits.h)."""
EXIT_ENDED_AT_ONCE = 130
"""After a second Ctrl-C, or a first one before the training began: nothing more was saved."""

OF_A_RUN = (EXIT_DONE, EXIT_USER_ERROR, EXIT_WRONG_NUMBERS, EXIT_TEMPORARY, EXIT_INTERRUPTED)
"""The codes with which all ranks of a run end together."""


def exit_code(error: UserError) -> int:
    """Return the exit code after `error`."""
    return EXIT_TEMPORARY if isinstance(error, TemporaryError) else EXIT_USER_ERROR
