"""A process of its own with a vLLM engine, or with vLLM's client, that waits for its turn.

`python -m flora.bench.engine`: the first line of its input is what it is to be, as JSON, and each
other line a task. Each is answered by a line of output, the first one when all is ready. What vLLM
prints goes to the standard error.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

Task = Callable[[Any], Any]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's processes inherit it

    def answer(value: Any) -> None:
        answers.write(f"{json.dumps(value)}\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    work, ready = (client(), None) if job is None else engine(**job)
    answer(ready)
    for line in sys.stdin:
        answer(work(json.loads(line)))


def engine(
    options: dict[str, Any], prompts: list[list[int]], new_tokens: int
) -> tuple[Task, int | None]:
    """An engine that answers the prompts, all at once, each time that it is asked.

    options: of `LLM`.
    prompts: token ids.

    A task is each row's adapter, `[name, number, folder]`, or None for the base; its answer are the
    rows' new tokens. With it comes how many threads the model computes in, on a CPU.
    """
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for a function to the engine's process
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(skip_tokenizer_init=True, disable_log_stats=True, **options)
    rows = [{"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )

    def generate(adapters: list[list[Any] | None]) -> list[list[int]]:
        requests = [adapter and LoRARequest(*adapter) for adapter in adapters]
        outputs = llm.generate(rows, sampling, lora_request=requests, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    threads: list[int | None] = llm.collective_rpc(_threads)
    return generate, threads[0]


def _threads(worker: Any) -> int | None:
    return torch.get_num_threads() if worker.device.type == "cpu" else None


def client() -> Task:
    """vLLM's own client of a server. A task are the arguments of its `vllm bench serve`, and its
    answer is what that would save.

    The command `vllm` itself does not start where vLLM is installed under another name.
    """
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as run
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return lambda arguments: run(parser.parse_args(arguments))


if __name__ == "__main__":  # vLLM spawns processes that import this module
    main()
