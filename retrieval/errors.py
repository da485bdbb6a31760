"""The errors of pictures, models and data, below the tree's root in :mod:`indexes.errors`.

DiptychError
├── ImageError      a picture cannot be read: the reason, without the path (the caller knows it)
├── ModelError      a model cannot be found, loaded or used
├── DataError       a file of pairs, labels or settings is not what it should be
├── UsageError      a question that has no answer: empty query, no such folder
└── MissingExtra    a package that the core does not install is needed
"""

from indexes.errors import DiptychError

__all__ = ["DataError", "DiptychError", "ImageError", "MissingExtra", "ModelError", "UsageError"]


class ImageError(DiptychError):
    """A picture cannot be read. The message is the reason alone; the caller knows the path."""


class ModelError(DiptychError):
    """A model cannot be found, loaded or used."""


class DataError(DiptychError):
    """A file of pairs, labels or settings is not what it should be."""


class UsageError(DiptychError):
    """A question that has no answer as it was put: an empty query, a folder that does not exist."""


class MissingExtra(DiptychError):
    """Something outside the core install is needed; the message is the command that installs it."""

    def __init__(self, what: str, *packages: str) -> None:
        super().__init__(f"{what} needs packages that are not installed: pip install {' '.join(packages)}")
