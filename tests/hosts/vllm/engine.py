"""A vLLM engine in a process of its own, as it changes much of what others in one would see.

Run with a job and a result as files. The job:

model:   its folder.
options: of `LLM`, beside those that all have here.
steps:   what is done, one after the other: `{"generate": [[adapter's folder or None, prompt], …]}`,
         or `{"call": name of the engine's method, "arguments": […]}`, where a folder stands for a
         request of it; `{"copy": [from, to]}` writes a folder anew; `{"lose": folder}` deletes what
         the plugin has copied of it.

A prompt is its tokens, or `{"audio": file of numpy's, "tokens": […]}` for Whisper.

The result has for each step the tokens of each row, `[tokens, their log-probabilities]` where it is
audio's, what the method returned, or the error as `{"error": [type, text]}`. A folder's name is its
adapter's name, and its number the folder's place among those that were named first.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

NEW_TOKENS = 12

SAMPLES = 16_000
"""Of audio, a second's."""


def main(job_file: str, result_file: str) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM

    job = json.loads(Path(job_file).read_text())
    common = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 128}
    llm = LLM(job["model"], disable_log_stats=True, **{**common, **job["options"]})
    requests: dict[str, Any] = {}
    results = []
    for step in job["steps"]:
        try:
            results.append(_do(llm, step, requests))
        except Exception as error:
            results.append({"error": [type(error).__name__, str(error)]})
    Path(result_file).write_text(json.dumps(results))


def _do(llm: Any, step: Any, requests: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from flora.hosts.vllm.requests import snapshots

    def request(folder: str | None) -> Any:
        if folder is None:
            return None
        if folder not in requests:
            requests[folder] = LoRARequest(Path(folder).name, len(requests) + 1, folder)
        return requests[folder]

    if "copy" in step:
        old, new = step["copy"]
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new)
        return None
    if "lose" in step:
        # As a server has it, which does not look at the folder again.
        requests[step["lose"]] = taken = snapshots().take(request(step["lose"]))
        shutil.rmtree(taken.lora_path)
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
        [_prompt(prompt) for _, prompt in rows],
        SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0
        ),
        lora_request=[request(folder) for folder, _ in rows],
        use_tqdm=False,
    )
    return [
        _answer(output.outputs[0], with_scores=isinstance(prompt, dict))
        for output, (_, prompt) in zip(outputs, rows, strict=True)
    ]


def _prompt(prompt: Any) -> Any:
    if not isinstance(prompt, dict):
        return {"prompt_token_ids": prompt}
    audio = np.load(prompt["audio"]), SAMPLES
    return {
        "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": audio}},
        "decoder_prompt": {"prompt_token_ids": prompt["tokens"]},
    }


def _answer(output: Any, *, with_scores: bool) -> Any:
    tokens = list(output.token_ids)
    if not with_scores:
        return tokens
    scores = zip(tokens, output.logprobs, strict=True)
    return tokens, [found[token].logprob for token, found in scores]


if __name__ == "__main__":
    main(*sys.argv[1:])
