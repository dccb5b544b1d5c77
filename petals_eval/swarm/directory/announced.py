"""Which models a swarm announces, by the indexes that its servers keep and by names that a model may have."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hivemind.dht.node import DHTNode

from petals_eval.swarm.directory.dht import look, read_announcements
from petals_eval.swarm.wire import messages
from petals_eval.swarm.wire.records import MODEL_INDEX_KEYS
from petals_eval.text import plural, printable

__all__ = [
    "AnnouncedModel",
    "IndexPolicy",
    "announced_elsewhere",
    "announced_models",
    "models_text",
    "not_announced",
    "read_models",
]


@dataclass(frozen=True)
class IndexPolicy:
    """What is believed of the indexes at most: a stranger may announce anything.

    max_blocks: of a model; each is a key to ask the DHT for. max_models: of a swarm.
    max_name_length: characters of a model's name, and of the address of its repository.
    max_shown: models that a message names.
    """

    max_blocks: int = 1000
    max_models: int = 100
    max_name_length: int = 200
    max_shown: int = 10


@dataclass(frozen=True, slots=True)
class AnnouncedModel:
    """A DHT prefix with what its servers say of the model.

    num_blocks: what the model has; where `is_counted`, nobody says so, and these are the blocks found up to the last.
    """

    prefix: str
    num_blocks: int
    repository: str | None
    is_counted: bool = False


async def announced_models(dht: DHTNode, more_keys: Iterable[str] = ()) -> tuple[list[AnnouncedModel], int]:
    """Return every model that servers announce, by name, and how many entries cannot be read.

    more_keys: of indexes, beside `MODEL_INDEX_KEYS`. Of a model that is in several the larger number of blocks counts.
    Models whose prefix begins with an underscore are private: servers do not announce them.
    """
    found = await look(dht, dict.fromkeys([*MODEL_INDEX_KEYS, *more_keys]))
    models: dict[str, AnnouncedModel] = {}
    unreadable = 0
    for entry in found.values():
        if entry is None:
            continue
        if not isinstance(entry.value, dict):
            unreadable += 1
            continue
        read, malformed = read_models({prefix: getattr(each, "value", None) for prefix, each in entry.value.items()})
        unreadable += malformed
        for model in read:
            before = models.get(model.prefix)
            if before is None or before.num_blocks < model.num_blocks:
                models[model.prefix] = model
    return sorted(models.values(), key=lambda model: model.prefix), unreadable


def read_models(entries: Mapping[Any, Any]) -> tuple[list[AnnouncedModel], int]:
    """Read entries `{prefix: {"num_blocks": int, "repository": url or None}}`; return how many are none, too."""
    models: list[AnnouncedModel] = []
    malformed = 0
    for prefix, value in entries.items():
        num_blocks = value.get("num_blocks") if isinstance(value, dict) else None
        if (
            not isinstance(prefix, str)
            or not 0 < len(prefix) <= IndexPolicy.max_name_length
            or not isinstance(num_blocks, int)
            or isinstance(num_blocks, bool)
            or not 0 < num_blocks <= IndexPolicy.max_blocks
            or len(models) >= IndexPolicy.max_models
        ):
            malformed += 1
            continue
        url = value.get("repository")
        repository = printable(url, longest=IndexPolicy.max_name_length) if isinstance(url, str) else None
        models.append(AnnouncedModel(prefix, num_blocks, repository))
    return models, malformed


async def announced_elsewhere(
    dht: DHTNode, other_prefixes: Sequence[str], num_blocks: int, more_keys: Iterable[str] = ()
) -> list[AnnouncedModel]:
    """Return what a swarm announces that does not announce the name that a model was looked for under.

    other_prefixes: names that it may have here, which come first: servers may keep an index that nobody knows of.
    num_blocks: of that model. more_keys: as `announced_models` takes them.
    """
    (models, _), found = await asyncio.gather(
        announced_models(dht, more_keys),
        asyncio.gather(*(_held_blocks(dht, prefix, num_blocks) for prefix in other_prefixes)),
    )
    named = {
        prefix: AnnouncedModel(prefix, max(blocks) + 1, None, is_counted=True)
        for prefix, blocks in zip(other_prefixes, found, strict=True)
        if blocks
    }
    return list((named | {model.prefix: model for model in models}).values())


async def _held_blocks(dht: DHTNode, prefix: str, num_blocks: int) -> set[int]:
    uids = {messages.block_uid(prefix, block): block for block in range(num_blocks)}
    found, _ = await read_announcements(dht, uids)
    return {each.block for each in found}


def not_announced(prefix: str, others: Sequence[AnnouncedModel]) -> str:
    """Return what to say of a name that nobody announces. others: what is announced here."""
    said = f"nobody announces {prefix!r} on this swarm; announced here: "
    return f"{said}{models_text(others)}" if others else f"{said}nothing: are its servers up?"


def models_text(models: Sequence[AnnouncedModel]) -> str:
    """Return the names of models with what is known of each.

    >>> models_text([AnnouncedModel("bloom-petals", 70, None), AnnouncedModel("Qwen3-8B", 3, None, is_counted=True)])
    'bloom-petals (70 blocks), Qwen3-8B (blocks up to 3)'
    """
    shown = [
        f"{printable(model.prefix, longest=80)} "
        f"({f'blocks up to {model.num_blocks}' if model.is_counted else plural(model.num_blocks, 'block')})"
        for model in models[: IndexPolicy.max_shown]
    ]
    more = len(models) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
