"""`flora generate`: prompts in, answers out, each line by its own adapter, in mixed batches."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer


def command(
    model: Annotated[str, typer.Argument(help="A folder or a repository of the hub.")],
    adapters: Annotated[
        str, typer.Option(help="A folder of adapters, named by their folders; or one adapter.")
    ],
    input: Annotated[  # noqa: A002
        str,
        typer.Option(
            help='JSONL, "-" for standard input: {"adapter": name or null, "prompt": text}, '
            'or "messages" in place of "prompt".'
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Where to write; standard output if not.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of sampling.")] = 0,
    engine: Annotated[str, typer.Option(help="transformers, or vllm where it is installed.")] = (
        "transformers"
    ),
) -> None:
    """Answer each line of a JSONL file by its own adapter; the results come in the same order.

    A line that does not hold has its error as its result, and the exit code is 1 at the end.
    """
    from flora.adapters.checkpoint import find_adapters
    from flora.errors import FloraError, UsageError
    from flora.hosts.offline import ENGINES, Sampling, load_engine
    from flora.store import fetch

    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}; these are: {', '.join(ENGINES)}")
    if input != "-" and not Path(input).is_file():
        raise UsageError(f"there is no input file {input!r}")
    if output is not None and output.exists() and input != "-" and output.samefile(input):
        raise UsageError("--output is the --input file; name another")
    folders = find_adapters(fetch(adapters))
    sampling = Sampling(new_tokens=new_tokens, temperature=temperature, seed=seed)
    loaded = load_engine(engine, model, folders, sampling, rows=rows)
    longest = None if loaded.room is None else loaded.room - new_tokens
    if longest is not None and longest < 1:
        said = f"the model has room for {loaded.room} tokens in all"
        raise UsageError(f"--new-tokens {new_tokens}: {said}")
    seen = failed = 0
    with ExitStack() as files:
        # As bytes: a line that is no UTF-8 is that line's fault alone.
        file = None if input == "-" else files.enter_context(Path(input).open("rb"))
        source = file or sys.stdin.buffer
        batches = _batches(source, rows)
        first = next(batches, None)
        if first is None:
            raise FloraError(f"{input!r} holds no line")
        opened = None if output is None else files.enter_context(output.open("wb"))
        sink = opened or sys.stdout.buffer
        for batch in chain([first], batches):
            requests = [_request(line, folders, loaded.tokenizer, longest) for line in batch]
            good = [request for request in requests if request.tokens]
            names = [request.result.get("adapter") for request in good]
            answers = iter(
                loaded.generate([request.tokens for request in good], names) if good else []
            )
            for request in requests:
                text = {"text": next(answers)} if request.tokens else {}
                line = json.dumps(request.result | text, ensure_ascii=False) + "\n"
                # A lone surrogate, which JSON may hold, goes out as JSON's own escape.
                sink.write(line.encode("utf-8", "backslashreplace"))
            sink.flush()
            seen += len(requests)
            failed += len(requests) - len(good)
    if failed:
        raise FloraError(f"{failed} of {seen} lines failed; their results say why")


class Request(NamedTuple):
    """A line: what its result repeats, with its error if it has one, and the prompt's tokens."""

    result: dict[str, Any]
    tokens: list[int]


def _batches(source: Iterable[bytes], rows: int) -> Iterator[list[bytes]]:
    lines = (line for line in source if line.strip())
    while batch := list(islice(lines, rows)):
        yield batch


def _request(line: bytes, folders: dict[str, Path], tokenizer: Any, longest: int | None) -> Request:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Request({"error": f"not JSON: {error}", "line": line.decode(errors="replace")}, [])
    if not isinstance(request, dict):
        return Request({"error": "not a JSON object", "line": line.decode(errors="replace")}, [])
    request = {key: value for key, value in request.items() if key not in ("error", "text")}
    name, prompt, messages = (request.get(key) for key in ("adapter", "prompt", "messages"))
    if name is not None and not (isinstance(name, str) and name in folders):
        return Request(request | {"error": f"there is no adapter {name!r}"}, [])
    tokens: list[int] = []
    try:  # tokenizers and templates are the model's own, and raise what they like
        if isinstance(prompt, str):
            tokens = tokenizer(prompt)["input_ids"]
        elif messages is not None:
            tokens = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        if not all(isinstance(token, int) for token in tokens):
            raise ValueError("these are several conversations")
    except Exception as error:
        return Request(request | {"error": f"the prompt or messages do not fit: {error}"}, [])
    if not tokens:
        return Request(request | {"error": "no prompt"}, [])
    if longest is not None and len(tokens) > longest:
        said = f"the prompt has {len(tokens)} tokens, the model has room for {longest}"
        return Request(request | {"error": said}, [])
    return Request(request, tokens)
