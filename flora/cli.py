"""The command `flora`: dispatches, and turns every error of a user's into one line."""

import os
import signal
import sys
from importlib import import_module

import typer

from flora.errors import FloraError, UsageError

COMMANDS = {
    "bench": "flora.commands.bench",
    "demo": "flora.commands.demo",
    "generate": "flora.commands.generate",
    "inspect": "flora.commands.inspect",
    "merge": "flora.commands.merge",
    "plot": "flora.commands.plot",
    "train": "flora.commands.train",
}

EXTRAS = dict.fromkeys(("accelerate", "gguf", "peft", "transformers", "yaml"), "demo")
EXTRAS |= {"matplotlib": "plot"} | dict.fromkeys(("httpx", "openai", "vllm"), "vllm")
"""The extra of flora-llm that brings a package."""

app = typer.Typer(
    help="Batched low-rank adaptation: one batch, each row with its own adapter.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _name, _path in COMMANDS.items():
    _module = import_module(_path)
    if hasattr(_module, "app"):  # a group of commands
        app.add_typer(_module.app, name=_name)
    else:
        app.command(_name)(_module.command)


def main(arguments: list[str] | None = None) -> None:
    """Run a command line. Exit code 0: done, 1: the work failed, 2: wrong usage."""
    # Its default would leave behind the processes that a command started.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        code = app(arguments, prog_name="flora", standalone_mode=False) or 0
    except typer.Exit as stop:
        code = stop.exit_code
    except FloraError as error:
        code = _fail(error, 2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = _fail(error, 1)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        code = _fail(f"this needs {error.name}: pip install 'flora-llm[{EXTRAS[error.name]}]'", 1)
    except KeyboardInterrupt:
        code = _fail("stopped", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own: wrong options and arguments
            raise
        code = _fail(f"{error.format_message()} (see flora --help)", 2)
    sys.exit(code)


def _fail(reason: object, code: int) -> int:
    print("flora:", " ".join(str(reason).split()), file=sys.stderr)  # noqa: T201
    return code
