"""What may stand in a file that is shared: names and hashes, never local paths or tokens."""

import re
from pathlib import Path

from pydantic import JsonValue

__all__ = ["shareable_name", "shareable_settings"]

_PATH = re.compile(r"(?:file:|~|\.{0,2}[/\\]|[A-Za-z]:[/\\])")
_SECRET_KEYS = frozenset(
    {"api_key", "auth", "authorization", "hf_token", "password", "secret", "token", "use_auth_token"}
)
_SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{16,}")
_REMOVED = "[removed]"


def shareable_name(name: str) -> str:
    """Return the name of a model, adapter or data set without where it lies on this machine.

    A hub name (`owner/name`) stays, unless a file or folder of that name lies here; of a path the last part stays.

    >>> [shareable_name(name) for name in ("/home/ada/models/llama", "~/prompts.pt", "meta-llama/Llama-2-7b")]
    ['llama', 'prompts.pt', 'meta-llama/Llama-2-7b']
    """
    if _PATH.match(name) or "\\" in name or name.count("/") > 1 or ("/" in name and Path(name).exists()):
        return _last_part(name)
    return _SECRET_VALUE.sub(_REMOVED, name)


def shareable_settings(settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return settings without paths and secrets: what has a secret's name is removed, of paths the last part stays.

    >>> shareable_settings({"token": "hf_abc", "cache": "/home/ada/.cache/hub", "text": "{a} / {b}", "dtype": None})
    {'token': '[removed]', 'cache': 'hub', 'text': '{a} / {b}', 'dtype': None}
    """
    return {
        _shareable_text(key): _REMOVED if key.lower() in _SECRET_KEYS else _shareable(value)
        for key, value in settings.items()
    }


def _shareable(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return shareable_settings(value)
    if isinstance(value, list):
        return [_shareable(each) for each in value]
    if isinstance(value, str):
        return _shareable_text(value)
    return value


def _shareable_text(text: str) -> str:
    if _PATH.match(text) and "{" not in text:  # a template may begin with a slash
        return _last_part(text)
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(home, "~")
    return _SECRET_VALUE.sub(_REMOVED, text)


def _last_part(path: str) -> str:
    return _SECRET_VALUE.sub(_REMOVED, re.split(r"[/\\]", path.rstrip("/\\"))[-1])
