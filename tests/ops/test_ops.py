"""The table of backends."""

import logging

import pytest
import torch

from flora.errors import BackendError
from flora.ops import BACKENDS, backend_name, get_backend

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_holds_the_operator(name):
    assert callable(get_backend(name, CPU).prepare)


def test_auto_chooses_once_and_says_so(caplog):
    get_backend.cache_clear()
    backend_name.cache_clear()
    with caplog.at_level(logging.INFO, logger="flora.ops"):
        chosen = get_backend("auto", CPU)
        assert get_backend("auto", CPU) is chosen
    assert chosen is get_backend(backend_name("auto", CPU), CPU)
    assert backend_name("auto", CPU) in BACKENDS
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["backend for cpu"]


def test_an_unknown_backend_is_an_error_that_lists_them():
    with pytest.raises(BackendError) as caught:
        get_backend("nope", CPU)
    assert all(name in str(caught.value) for name in ("nope", "auto", *BACKENDS))
