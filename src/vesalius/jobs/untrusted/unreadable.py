"""What is wrong with a file, as one kind of error."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path

from vesalius.errors import FileFormatError, VesaliusError

WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, SyntaxError)
"""What Python, NumPy and torch raise for values of another type or size than they should be."""


class UnreadableError(FileFormatError, ValueError):
    """A file that is not what it should be. A ValueError too, for readers that catch those and say more."""


@contextlib.contextmanager
def understood(what: str) -> Iterator[None]:
    """Values of another type or size than they should be, found out by what fails inside, are the file's fault.

    what: the beginning of the message, such as "x.json is no manifest". Raises FileFormatError with the reason behind
    it; errors of this package pass.
    """
    try:
        yield
    except UnreadableError as error:
        raise FileFormatError(f"{what} ({error})") from error
    except VesaliusError:
        raise
    except WRONG as error:
        raise FileFormatError(f"{what} ({reason_of(error)})") from error


def reason_of(error: BaseException) -> str:
    """An error in one line of bounded length."""
    # The text of a KeyError is only the key.
    text = str(error).strip().split("\n")[0] if not isinstance(error, KeyError) else f"there is no {error}"
    text = text or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def size_of(path: Path) -> int:
    """Bytes of an ordinary file. Raises OSError when it is not there, UnreadableError for a folder, pipe or device."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        # A pipe would be waited for, and a device may never end.
        raise UnreadableError(f"it is a {'folder' if stat.S_ISDIR(status.st_mode) else 'pipe or device'}, not a file")
    return status.st_size
