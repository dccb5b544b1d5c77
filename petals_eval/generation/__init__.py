"""Texts that a model generates token by token: which token comes next, when a text ends, and how many grow at once."""
