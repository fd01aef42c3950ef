"""Loops over many things, for whoever wants to show how far they are: the terminal does, tests need not."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Watch(Protocol):
    """Yields the items, and shows while they are used that something is ``doing``, how many of ``total``."""

    def __call__(self, items: Iterable[T], doing: str, total: int | None = None) -> Iterator[T]: ...


def unwatched(items: Iterable[T], doing: str, total: int | None = None) -> Iterator[T]:
    """Show nothing."""
    return iter(items)
