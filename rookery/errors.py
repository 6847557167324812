"""Errors that a command reports to its user in one message."""


class UserError(Exception):
    """The user's input is at fault: a file, a flag or a value.

    The message names the file, line or flag and says how to mend it. Every command prints it without a traceback
    and exits with status 2.
    """


class Interrupted(Exception):
    """The user stopped the run and everything needed to go on was saved. A command exits with status 130."""
