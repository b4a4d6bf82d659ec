"""Registration with PEFT. The only file that changes PEFT's internals; `tests/test_peft.py` notices when they move."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from peml.config import PemlConfig
from peml.tuner import PemlModel

NAME = "PEML"


def register() -> None:
    """Add the type `PEML` to PEFT, once per process."""
    if NAME not in PeftType.__members__:
        # PEFT has no entry point for methods from outside, and its enum cannot be subclassed.
        member = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
        type.__setattr__(PeftType, NAME, member)
    if PeftType.PEML not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=PemlConfig, model_cls=PemlModel)


register()
