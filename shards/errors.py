"""Error classes, each with the exit code of the command that raises it.

All derive from click's own exception, so a command that raises one prints a single
line on stderr and exits with its code, without a traceback.
"""

import click


class BadData(click.ClickException):
    """The data on disk is not what it must be: exit code 3."""

    exit_code = 3


class ResourceMissing(click.ClickException):
    """Disk, memory, device, network or an optional package is missing: exit code 4."""

    exit_code = 4


class CannotResume(click.ClickException):
    """What is on disk was made with other settings, which the message names: exit code 5."""

    exit_code = 5
