"""Errors that a command reports to its user in one message."""


class UserError(Exception):
    """The user's input is at fault: a file, a flag or a value.

    The message names the file, line or flag and says how to mend it. Every command prints it without a traceback
    and exits with status 2.
    """


class Interrupted(Exception):
    """The user stopped the run and everything needed to go on was saved. A command exits with status 130."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the machine has no more memory."""
    by_class = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_class or "DefaultCPUAllocator" in str(error)
