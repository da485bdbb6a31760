"""Every error that Diptych raises on purpose.

DiptychError
├── StoreError              an index folder cannot be read, written or used
│   ├── StoreNotFound       there is none
│   ├── StoreLocked         another process is writing to it
│   ├── StoreCorrupt        a file of it is damaged
│   └── ModelMismatch       it was made with another model
├── FilterError             a filter that cannot be applied: an unknown column, values of different types
├── ExchangeError           files of another tool's vectors or of what they belong to do not fit
├── ColumnError             a column of metadata has a name or a value that cannot be stored
├── VectorError             vectors that cannot be compared: wrong width, zero, NaN
└── (retrieval.errors: ImageError, ModelError, DataError, MissingExtra)

Their messages are written for the person at the terminal: what is wrong, with which file, and what helps.
"""


class DiptychError(Exception):
    """Root of the tree: catch it to catch everything raised on purpose."""


class StoreError(DiptychError):
    """An index folder cannot be read, written or used."""


class StoreNotFound(StoreError):
    """There is no index folder where one was looked for."""


class StoreLocked(StoreError):
    """Another process is writing to the index folder."""


class StoreCorrupt(StoreError):
    """A file of the index folder is damaged."""


class ModelMismatch(StoreError):
    """The index folder was made with another model than the one that asks."""


class VectorError(DiptychError):
    """Vectors that cannot be compared: wrong width, zero length, NaN or infinite."""


class FilterError(DiptychError):
    """A filter that cannot be applied or read: an unknown column, values of different types, a malformed range."""


class ColumnError(DiptychError):
    """A column of metadata has a name that is taken, or a value of a kind that cannot be stored."""


class ExchangeError(DiptychError):
    """Files of vectors, or of what they belong to, are not what they should be, or contradict each other."""
