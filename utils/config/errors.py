"""Errors that a user can mend. The entry point prints them as one line; every other exception keeps its traceback.

This module imports nothing, so that any package may raise them.
"""


class UserError(ValueError):
    """A mistake in what the user gave: one line that names the key or file, what is allowed, and the remedy."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


class ConfigError(UserError):
    """A mistake in a configuration file, in --opts or in a flag.

    Attributes:
        key: the dotted key at fault, such as "TRAIN.EPOCHS"; None where it is not a single key's.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key
