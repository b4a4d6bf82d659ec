"""`python -m peml`."""

from peml.cli import main

main()
