"""The faults that the command line tells apart by its exit code, and the warning that it shows."""


class InputError(ValueError):
    """The input or the call is at fault: the message says what is wrong, where, and what to do (exit code 2)."""


class ParityError(RuntimeError):
    """An engine does not give the reference's numbers (exit code 3)."""


class InputWarning(UserWarning):
    """The input is odd, and the result may be: the message says why."""
