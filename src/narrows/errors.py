"""Every error narrows raises on purpose, under one base class.

A message says which argument was wrong, what was expected, what came, and what to do about it.
"""


class NarrowsError(Exception):
    """Base class of all errors narrows raises on purpose."""


class _Explained(NarrowsError):
    def __init__(self, argument: str, *, expected: str, got: object, hint: str = "") -> None:
        super().__init__(f"{argument}: expected {expected}, got {got}. {hint}".strip())
        self.argument = argument


class InvalidArgument(_Explained, ValueError):
    """A value that an argument cannot take.

    >>> raise InvalidArgument("num_slots", expected="a positive integer", got=0)
    Traceback (most recent call last):
    narrows.errors.InvalidArgument: num_slots: expected a positive integer, got 0.
    """


class InvalidType(_Explained, TypeError):
    """An argument of a kind that is not understood, a mask of floats for instance."""


class ImplementationUnavailable(NarrowsError, RuntimeError):
    """An implementation asked for by name that cannot run on this machine or these arguments."""


class MissingExtra(NarrowsError, ImportError):
    """An optional dependency that is needed now and is not installed.

    Args:
        package: what could not be imported.
        extra: the extra of narrows that brings it.
        purpose: what it is needed for, as the end of "... is needed to ...".
    """

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{package} is needed to {purpose} and is not installed. Install it with: pip install 'narrows[{extra}]'"
        )


class DataError(NarrowsError):
    """Data that cannot be used: an empty folder, a single class, too many unreadable images."""


class CannotWrite(NarrowsError, OSError):
    """A file or a folder that the operating system does not let us write: no space, no permission, no such place.

    Args:
        path: what was to be written.
        reason: what the operating system says.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path} cannot be written: {reason}. What was there before is unchanged.")
        self.path = path


class Diverged(NarrowsError):
    """A training whose loss or parameters are no numbers any more."""


class Terminated(KeyboardInterrupt):
    """What SIGTERM and SIGHUP raise in a command, as Ctrl-C raises `KeyboardInterrupt`.

    Args:
        signum: number of the signal; the command exits with 128 more.
        kept: what is kept, and how to go on.
    """

    def __init__(self, signum: int, kept: str = "") -> None:
        super().__init__(*([kept] if kept else []))
        self.signum = signum
