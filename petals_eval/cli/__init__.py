"""The command `petals-eval`."""

from petals_eval.cli.app import main

__all__ = ["main"]
