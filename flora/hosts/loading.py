"""A model and its tokenizer, from a folder or the hub."""

from pathlib import Path
from typing import Any

import torch

from flora.errors import UsageError


def find_model(source: str) -> str:
    """A model's folder by its whole path, or a repository of the hub as it is named.

    Raises UsageError where a folder is meant and there is none.
    """
    if source.startswith((".", "/", "~")):
        source = str(Path(source).expanduser())
        if not Path(source).is_dir():
            raise UsageError(f"there is no model folder {source!r}")
    return source


def load_model(source: str, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer, padding on the left.

    source: a folder or a repository of the hub; its own code is never run, no pickle is opened.
    dtype:  of the weights; "auto" is what they are saved in.

    Raises UsageError, in one line, where there is none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = find_model(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, padding_side="left", trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # a broken file makes each library raise what it likes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"cannot load the model {source!r}: {reason}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer
