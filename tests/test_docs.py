"""What the pages and the examples say works: each python block and each example runs, offline."""

import json
import re
import runpy
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch

from flora.adapters.kinds import KINDS
from flora.commands.train import read_config
from flora.ops import BACKENDS
from flora.training.data import read_examples
from flora.training.trainer import parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
CONTINUES = "<!-- continues -->"
FENCE = re.compile(r"^( *)(`{3,})(.*)$")
SHELLS = {"sh", "bash", "shell", "console"}


class Block(NamedTuple):
    """A fenced block: its language, the line that it begins on, its text, and what it goes on."""

    language: str
    line: int
    text: str
    continues: bool


def blocks_of(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order. Raises ValueError for one that does not end."""
    lines = page.splitlines()
    numbers = iter(range(len(lines)))
    for start in numbers:
        opened = FENCE.match(lines[start])
        if not opened:
            continue
        indent, ticks, info = opened.groups()
        end = next((n for n in numbers if lines[n].strip() == ticks), None)
        if end is None:
            raise ValueError(f"the block in line {start + 1} does not end")
        yield Block(
            language=info.strip().split(" ")[0].lower(),
            line=start + 2,
            text="\n".join(line.removeprefix(indent) for line in lines[start + 1 : end]),
            continues=start > 0 and lines[start - 1].strip() == CONTINUES,
        )


def run_blocks(page: str, name: str) -> int:
    """Run a page's python blocks in order; how many there were. An error names the page's line."""
    namespace: dict[str, Any] = {}
    count = 0
    for block in blocks_of(page):
        if block.language not in {"python", "py", "pycon", "python3"}:
            continue
        if block.language != "python":
            raise ValueError(f"{name}, line {block.line}: name the block python, so that it runs")
        if not block.continues:
            namespace = {"__name__": "__main__"}
        code = compile("\n" * (block.line - 1) + block.text, name, "exec")
        exec(code, namespace)  # noqa: S102
        count += 1
    return count


def unknown_targets(page: str, makefile: str) -> list[str]:
    """What `make` commands, in a page's shell blocks and text, ask for and the makefile lacks."""
    targets = set(re.findall(r"^([\w./-]+):(?!=)", makefile, re.MULTILINE))
    commands = [
        line
        for block in blocks_of(page)
        if block.language in SHELLS
        for line in block.text.splitlines()
    ]
    commands += re.findall(r"(?<!`)`(make [^`]+)`", page)
    asked = [
        word
        for command in commands
        if (found := command.strip().removeprefix("$ ")).startswith("make ")
        for word in shlex.split(found, comments=True)[1:]
        if "=" not in word and not word.startswith("-")
    ]
    return [word for word in asked if word not in targets]


@pytest.fixture
def _offline(monkeypatch, tmp_path):
    """A folder of its own, the same random numbers each time, and no network."""

    def refuse(self: socket.socket, address: object) -> None:  # noqa: ARG001
        raise OSError(f"a test of the pages asked for the network: {address}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    torch.manual_seed(0)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page):
    run_blocks(page.read_text(), page.name)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_runs_and_says_something(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_make_commands_name_targets(page):
    assert unknown_targets(page.read_text(), (ROOT / "Makefile").read_text()) == []


def test_there_are_pages_and_examples():
    assert len(PAGES) > 1
    assert EXAMPLES


def test_a_block_that_fails_fails_its_page():
    page = f"```python\none = 1\n```\n\n{CONTINUES}\n```python\nassert one == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        run_blocks(page, "page.md")
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == ("page.md", 7)


def test_a_block_that_warns_fails_its_page():
    page = "```python\nimport warnings\n\nwarnings.warn('old')\n```\n"
    with pytest.raises(UserWarning, match="old"):
        run_blocks(page, "page.md")


def test_a_block_shares_names_only_with_those_that_it_continues():
    page = "```python\none = 1\n```\n{}```python\nassert one == 1\n```\n"
    assert run_blocks(page.format(f"{CONTINUES}\n"), "page.md") == 2
    with pytest.raises(NameError):
        run_blocks(page.format(""), "page.md")


@pytest.mark.parametrize("page", ["```py\n1\n```\n", "```python\n1\n"])
def test_a_block_that_would_not_run_unseen_is_refused(page):
    with pytest.raises(ValueError, match="line"):
        run_blocks(page, "page.md")


def test_indented_blocks_and_other_languages():
    page = "- item\n\n    ```python\n    one = 1\n    assert one\n    ```\n\n```yaml\na: 1\n```\n"
    assert [block.language for block in blocks_of(page)] == ["python", "yaml"]
    assert run_blocks(page, "page.md") == 1


def test_a_make_command_without_its_target_is_found():
    page = "```sh\nmake demo ARGS='--prompt x'\n$ make nothing  # more\n```\n"
    page += "`make none`, `make demo`\n"
    assert unknown_targets(page, "demo: x\nVENV := y\n") == ["nothing", "none"]


def test_the_settings_and_data_of_the_training_page_hold(tmp_path):
    page = (ROOT / "docs" / "training.md").read_text()
    blocks = {block.language: block.text for block in reversed([*blocks_of(page)])}
    (tmp_path / "train.yaml").write_text(blocks["yaml"])
    (tmp_path / "rows.jsonl").write_text(blocks["json"])
    recipes = read_config(tmp_path / "train.yaml").adapters
    assert [parse_recipe(raw).kind for raw in recipes.values()] == ["FLORA", "FLORA", "LORA"]
    assert {example.adapter for example in read_examples(tmp_path / "rows.jsonl")} <= set(recipes)


def test_the_diff_that_adds_a_kind_is_its_module():
    """CONTRIBUTING shows a kind whole: one file, and one line of the table."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (diff,) = [block.text for block in blocks_of(page) if block.language == "diff"]
    table, module = diff.split("--- /dev/null\n")
    (line,) = [line[1:] for line in table.splitlines() if line.startswith("+ ")]
    assert line in (ROOT / "flora/adapters/kinds/__init__.py").read_text()
    path = re.search(r"^\+\+\+ b/(\S+)$", module, re.MULTILINE)[1]
    added = [line[1:] for line in module.splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert added == (ROOT / path).read_text().splitlines()


@pytest.mark.parametrize(
    ("page", "table"), [("adapters", KINDS), ("kinds", KINDS), ("operator", BACKENDS)]
)
def test_a_page_has_each_entry_of_its_table(page, table):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert [name for name in table if f"`{name}`" not in text] == []


def test_the_page_of_the_structure_has_each_module():
    text = (ROOT / "docs" / "structure.md").read_text()
    modules = [
        path
        for path in ROOT.glob("flora/**/*.py")
        if path.name != "__init__.py" and path.parent.name not in {"kinds", "commands"}
    ]
    assert [path.name for path in modules if path.name not in text] == []


RESULTS = re.compile(r"\((?:docs/)?results/([\w-]+\.json)\)")
FIGURE = re.compile(r"[\d,]*\d(\.\d+)?")
QUOTING = ("README.md", "docs/bench.md", "docs/performance.md", "docs/vllm.md")


def quoted_rows(page: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Of each row of a page's tables its label, its figures and the results its section names."""
    results: list[str] = []
    in_block = False
    for line in page.splitlines():
        in_block ^= line.startswith("```")
        if line.startswith("#") and not in_block:
            results = []
        results += RESULTS.findall(line)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        figures = [cell for cell in cells if FIGURE.fullmatch(cell)]
        if line.startswith("|") and results and figures:
            yield cells[0], figures, results


def renderings(record: dict[str, Any]) -> set[str]:
    """A record's numbers as a page may write them, in their unit, in thousandths or millions."""
    numbers = [value for value in record.values() if isinstance(value, int | float)]
    scales = (1, 1e3, 1e6, 1e-6)
    return {f"{n * scale:,.{digits}f}" for n in numbers for scale in scales for digits in range(3)}


def fits(label: str, record: dict[str, Any]) -> bool:
    """Whether a row's label may be that of a record: each system and kind that it names."""
    names = {"PEFT": "peft", "flora": "flora", "base": "base", "none": "base"}
    kinds = {"FLoRA": "FLORA", " LoRA": "LORA", "IA3": "IA3"}
    parts = re.split(r"\W", " ".join(str(record.get(c)) for c in ("system", "kind", "mix")))
    return all(part in parts for name, part in (names | kinds).items() if name in f" {label}")


def summaries(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """How far `op`'s systems are from the limit at each rank, with 8 rows and more."""
    times: dict[int, dict[str, list[float]]] = {}
    for r in records:
        if r.get("times_limit") and r["rows"] >= 8:
            of_rank = times.setdefault(r["rank"], {})
            of_rank.setdefault(f"{r['system']} {r['kind']}", []).append(r["times_limit"])
    for rank, of_rank in times.items():
        yield {"rank": rank} | {name: median(values) for name, values in of_rank.items()}


@pytest.mark.parametrize(
    ("page", "results"),
    [
        ("README.md", "demo.json"),
        ("docs/bench.md", "decode.json"),
        ("docs/bench.md", "train.json"),
        ("docs/vllm.md", "serve.json"),
        ("docs/vllm.md", "serve-bf16.json"),
    ],
)
def test_a_page_quotes_what_was_measured(page, results):
    records = json.loads((ROOT / "docs/results" / results).read_text())
    rows = [line.split("|")[2:4] for line in (ROOT / page).read_text().splitlines()]
    quoted = [[cell.strip() for cell in row] for row in rows]
    for record in records:
        if "tokens_per_second" in record:
            figures = f"{record['tokens_per_second']:.0f}", f"{record['ratio_to_base']:.2f}"
            assert list(figures) in quoted, record["system"]


@pytest.mark.parametrize("page", QUOTING)
def test_a_page_quotes_nothing_else(page):
    rows = list(quoted_rows((ROOT / page).read_text()))
    assert rows
    for label, figures, results in rows:
        records = [
            record
            for name in dict.fromkeys(results)
            for record in json.loads((ROOT / "docs/results" / name).read_text())
        ]
        records = [r for r in records if fits(label, r)] + list(summaries(records))
        assert any(set(figures) <= renderings(record) for record in records), (label, figures)


def test_a_row_that_was_not_measured_is_found():
    speed = "## Speed\n[these](results/a.json)\n```\n# no title\n```\n| x | 1 | 2.50 |\n"
    page = f"{speed}## More\n| y | 3 |\n"
    assert list(quoted_rows(page)) == [("x", ["1", "2.50"], ["a.json"])]
    assert {"1", "2,500", "2.50"} <= renderings({"rows": 1, "seconds": 2.5, "kind": "LORA"})
    lora = {"system": "peft-one", "kind": "LORA"}
    assert [fits(label, lora) for label in ("PEFT: LoRA", "FLoRA", "flora: LoRA")] == [
        True,
        False,
        False,
    ]
