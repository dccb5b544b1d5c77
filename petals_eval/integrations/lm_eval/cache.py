"""Whose answers a cache of the harness holds."""

import json
from collections.abc import MutableMapping
from typing import Any

from petals_eval.errors import ConfigError
from petals_eval.integrations.manifest import BackendManifest

__all__ = ["check_cache"]

_FINGERPRINT = "petals-eval"
"""The key of a cache that names whose answers it holds; the harness's own keys are hashes."""


def check_cache(cache: MutableMapping[str, Any] | None, manifest: BackendManifest) -> None:
    """Put into the harness's cache of answers whose they are.

    The harness knows a request by its text alone, and would hand the answers of one model to another. Raises
    ConfigError where it holds those of another backend, model or settings.
    """
    if cache is None:
        return
    ours = manifest.whose()
    if len(cache) == 0:
        cache[_FINGERPRINT] = json.dumps(ours)
    elif _FINGERPRINT not in cache:
        raise ConfigError(
            "--use_cache: expected a cache of this backend, found one with the answers of another. Name another file."
        )
    theirs = json.loads(cache[_FINGERPRINT])
    different = [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]
    if different:
        shown = "; ".join(f"{key}: was {theirs.get(key)}, now {ours.get(key)}" for key in different)
        raise ConfigError(
            f"--use_cache: this cache holds answers of another model or settings ({shown}). Name another file."
        )
