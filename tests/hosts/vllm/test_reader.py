"""Adapters that are read beside the engine's steps."""

from threading import Event
from types import SimpleNamespace

import pytest

from flora.errors import InvalidAdapterError
from flora.hosts.vllm.core import _if_read
from flora.hosts.vllm.reader import KEPT_READ, Reader


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
    reader = Reader(adapters.read)
    first = reader.start(request(1))
    assert not first.done()
    assert reader.start(request(1)) is first
    adapters.opened[1].set()
    assert reader.take(request(1)) == "good"
    assert adapters.counts == {1: 1}
    assert reader.take(request(1)) == "good"
    assert adapters.counts == {1: 2}


def test_what_is_wrong_is_said_when_it_is_taken():
    adapters = Adapters()
    adapters.opened[1].set()
    reader = Reader(adapters.read)
    with pytest.raises(InvalidAdapterError, match="bad"):
        reader.take(request(1, "bad"))
    assert reader.take(request(1)) == "good"


def test_few_wait_and_the_oldest_is_read_again():
    adapters = Adapters()
    reader = Reader(adapters.read)
    for number in range(1, KEPT_READ + 4):
        adapters.opened[number].set()
        reader.start(request(number)).result()
    reader.take(request(KEPT_READ + 3))
    reader.take(request(1))
    assert adapters.counts[1] == 2
    assert adapters.counts[KEPT_READ + 3] == 1


def test_a_request_is_scheduled_once_its_own_adapter_is_read():
    adapters = Adapters()
    reader = Reader(adapters.read)
    manager = SimpleNamespace(is_ready=lambda lora: reader.start(lora).done())
    handled = []
    ready = _if_read(manager, lambda waiting: handled.append(waiting) or True)
    slow, other, base = (
        SimpleNamespace(lora_request=lora) for lora in (request(1), request(2), None)
    )
    assert not ready(slow)
    assert ready(base)
    adapters.opened[1].set()
    adapters.opened[2].set()
    reader.start(other.lora_request).result()
    assert ready(slow)
    assert ready(other)
    assert handled == [base, slow, other]
