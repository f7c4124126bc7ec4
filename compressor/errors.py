"""The one family of errors that a user can mend.

Raised where the fault is known, caught once by the command line, which prints
the message and the remedy and exits with ``status``. Anything else that
escapes is a bug in mskip and keeps its traceback.
"""

from __future__ import annotations


class MskipError(Exception):
    """A fault that the user can mend.

    Args:
        message: what is wrong, naming the file, key or value.
        remedy: what to do about it; may be empty when the message says it all.
    """

    status = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class RecipeError(MskipError):
    """A recipe that cannot be read, or a value out of its range."""


class DataError(MskipError):
    """Tuning or evaluation data that is empty, missing or malformed."""


class ModelError(MskipError):
    """A base model that cannot be loaded or is not supported."""


class ArtifactError(MskipError):
    """A run folder, router file or report that is missing, corrupt or does not belong."""


class MissingExtraError(MskipError):
    """An optional package that is not installed.

    Args:
        package: the module that could not be imported.
        extra: the extra of mskip that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed.", f"Install it with: pip install 'mskip[{extra}]'"
        )
