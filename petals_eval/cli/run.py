"""`petals-eval run`: evaluate a model, with its prompts, on a task, over a swarm."""

from pathlib import Path
from typing import Annotated, Any

import typer

from petals_eval.cli.flags import flags_of, keys_of
from petals_eval.config import RunSettings
from petals_eval.errors import ConfigError

__all__ = ["HELP", "SHORT", "read_settings", "run"]

SHORT = "Evaluate a model on a task over a swarm."
# \b: the lines after it are shown as they are.
HELP = """Evaluate a model on a task over a swarm and print its metrics; a run folder shows how they came about.

\b
On the public swarm:
  petals-eval run --model bigscience/bloom --adapter ./sst2-prompts \\
    --task sst2 --public-swarm --out runs/sst2
On your own swarm:
  petals-eval run --model ./my-llama --adapter ./prompts --task trec \\
    --initial-peers /ip4/... --dht-prefix my-llama
Without any swarm, on servers embedded on this machine:
  petals-eval run --model ./my-llama --adapter ./prompts \\
    --task ./my-task.yaml --data test.csv --local-swarm 3

Every flag is also a key of the YAML file given with --config; a flag wins over the file.
"""


@flags_of(RunSettings)
def run(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file with any of these flags as keys.", show_default=False)
    ] = None,
    **flags: Any,
) -> int:
    from petals_eval.cli.evaluation import execute

    return execute(lambda: read_settings(config, flags))


def read_settings(config: Path | None, flags: dict[str, Any]) -> RunSettings:
    """Return the settings of a run: the file's, overridden by the flags. Raises ConfigError.

    A flag that names a swarm overrides the file's choice of a swarm, whichever way the file names it.
    """
    values = {} if config is None else _read_yaml(config)
    swarms = ("initial_peers", "public_swarm", "local_swarm")
    if any(name in flags for name in swarms):
        values = {key: value for key, value in values.items() if key not in swarms}
    return RunSettings(**{**values, **flags})


def _read_yaml(path: Path) -> dict[str, Any]:
    from petals_eval.data.yaml_text import read_yaml, resolve_nulls

    try:
        values = read_yaml(path.read_text(encoding="utf-8"), same_key=_key)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}. Expected a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: expected YAML in utf-8 ({error}).") from error
    except ValueError as error:
        comma = "," if str(error).startswith("line ") else ":"
        raise ConfigError(f"--config {path}{comma} {error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {path}: expected lines of `flag: value`, found {type(values).__name__}.")
    named = {_key(key): value for key, value in values.items()}
    return dict(resolve_nulls(named, RunSettings))


def _key(written: str) -> str:
    """Return the key of `RunSettings` that is meant: --max-length, max-length and max_length are one."""
    name = written.removeprefix("--").replace("-", "_")
    return keys_of(RunSettings).get(name, name)
