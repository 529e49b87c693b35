"""Errors that a user can mend. The entry point prints them as one line; every other exception keeps its traceback.

This module imports nothing, so that any package may raise them.
"""


class UserError(ValueError):
    """A mistake in what the user gave: one line that names the key or file, what is allowed, and the remedy."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""
