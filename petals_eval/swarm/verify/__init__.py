"""Checks on strangers: a share of what servers compute is computed again elsewhere, and who is wrong is named."""
