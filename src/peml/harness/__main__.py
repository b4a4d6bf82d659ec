"""`python -m peml.harness`: lm-eval's own command line, which imports no further packages, with the model `peml`."""

import peml.harness  # noqa: F401  (adds the model)
from peml.harness.run import needs_harness

if __name__ == "__main__":
    needs_harness()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
