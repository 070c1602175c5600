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


def engine(options: dict[str, Any], prompts: list[list[int]], new_tokens: int) -> tuple[Task, str]:
    """An engine that answers the prompts, all at once, each time that it is asked.

    options: of `LLM`.
    prompts: token ids.

    A task is each row's adapter, `[name, number, folder]`, or None for the base; its answer are the
    rows' new tokens. A number as a task has the product of each linear layer taken of so many
    tokens, once, as the model takes it. With the task comes the type of the model's device.
    """
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for a function to the engine's process
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(skip_tokenizer_init=True, disable_log_stats=True, **options)
    rows = [{"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )

    def work(task: list[list[Any] | None] | int) -> list[list[int]] | None:
        if isinstance(task, int):
            llm.collective_rpc(_take_products, args=(task,))
            return None
        requests = [adapter and LoRARequest(*adapter) for adapter in task]
        outputs = llm.generate(rows, sampling, lora_request=requests, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    devices: list[str] = llm.collective_rpc(_device)
    return work, devices[0]


def _device(worker: Any) -> str:
    kind: str = worker.device.type
    return kind


def _take_products(worker: Any, tokens: int) -> None:
    """The product of each linear layer but the head, by vLLM's own kernels and threads."""
    import torch
    from vllm.model_executor.layers.linear import LinearBase

    runner = worker.model_runner
    layers = [layer for layer in runner.model.modules() if isinstance(layer, LinearBase)]
    with torch.inference_mode():
        inputs = {  # not drawn: that would be timed as well
            width: torch.ones(tokens, width, dtype=runner.dtype, device=worker.device)
            for width in {layer.input_size_per_partition for layer in layers}
        }
        for layer in layers:
            layer.quant_method.apply(layer, inputs[layer.input_size_per_partition], None)


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
