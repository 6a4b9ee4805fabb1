"""One error root and its children, each with the exit code that a shell sees.

A user's mistake raises one of these with a single line: the value that was wrong, the limit it broke, the remedy.
The command line prints that line on stderr and exits with the code; a traceback is always a bug of ours.
"""

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class ArdError(Exception):
    """Root of every error this project raises on purpose."""

    exit_code = 1


class UsageError(ArdError):
    """A flag, a configuration field or an environment that cannot work as given."""

    exit_code = 2


class ModelError(ArdError):
    """A model folder that is damaged, unsupported or not what its manifest promises."""

    exit_code = 3


class DataError(ArdError):
    """Training or evaluation data that is missing, unreadable or too short."""

    exit_code = 4


class ResourceError(ArdError):
    """Too little disk, memory or permission, found before or during the work."""

    exit_code = 5


class NumericsError(ArdError):
    """A loss, a gradient or a weight that is not finite, or a run that diverges."""

    exit_code = 6


class QualityGateError(ArdError):
    """A result that was measured and found worse than its limits allow."""

    exit_code = 7


class EngineDiedError(ArdError):
    """The inference engine or the measured server ended and could not be brought back."""

    exit_code = 70
