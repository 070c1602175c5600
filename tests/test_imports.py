"""`import flora` costs torch and no more, and its names are found when they are asked for."""

import json
import subprocess
import sys

import pytest

import flora

HEAVY = {
    "accelerate",
    "beartype",
    "bitsandbytes",
    "fastapi",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "pydantic",
    "ray",
    "rich",
    "safetensors",
    "torchao",
    "transformers",
    "triton",
    "typer",
    "vllm",
}


def loaded(code: str) -> set[str]:
    """The packages that a fresh interpreter has after some code."""
    code += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(run.stdout)}


def test_import_flora_loads_no_other_package():
    assert loaded("import flora") & {*HEAVY, "torch"} <= {"torch"}


def test_the_operator_and_the_bank_need_torch_alone():
    found = loaded("import flora.bank, flora.ops.adapted_linear, flora.ops.eager")
    by_torch = loaded("import torch")
    assert (found - by_torch) & HEAVY == set()


def test_an_adapter_is_read_without_the_hosts():
    found = loaded("import flora.adapters.checkpoint, flora.adapters.kinds.flora")
    assert found & {"transformers", "peft", "vllm", "triton"} == set()


@pytest.mark.parametrize("name", flora.__all__)
def test_public_names_resolve(name):
    assert getattr(flora, name).__name__ == name
    assert name in dir(flora)


def test_no_other_name_does():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        flora.nope  # noqa: B018
    with pytest.raises(ImportError):
        from flora import nope  # noqa: F401


def test_a_type_checker_sees_the_same_names():
    """The imports under TYPE_CHECKING are the table's."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(flora))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == flora._HOMES
