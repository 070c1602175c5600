"""Every error is also the standard class that it stands for, prints its text, and pickles."""

import inspect
import pickle

import pytest

from flora import errors

CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if found is not errors.FloraError
]


@pytest.mark.parametrize("error", CLASSES)
def test_an_error(error):
    caught = error("what to do")
    assert isinstance(caught, errors.FloraError)
    standard = [base for base in error.__mro__ if base.__module__ == "builtins"]
    assert standard[0] is not Exception
    assert str(caught) == "what to do"
    again = pickle.loads(pickle.dumps(caught))
    assert type(again) is error
    assert again.args == caught.args


def test_there_are_some():
    assert len(CLASSES) >= 6
