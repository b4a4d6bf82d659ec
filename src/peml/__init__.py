"""peml: one language model, many tasks, one adapter."""

from peml import _peft as _peft
from peml.adapters import LoRA, MTLLoRA
from peml.config import PemlConfig
from peml.errors import PemlError
from peml.prompts import PrefixNAS, PrefixTuning
from peml.tuner import PemlModel
