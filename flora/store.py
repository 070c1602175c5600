"""A name -> a local folder that holds an adapter."""

import os
from pathlib import Path

from flora.adapters.checkpoint import CONFIG_FILE, TENSORS_FILE
from flora.errors import UsageError


def fetch(source: str | os.PathLike[str]) -> Path:
    """The local folder of an adapter: a folder as it is, else a repository of the Hugging Face hub.

    Raises UsageError where there is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            return Path(snapshot_download(source, allow_patterns=[CONFIG_FILE, TENSORS_FILE]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(f"no adapter {source!r} here or on the hub: {reason}") from None
    raise UsageError(f"there is no adapter folder {str(source)!r}")
