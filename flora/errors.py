"""Every error that flora raises for a user, each also the standard class that it stands for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


def faults(error: "ValidationError") -> str:
    """All that pydantic found wrong, in one line: each key with its value and what is expected."""
    found = []
    for fault in error.errors():
        place = repr(".".join(map(str, fault["loc"])))[1:-1]  # a key may hold line ends
        if fault["type"] not in ("missing", "extra_forbidden") and place:
            place += f" = {fault['input']!r:.80}"
        found.append(f"{place}: {fault['msg']}" if place else fault["msg"])
    return "; ".join(found)


class FloraError(Exception):
    """Base of all of them; its text is one line that says what to do."""


class UsageError(FloraError, ValueError):
    """A call that cannot be meant: a missing file, an unknown option, a config that is wrong."""


class InvalidAdapterError(FloraError, ValueError):
    """An adapter's folder or tensors do not hold; the text names all that is wrong."""


class UnknownAdapterError(FloraError, KeyError):
    """A name that no loaded adapter has."""

    __str__ = Exception.__str__  # KeyError would print the repr


class ShapeError(FloraError, ValueError):
    """Tensors or rows that do not fit together."""


class BackendError(FloraError, RuntimeError):
    """A backend that was asked for by name cannot run here."""


class OutOfBudgetError(FloraError, MemoryError):
    """The bank cannot hold one more adapter, as all that it holds is in use."""
