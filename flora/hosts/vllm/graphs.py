"""CUDA graphs, which would replay the adapters that they were captured with: so the adapted layers
run between them.

On a CPU there are none, and nothing here changes anything.
"""

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

from flora.errors import UsageError

OPERATOR = "flora::vllm_linear_into"
"""What an adapted layer is in compiled code that is cut; see `flora.hosts.vllm.layers`."""


def capture_pieces(config: CompilationConfig) -> None:
    """Have pieces of the model captured where all of it would be; none where it is not compiled."""
    if config.cudagraph_mode != CUDAGraphMode.NONE:
        compiled = config.mode == CompilationMode.VLLM_COMPILE
        config.cudagraph_mode = CUDAGraphMode.PIECEWISE if compiled else CUDAGraphMode.NONE


def split_at_layers(config: CompilationConfig) -> bool:
    """Have the model cut where an adapted layer is, before it is compiled.

    Returns whether it is: only CUDA graphs ask for it. Raises UsageError where vLLM captures more
    than pieces that attention, too, is between.
    """
    if config.cudagraph_mode == CUDAGraphMode.NONE:
        return False
    pieces = config.cudagraph_mode == CUDAGraphMode.PIECEWISE
    if not pieces or not config.splitting_ops_contain_attention():
        raise UsageError(
            "flora serves adapters with CUDA graphs between attention and linear layers only; "
            'leave splitting_ops and fuse_attn_quant as they are, or set "cudagraph_mode": "NONE" '
            "in --compilation-config"
        )
    if OPERATOR not in config.splitting_ops:
        config.splitting_ops.append(OPERATOR)
    return True
