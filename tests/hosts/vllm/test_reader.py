"""Adapters that are read beside the engine's steps."""

from contextlib import suppress
from threading import Event
from types import SimpleNamespace

import pytest

from flora.errors import InvalidAdapterError
from flora.hosts.vllm.reader import Reader

KEPT = 3


class Adapters:
    """Folders that can be read once they are opened, and how often each was."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.opened = {number: Event() for number in range(1, 40)}

    def read(self, request: SimpleNamespace) -> str:
        number = request.lora_int_id
        self.counts[number] = self.counts.get(number, 0) + 1
        self.opened[number].wait(10)
        if request.lora_name == "bad":
            raise InvalidAdapterError("bad")
        return request.lora_name


def request(number: int, name: str = "good") -> SimpleNamespace:
    return SimpleNamespace(lora_name=name, lora_int_id=number)


def test_nothing_waits_until_an_adapter_is_taken():
    adapters = Adapters()
    reader = Reader(adapters.read, aside=True, kept=KEPT)
    assert not reader.has(request(1))
    assert not reader.has(request(1))
    adapters.opened[1].set()
    assert reader.get(request(1)) == "good"
    assert reader.has(request(1))
    assert reader.take(request(1)) == "good"
    assert adapters.counts == {1: 1}
    assert reader.take(request(1)) == "good"
    assert adapters.counts == {1: 2}


@pytest.mark.parametrize("aside", [True, False])
def test_what_is_wrong_is_said_when_it_is_asked_for(aside):
    adapters = Adapters()
    adapters.opened[1].set()
    reader = Reader(adapters.read, aside=aside, kept=KEPT)
    for _ in range(2):
        with pytest.raises(InvalidAdapterError, match="bad"):
            reader.get(request(1, "bad"))
    assert reader.take(request(1)) == "good"


def test_what_is_wrong_is_said_as_soon_as_it_is_read():
    adapters = Adapters()
    reader = Reader(adapters.read, aside=True, kept=KEPT)
    assert not reader.has(request(1, "bad"))
    adapters.opened[1].set()
    with suppress(InvalidAdapterError):
        reader._start(request(1, "bad")).result()
    with pytest.raises(InvalidAdapterError, match="bad"):
        reader.has(request(1, "bad"))


def after_reading(count: int) -> tuple[Adapters, Reader[str]]:
    """A reader that has read so many, from 1 on, of which none was taken."""
    adapters = Adapters()
    reader = Reader(adapters.read, aside=True, kept=KEPT)
    for number in range(1, count + 1):
        adapters.opened[number].set()
        reader.get(request(number))
    return adapters, reader


def test_few_wait_and_the_oldest_is_read_again():
    adapters, reader = after_reading(KEPT + 2)
    reader.take(request(KEPT + 2))
    reader.take(request(1))
    assert adapters.counts[1] == 2
    assert adapters.counts[KEPT + 2] == 1


def test_those_on_their_way_take_nobodys_place():
    adapters, reader = after_reading(KEPT)
    for number in range(10, 20):
        assert not reader.has(request(number))
    assert [reader.take(request(number)) for number in range(1, KEPT + 1)] == ["good"] * KEPT
    assert all(adapters.counts[number] == 1 for number in range(1, KEPT + 1))
    adapters.opened[10].set()
    assert reader.take(request(10)) == "good"
    for event in adapters.opened.values():
        event.set()
