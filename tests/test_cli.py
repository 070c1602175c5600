"""The command line's contracts, as a user meets them: exit codes, one line, files."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flora.adapters.checkpoint import read_checkpoint, write_checkpoint
from flora.adapters.core import Base
from flora.base import ModelBase
from flora.cli import COMMANDS, main
from flora.training.trainer import JointTrainer, parse_recipe
from tests.tiny import save_tiny_model, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, three adapters of it that are away from the identity, and data for all."""
    folder = tmp_path_factory.mktemp("cli")
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "model"))
    recipes = {
        "ruby": {"peft_type": "FLORA", "r": 2, "learning_rate": 1e-3},
        "sql": {"peft_type": "LORA", "r": 4, "learning_rate": 1e-3},
        "rust": {
            "peft_type": "FLORA",
            "learning_rate": 1e-3,
            "target_modules": ["o_proj", "down_proj"],
        },
    }
    trained = {name: parse_recipe(recipe) for name, recipe in recipes.items()}
    with JointTrainer(model, trained) as trainer:
        torch.manual_seed(1)
        for name in recipes:
            for leaf in trainer.adapters.leaves(name):
                leaf.data += 0.3 * torch.randn_like(leaf)
        trainer.save(folder / "adapters", "a/base")
    with (folder / "data.jsonl").open("w") as file:
        for i in range(6):
            row = {"adapter": ["ruby", "sql"][i % 2], "text": f"def f{i}(x) x + {i} end"}
            file.write(json.dumps(row) + "\n")
    return folder


def run(capsys, *arguments):
    """The exit code, and what was printed to either stream."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def fails(capsys, code, said, *arguments):
    """The command fails with this code and just one line, which says this."""
    found, _, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("flora:")]
    assert (found, len(err.strip().splitlines()), len(lines)) == (code, 1, 1), err
    assert said in err


def config(folder, tmp_path, **changes):
    settings = {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "output": str(tmp_path / "out"),
        "steps": 3,
        "max_tokens": 16,
        "adapters": {
            "ruby": {"peft_type": "FLORA", "r": 1, "learning_rate": 8e-3},
            "sql": {"peft_type": "LORA", "r": 4, "learning_rate": 1e-3},
        },
    } | changes
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return path


def jsonl(path, *lines):
    path.write_text("".join(l if isinstance(l, str) else json.dumps(l) + "\n" for l in lines))  # noqa: E741
    return path


def test_every_command_has_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in COMMANDS:
        assert name in out
        code, text, _ = run(capsys, name, "--help")
        assert code == 0
        assert "Usage: flora " + name in text


def test_wrong_usage_is_exit_code_2(capsys, folder):
    fails(capsys, 2, "Missing command")
    fails(capsys, 2, "No such command", "nothing")
    fails(capsys, 2, "Missing argument", "inspect")
    fails(capsys, 2, "No such option", "inspect", folder / "adapters/ruby", "--what")
    fails(capsys, 2, "--rows", "generate", "m", "--adapters", "a", "--input", "x", "--rows", "0")


def test_the_installed_command_is_the_same():
    done = subprocess.run(
        [sys.executable, "-c", "from flora.cli import main; main()", "inspect", "nowhere"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "flora: there is no adapter folder 'nowhere'\n"


def test_what_comes_with_vllm_is_missed_in_one_line():
    code = "import sys; sys.modules['httpx'] = None; from flora.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "serve"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "flora: this needs httpx: pip install 'flora-llm[vllm]'\n"


WAITING = """
import os, time
from flora.bench.processes import Child
from flora.cli import app, main

@app.command()
def wait():
    with Child("its own", ["sleep", "600"], dict(os.environ)) as child:
        print(child.process.pid, flush=True)
        time.sleep(600)

