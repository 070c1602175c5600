"""What the plugin stands on in vLLM is there, and each part of it is missed. vLLM is only read."""

import ast
import shutil
import sys
from pathlib import Path

import pytest

import flora.hosts.vllm
from flora.errors import BackendError
from flora.hosts.vllm import plugin, seams
from flora.hosts.vllm.seams import (
    MANAGER,
    SEAMS,
    Seam,
    check,
    check_installed,
    find_code,
    find_place,
    find_vllm,
    patterns,
)

PLACES = [
    ("model_executor/layers/utils.py", "cpu_unquantized_gemm"),
    ("v1/engine/llm_engine.py", "LLMEngine"),
    ("v1/worker/lora_model_runner_mixin.py", "LoRAModelRunnerMixin.maybe_setup_dummy_loras"),
]


@pytest.fixture(scope="module")
def root() -> Path:
    try:
        return find_vllm()
    except BackendError as error:
        pytest.skip(str(error))


def of_file(file: str) -> list[Seam]:
    return [seam for seam in SEAMS if seam.file == file]


def test_all_hold_in_the_installed_vllm(root):
    assert check(root) == []
    check_installed()


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.place} {seam.code}")
def test_a_seam_that_is_gone_is_the_one_that_is_missing(root, tmp_path, seam):
    tree = ast.parse((root / seam.file).read_bytes())
    spoil(tree, seam)
    write(tmp_path / seam.file, ast.unparse(tree))
    assert check(tmp_path, of_file(seam.file)) == [str(seam)]


@pytest.mark.parametrize(("file", "place"), PLACES)
def test_without_a_class_or_function_all_that_is_in_it_is_missing(root, tmp_path, file, place):
    text = (root / file).read_text()
    node = find_place(ast.parse(text), place)
    name = place.rpartition(".")[2]
    lines = text.splitlines(keepends=True)
    lines[node.lineno - 1] = lines[node.lineno - 1].replace(name, f"{name}_renamed", 1)
    write(tmp_path / file, "".join(lines))
    inside = [s for s in of_file(file) if f"{s.place}.".startswith(f"{place}.")]
    assert inside
    assert check(tmp_path, of_file(file)) == [str(seam) for seam in inside]


def test_without_a_file_all_its_seams_are_missing(root, tmp_path):
    for file in {seam.file for seam in SEAMS} - {"lora/request.py"}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / file, tmp_path / file)
    assert check(tmp_path) == [str(seam) for seam in of_file("lora/request.py")]


@pytest.mark.parametrize(
    ("code", "text", "holds"),
    [
        ("def f(a)", "def f(a: int = 1) -> int: ...", True),
        ("def f(a)", "def f(a, b=1): ...", False),
        ("def f(a)", "def f(a, **others): ...", False),
        ("def f(a)", "async def f(a): ...", False),
        ("def f(a, *_)", "def f(a, b=1, *, c=2, **others): ...", True),
        ("def f(a, *_)", "def f(a, b): ...", False),
        ("def f(a, *_)", "def f(a, *, b): ...", False),
        ("def f(a, *_)", "def f(b, a): ...", False),
        ("@_\ndef f()", "@property\ndef f(): ...", True),
        ("@_\ndef f()", "def f(): ...", False),
        ("class A(B)", "class A(C, B): ...", True),
        ("class A(B)", "class A(C): ...", False),
        ("from _ import f", "from .a import (b, f)", True),
        ("from _ import f", "from a import b as f", False),
        ("from a import f", "from b import f", False),
        ("x: _; y: _", "y: int = 1\nx: str", True),
        ("x: _; y: _", "x: str", False),
        ("x: _ = f(1, **_)", "x: int = f(1, more=2)", True),
        ("x: _ = f(1, **_)", "x: int = f(2, more=2)", False),
        ("f(_, b=_)", "f(1, b=2)", True),
        ("f(_, b=_)", "f(1, b=2, c=3)", False),
        ("f(_, b=_, **_)", "f(1, c=3, b=2)", True),
        ("f(_, b=_, **_)", "f(1, 2)", False),
        ("return False", "def f(): return False", True),
        ("return False", "def f(): return True", False),
        ("a.b", "a.b = 1", True),
        ("a.b", "a.c = 1", False),
    ],
)
def test_how_code_is_found(tmp_path, code, text, holds):
    write(tmp_path / "some.py", text)
    seam = Seam("some.py", "", code, "")
    assert check(tmp_path, [seam]) == ([] if holds else [str(seam)])


def test_the_manager_has_what_is_called_on_it():
    source = Path(*flora.hosts.vllm.__path__, "manager.py").read_text()
    manager = find_place(ast.parse(source), "AdapterManager")
    assert {getattr(node, "name", "") for node in manager.body} >= set(MANAGER)


def test_the_plugin_refuses_a_vllm_that_lacks_a_seam(root, tmp_path, monkeypatch):
    for seam in SEAMS:
        write(tmp_path / seam.file, (root / seam.file).read_text())
    text = (root / "lora/request.py").read_text()
    write(tmp_path / "lora/request.py", text.replace("lora_path", "lora_folder"))
    monkeypatch.setattr(seams, "find_vllm", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)  # nothing of it is imported before
    with pytest.raises(BackendError) as raised:
        plugin.register()
    told = str(raised.value)
    assert "\n" not in told
    assert "VLLM_PLUGINS=''" in told
    assert told.count(".py: ") == 1
    assert "lora/request.py: LoRARequest: " in told


def test_the_command_has_a_line_for_each_seam(root, tmp_path, capsys):
    (tmp_path / "vllm").symlink_to(root)
    assert seams.main(str(tmp_path)) == 0
    assert capsys.readouterr().out.count("ok       ") == len(SEAMS)
    assert seams.main(str(tmp_path / "nowhere")) == 1
    assert capsys.readouterr().out.count("missing  ") == len(SEAMS)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def spoil(tree: ast.Module, seam: Seam) -> None:
    """Change a file as little as it takes for a seam not to hold."""
    scope, pattern = find_place(tree, seam.place), patterns(seam)[0]
    if seam.among is not None:
        scope.body.append(ast.Expr(pattern) if isinstance(pattern, ast.expr) else pattern)
        return
    other = ast.Name("other")
    for node in list(find_code(scope, pattern)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                node.args.args.append(ast.arg("other"))
                node.args.defaults.clear()
            case ast.ClassDef():
                node.bases = []
            case ast.ImportFrom():
                node.names = [ast.alias("other")]
            case ast.Assign() | ast.Return():
                node.value = other
            case ast.AnnAssign():
                node.target = other
            case ast.Call():
                node.func = other
            case ast.Attribute():
                node.attr = "other"
            case ast.Compare():
                node.left = other
