"""The names that servers give a hub model by default: the DHT prefix, by which a swarm's blocks are found.

Petals and its relatives make it from the hub's `owner/name`, each by rules of its own (section 9 of
`swarm/wire/PROTOCOL.md`). Dots become dashes: a dot ends the prefix in a block's key.
"""

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["default_prefix", "other_prefixes"]


class _Rule(NamedTuple):
    """A name made of `owner/name`, or of `name` alone, with an ending unless it ends so already."""

    is_whole: bool
    ending: str = ""

    def prefix(self, repository: str) -> str:
        name = (repository if self.is_whole else repository.rpartition("/")[2]).replace(".", "-")
        return name if name.endswith(self.ending) else name + self.ending


_RULES: Mapping[str, tuple[_Rule, ...]] = {
    "bloom": (_Rule(True, "-petals"), _Rule(True, "-drift"), _Rule(True, "-bloombee")),
    "falcon": (_Rule(False),),
    "llama": (_Rule(False, "-hf"),),
    "mixtral": (_Rule(True),),
}
"""The rules of a family by its `model_type`, the first of them our default. A single one is that of all relatives."""

_RULES_OF_RELATIVES = (_Rule(False), _Rule(True), _Rule(False, "-hf"))
"""For families that Petals does not serve: DRIFT's rule, BloomBee's, and Petals' for Llama, which others go by."""


def default_prefix(model_type: str, repository: str) -> str:
    """Return the name under which a hub repository `owner/name` is looked for.

    >>> default_prefix("llama", "meta-llama/Llama-3.1-8B"), default_prefix("qwen3", "Qwen/Qwen3-0.6B")
    ('Llama-3-1-8B-hf', 'Qwen3-0-6B')
    """
    return _rules(model_type)[0].prefix(repository)


def other_prefixes(model_type: str, repository: str, prefix: str) -> tuple[str, ...]:
    """Return the names by all rules of the family but the one that it was looked for under.

    >>> other_prefixes("qwen3", "Qwen/Qwen3-0.6B", "Qwen3-0-6B")
    ('Qwen/Qwen3-0-6B', 'Qwen3-0-6B-hf')
    """
    names = dict.fromkeys(rule.prefix(repository) for rule in _rules(model_type))
    return tuple(name for name in names if name != prefix)


def _rules(model_type: str) -> tuple[_Rule, ...]:
    return _RULES.get(model_type, _RULES_OF_RELATIVES)