main(["wait"])
"""


def test_a_command_that_is_told_to_end_leaves_no_process_behind():
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE) as command:
        child = psutil.Process(int(command.stdout.readline()))
        command.terminate()
        assert command.wait(60) == 128 + signal.SIGTERM
    assert not child.is_running()


# inspect


def test_inspect_shows_an_adapter(capsys, folder, tmp_path):
    code, out, _ = run(capsys, "inspect", folder / "adapters/ruby", "--json", tmp_path / "x.json")
    assert code == 0
    (record,) = json.loads((tmp_path / "x.json").read_text())
    checkpoint = read_checkpoint(folder / "adapters/ruby")
    assert record["identity"] == checkpoint.identity
    assert record["bytes"] == sum(t.nbytes for t in checkpoint.tensors().values())
    assert record["kind"] == "FLORA"
    assert record["base_model"] == "a/base"
    (layer,) = [m for m in record["modules"] if m["module"] == "model.layers.1.self_attn.q_proj"]
    assert layer == {
        "module": "model.layers.1.self_attn.q_proj",
        "out": 32,
        "in": 32,
        "pairs": 2,
        "rank": 0,
        "bias": False,
    }
    assert record["made_with"] == []
    assert checkpoint.identity[:40] in out
    assert "FLORA" in out


def damage(folder, tmp_path, change):
    """A copy of an adapter, changed."""
    checkpoint = read_checkpoint(folder / "adapters/ruby")
    write_checkpoint(tmp_path / "bad", checkpoint)
    change(tmp_path / "bad")
    return tmp_path / "bad"


def put_nan(path):
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors")


def put_pickle(path):
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps({}))


def put_rank(path):
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | {"r": 0}))


@pytest.mark.parametrize(
    ("change", "said"),
    [(put_nan, "NaN"), (put_pickle, "pickle"), (put_rank, "r = 0")],
)
def test_a_bad_adapter_is_refused_by_every_command(capsys, folder, tmp_path, change, said):
    bad = damage(folder, tmp_path, change)
    lines = jsonl(tmp_path / "in.jsonl", {"prompt": "x"})
    model = folder / "model"
    fails(capsys, 1, said, "inspect", bad)
    fails(capsys, 1, said, "merge", model, bad, tmp_path / "merged")
    out = tmp_path / "out.jsonl"
    fails(capsys, 1, said, "generate", model, "--adapters", bad, "--input", lines, "--output", out)
    assert not (tmp_path / "merged").exists()
    assert not out.exists()


# merge


@pytest.mark.parametrize("name", ["ruby", "sql"])
def test_a_merged_model_answers_as_the_adapter_does(capsys, folder, tmp_path, name):
    import flora

    out = tmp_path / "merged"
    assert run(capsys, "merge", folder / "model", folder / f"adapters/{name}", out)[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        plain = model(ids).logits
        flora.attach(model, {name: folder / f"adapters/{name}"})
        adapted = model(ids, adapter_names=[name]).logits
        assert (adapted - plain).abs().max() > 1e-2
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert (out / "tokenizer.json").is_file()


def test_merge_writes_over_nothing_and_needs_the_right_model(capsys, folder, tmp_path):
    model, adapter = folder / "model", folder / "adapters/ruby"
    fails(capsys, 2, "exists already", "merge", model, adapter, tmp_path)
    fails(capsys, 2, "no adapter folder", "merge", model, tmp_path / "none", tmp_path / "out")
    fails(capsys, 2, "no model folder", "merge", tmp_path / "none", adapter, tmp_path / "out")
    other = tiny_llama()
    other.config.hidden_size = other.config.intermediate_size = 24
    type(other)(other.config).save_pretrained(tmp_path / "other")
    for file in (folder / "model").glob("tokenizer*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    fails(capsys, 1, "expected", "merge", tmp_path / "other", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


# generate


def generate(capsys, folder, path, *more):
    return run(
        capsys,
        "generate",
        folder / "model",
        "--adapters",
        folder / "adapters",
        "--input",
        path,
        "--new-tokens",
        "6",
        *more,
    )


def test_generate_answers_each_line_by_its_own_adapter_in_order(capsys, folder, tmp_path):
    names = ["ruby", None, "sql", "rust", "ruby", "sql", None]
    prompts = ["one", "two and more", "three", "one", "five", "three", "one"]
    lines = [{"adapter": a, "prompt": p, "id": i} for i, (a, p) in enumerate(zip(names, prompts))]  # noqa: B905
    path = jsonl(tmp_path / "in.jsonl", *lines)
    code, out, _ = generate(capsys, folder, path, "--rows", "4")
    assert code == 0
    results = [json.loads(line) for line in out.splitlines()]
    assert [{k: r[k] for k in ("adapter", "prompt", "id")} for r in results] == lines
    alone = []
    for line in lines:
        code, out, _ = generate(capsys, folder, jsonl(tmp_path / "one.jsonl", line))
        alone.append(json.loads(out)["text"])
    assert [r["text"] for r in results] == alone
    assert len({r["text"] for r in results if r["prompt"] == "one"}) == 3


def test_generate_survives_bad_lines(capsys, folder, tmp_path):
    path = jsonl(
        tmp_path / "in.jsonl",
        {"adapter": "ruby", "prompt": "a"},
        "{broken\n",
        '["a list"]\n',
        {"adapter": "nobody", "prompt": "a"},
        {"adapter": "ruby"},
        {"adapter": 3, "prompt": "a"},
        {"adapter": ["ruby"], "prompt": "a"},
        {"prompt": "long " * 60},
        {"messages": [{"role": "user", "content": "a"}]},
        "\n",
        {"prompt": "a"},
    )
    code, out, err = generate(capsys, folder, path, "--output", tmp_path / "out.jsonl")
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (code, out) == (1, "")
    assert "8 of 10 lines failed" in err
    assert ["text" in r for r in results] == [True, *[False] * 8, True]
    assert "not JSON" in results[1]["error"]
    assert "no adapter 'nobody'" in results[3]["error"]
    assert results[4]["error"] == "no prompt"
    assert results[7]["error"] == "the prompt has 300 tokens, the model has room for 250"
    assert "do not fit" in results[8]["error"]  # this tokenizer has no template


def test_generate_survives_bytes_that_are_no_text(capsys, folder, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"prompt": "\xff"}\n'
        b'{"prompt": "a", "note": "\\ud800", "error": "old", "text": "old"}\n'
        b'{"prompt": "\\ud800"}\n'
        b'{"messages": [[{"role": "user", "content": "a"}]]}\n'
    )
    code, _, err = generate(capsys, folder, path, "--output", tmp_path / "out.jsonl")
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert code == 1
    assert "of 4 lines failed" in err
    assert "not JSON" in results[0]["error"]
    assert results[1]["note"] == "\ud800"
    assert results[1]["text"] != "old"
    assert "error" not in results[1]
    assert "do not fit" in results[3]["error"]


def test_generate_refuses_what_would_lose_or_cannot_be(capsys, folder, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", {"prompt": "a"})
    call = ("generate", folder / "model", "--adapters", folder / "adapters", "--input", path)
    fails(capsys, 2, "--output is the --input file", *call, "--output", path)
    assert json.loads(path.read_text()) == {"prompt": "a"}
    fails(capsys, 2, "room for 256 tokens", *call, "--new-tokens", "300")
    fails(capsys, 2, "--seed", *call, "--temperature", "1", "--seed", "-1")
    fails(capsys, 1, "No such file", *call, "--output", tmp_path / "none/x.jsonl")


def test_train_loses_nothing_that_is_there(capsys, folder, tmp_path):
    (tmp_path / "out/ruby").mkdir(parents=True)
    (tmp_path / "out/ruby/mine.txt").write_text("mine")
    fails(capsys, 2, "no adapter's folder", "train", config(folder, tmp_path))
    assert (tmp_path / "out/ruby/mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    fails(capsys, 2, "no folder", "train", config(folder, tmp_path, output=str(tmp_path / "file")))


def test_a_model_that_is_broken_is_one_line(capsys, folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    fails(capsys, 2, "cannot load", "merge", model, folder / "adapters/ruby", tmp_path / "out")
    (model / "tokenizer.json").write_text("{}")
    fails(capsys, 2, "cannot load", "merge", model, folder / "adapters/ruby", tmp_path / "out")


def test_generate_takes_messages_by_the_models_template(capsys, folder, tmp_path):
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    chat = [{"role": "user", "content": "a"}]
    path = jsonl(
        tmp_path / "in.jsonl",
        {"adapter": "sql", "messages": chat},
        {"adapter": "sql", "prompt": "<s>user: a\n"},
    )
    call = ("--adapters", folder / "adapters", "--input", path, "--new-tokens", "6")
    code, out, _ = run(capsys, "generate", model, *call)
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    assert code == 0
    assert texts[0] == texts[1] != ""


def test_generate_samples_by_its_seed(capsys, folder, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", {"adapter": "sql", "prompt": "abc"})
    texts = [
        generate(capsys, folder, path, "--temperature", "2", "--seed", seed)[1] for seed in "112"
    ]
    assert texts[0] == texts[1] != texts[2]


def test_generate_says_what_is_missing(capsys, folder, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", {"prompt": "a"})
    call = ("--adapters", folder / "adapters", "--input")
    fails(capsys, 2, "no input file", "generate", folder / "model", *call, tmp_path / "none")
    fails(capsys, 2, "no model folder", "generate", tmp_path / "none", *call, path)
    fails(capsys, 2, "holds no adapter", "generate", "m", "--adapters", tmp_path, "--input", path)
    empty = jsonl(tmp_path / "empty.jsonl")
    out = ("--output", tmp_path / "out.jsonl")
    fails(capsys, 1, "holds no line", "generate", folder / "model", *call, empty, *out)
    assert not (tmp_path / "out.jsonl").exists()


# train


def test_train_writes_adapters_and_losses(capsys, folder, tmp_path):
    code, out, _ = run(capsys, "train", config(folder, tmp_path))
    assert code == 0
    assert "ruby" in out
    assert "sql" in out
    assert sorted(os.listdir(tmp_path / "out")) == ["losses.jsonl", "ruby", "sql"]
    losses = [json.loads(x) for x in (tmp_path / "out/losses.jsonl").read_text().splitlines()]
    assert [x["step"] for x in losses] == [1, 2, 3]
    assert set(losses[0]["losses"]) == {"ruby", "sql"}
    base: Base = ModelBase(AutoModelForCausalLM.from_pretrained(folder / "model"))
    first = {n: read_checkpoint(tmp_path / "out" / n, base).identity for n in ("ruby", "sql")}
    assert run(capsys, "train", config(folder, tmp_path))[0] == 0
    again = {n: read_checkpoint(tmp_path / "out" / n, base).identity for n in ("ruby", "sql")}
    assert again == first
    assert run(capsys, "train", config(folder, tmp_path, seed=1))[0] == 0
    assert read_checkpoint(tmp_path / "out/sql", base).identity != first["sql"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps = 0: Input should be greater than 0"),
        ({"steps": None}, "steps: Field required"),
        ({"step": 3}, "step: Extra inputs are not permitted; the keys are model, data"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 2}, "constant has no warmup_steps"),
        ({"lr_scheduler_type": "sine"}, "lr_scheduler_type = 'sine'"),
        ({"data": "nowhere.jsonl"}, "no data file 'nowhere.jsonl'"),
        ({"model": "./nowhere"}, "no model folder"),
        ({"adapters": {}}, "adapters"),
        ({"adapters": {"ruby": {"peft_type": "FLORA", "r": 1, "learning_rate": 1}}}, "sql"),
        ({"adapters": {"../x": {"peft_type": "FLORA", "learning_rate": 1}}}, "adapter's folder"),
        (
            {"adapters": {"a": {"peft_type": "FLORA", "r": 0, "learning_rate": 1}}},
            "adapters.a: adapter_config.json: r = 0",
        ),
        ({"adapters": {"a": {"peft_type": "NEW", "learning_rate": 1}}}, "'NEW' is not supported"),
        ({"adapters": {"a": {"peft_type": "FLORA", "learning_rate": -1}}}, "adapters.a"),
        ({"adapters": {"a": {"peft_type": "FLORA", "learning_rate": "x"}}}, "adapters.a"),
        ({"adapters": {"a": {"peft_type": "FLORA"}}}, "adapters.a: learning_rate: Field required"),
        (
            {"adapters": {"a": {"peft_type": "LORA", "learning_rate": 1, "use_qalora": True}}},
            "use_qalora",
        ),
    ],
)
def test_a_bad_config_is_wrong_usage(capsys, folder, tmp_path, changes, said):
    fails(capsys, 2, said, "train", config(folder, tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_none(capsys, tmp_path):
    fails(capsys, 2, "no config", "train", tmp_path / "none.yaml")
    for text in ("a: [", "- a", ""):
        (tmp_path / "x.yaml").write_text(text)
        fails(capsys, 2, "not", "train", tmp_path / "x.yaml")
