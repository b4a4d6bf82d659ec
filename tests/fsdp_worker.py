"""`peml` under FSDP on processes without a GPU; started by `accelerate launch` in `test_launch.py`.

On a CPU accelerate sets FSDP aside without a word, and trains under DDP. What it does on GPUs is done here for any device.
"""

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from peml.cli import main

_own = AcceleratorState.__init__


def _sharded(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    first = not AcceleratorState._shared_state
    _own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if first and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        assert fsdp_plugin is not None
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = _sharded
    main()
