"""Every error a user can cause or meet, each a single sentence that says what to do next.

The command line turns a :class:`BankError` into one line and exit code 1; anything else is a defect and keeps its
traceback.
"""


class BankError(Exception):
    """Base of all known errors.

    Attributes:
        may_pass: whether the same call may succeed a little later, with nothing changed: a store that was out of reach.
    """

    may_pass = False


class InputError(BankError, ValueError):
    """A value the user gave cannot be used: an option, a setting, an argument."""


class CorpusError(BankError):
    """The corpus cannot be read."""


class NothingLeftError(CorpusError):
    """The corpus was read to its end, and no reference of it is left."""


class BankFormatError(BankError):
    """The files are not a bank, are damaged, or are of a version this release does not know."""


class DatasetFormatError(BankError):
    """The files are not training sequences, are damaged, or are of a version this release does not know."""


class WrongModelError(BankError):
    """The bank's memories were written by another model, tokenizer or setting than the one at hand."""


class ConflictError(BankError):
    """Somebody else works on, or has just committed to, the same bank."""


class StorageFullError(BankError):
    """There is no space left where the bank or its scratch folder is; nothing was committed."""


class MemoryNotReadError(BankError):
    """Memories were retrieved but the model gave them no attention: they were silently not read."""


class StoppedError(BankError):
    """The user asked to stop; finished work is kept."""
