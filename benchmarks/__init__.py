"""What the adapters cost, measured beside the alternatives: `python -m benchmarks RUN`. See README.md."""

import os

# Both are read once, when the libraries are loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler is not to chatter between the tables
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from the Hub
