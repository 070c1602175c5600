"""FLoRA's settings as a PEFT config, and which layers read the same input."""

from dataclasses import dataclass, field

from peft import PeftConfig, PeftType

from flora.errors import UsageError

TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)
"""Layers side by side that read the same input, by the names that transformers gives them."""

CROSS = ("encoder_attn", "encdecattention", "crossattention", "cross_attn", "cross_attention")
"""Modules, in small letters, whose query reads the decoder, and key and value the encoder."""


@dataclass
class FloraConfig(PeftConfig):  # type: ignore[misc]
    """Settings of `FloraModel`: the adapted weight is W0 ∘ (Σ_j a_j b_jᵀ) / r.

    r:              the rank; about one base product more for each in decoding.
    target_modules: names or ends of names, a regular expression, or "all-linear"; None takes what
                    PEFT takes for LoRA on this architecture.
    exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in every PEFT method.
    rank_pattern:   module name, or a regular expression of its end, to another rank.
    init_weights:   True starts as the base model, False at random.
    share_input:    one `flora_B` for the layers that read the same input (`input_of`).

    Raises UsageError for a rank that is no positive number, and for fields that cannot go together.
    """

    r: int = 1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    share_input: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FLORA
        self.rank_pattern = dict(self.rank_pattern or {})
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if type(rank) is not int or rank < 1:
                raise UsageError(f"a rank is a positive whole number, but {name} is {rank!r}")
        if not isinstance(self.init_weights, bool):
            raise UsageError(f"init_weights is True or False, not {self.init_weights!r}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise UsageError(f"{name} needs target_modules as a list, not as a string")
        # Sets, as PEFT itself compares and saves them so.
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), list):
                setattr(self, name, set(names))


def input_of(module: str) -> str:
    """What a layer reads, as a key: layers with the same key read the same tensor.

    module: the layer's name in the model. A layer that no entry of `TOGETHER` names, and the query
    of a cross attention, reads on its own.
    """
    parent, _, name = module.rpartition(".")
    group: tuple[str, ...] = next((names for names in TOGETHER if name in names), (name,))
    if any(part.lower() in CROSS for part in parent.split(".")):
        group = group[:1] if name == group[0] else group[1:]
    return f"{parent}.{'+'.join(group)}"
