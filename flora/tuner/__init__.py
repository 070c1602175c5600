"""FLoRA as a PEFT method; importing this registers it."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method

from flora.errors import UsageError
from flora.tuner.config import FloraConfig
from flora.tuner.layer import FloraLinear
from flora.tuner.model import FloraModel

__all__ = ["FloraConfig", "FloraLinear", "FloraModel", "register"]

NAME = "FLORA"


def register() -> None:
    """Make FLORA known to PEFT; a second call changes nothing, a reload brings the new classes.

    `register_peft_method` takes members of `PeftType` only, and the enumeration is closed, so the
    member is added by hand. Raises UsageError where PEFT has a FLORA of someone else's.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_, member.__objclass__ = NAME, NAME, PeftType
        member._sort_order_ = len(PeftType.__members__)
        setattr(PeftType, NAME, member)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(NAME)
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=FloraConfig, model_cls=FloraModel)
    elif known.__module__ != FloraConfig.__module__:
        raise UsageError(f"PEFT knows another method named {NAME} already, from {known.__module__}")
    else:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(NAME)] = FloraConfig
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType(NAME)] = FloraModel


register()
