"""The plugin's settings, of vLLM's `--additional-config '{"flora": {…}}'`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from flora.errors import UsageError, faults


class Settings(BaseModel):
    """How the plugin serves.

    backend:       of `flora.ops`; "auto" chooses by the device.
    adapter_bytes: the most that adapters may take in each worker; no bound where it is null.
    keep_weights:  whether a CPU keeps W0 beside what vLLM packs of it, which long prompts of more
                   than one pair need to be fast. It takes the linear layers' size once more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str = "auto"
    adapter_bytes: int | None = None
    keep_weights: bool = True

    @classmethod
    def of(cls, vllm_config: Any) -> "Settings":
        """Those of a vLLM configuration. Raises UsageError, naming all that is wrong."""
        raw = vllm_config.additional_config
        try:
            return cls(**raw.get("flora", {})) if isinstance(raw, dict) else cls()
        except ValidationError as error:
            raise UsageError(f"--additional-config flora: {faults(error)}") from None
