"""`petals-eval run`: evaluate a model, with its prompts, on a task, over a swarm."""

from pathlib import Path
from typing import Annotated, Any

import typer

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


def _option(group: str, metavar: str | None, help: str, *names: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=group, show_default=False)


MODEL, TASK, SWARM, SERVERS, OUTPUT = "Model", "Task and data", "Swarm", "Servers and calls", "Output"


def run(
    model: Annotated[str | None, _option(MODEL, "NAME", "Hub name or local folder.")] = None,
    revision: Annotated[str | None, _option(MODEL, "REV", "Revision of the model on the hub.")] = None,
    token: Annotated[str | None, _option(MODEL, "TOKEN", "Hub token for gated repositories (or set HF_TOKEN).")] = None,
    adapter: Annotated[
        list[str] | None,
        _option(MODEL, "NAME...", "Prompt-tuned checkpoints: file, folder or hub name; shown side by side."),
    ] = None,
    active_adapter: Annotated[
        str | None, _option(MODEL, "NAME", "LoRA adapter on the servers; only servers that announce it are used.")
    ] = None,
    without_prompts: Annotated[
        bool | None,
        _option(MODEL, None, "Also evaluate the first adapter's head without its prompts.", "--without-prompts"),
    ] = None,
    dtype: Annotated[
        str | None, _option(MODEL, "DTYPE", "Of the computation at home. Default: the checkpoint's.")
    ] = None,
    device: Annotated[str | None, _option(MODEL, "DEVICE", "Of the computation at home. Default: cpu.")] = None,
    pool: Annotated[
        str | None,
        _option(
            MODEL,
            "RULE",
            "Which token a trained head reads in a text that holds the padding token: last, last-not-pad, "
            "before-first-pad or count-not-pad. Default: auto, as the library that trained the head.",
        ),
    ] = None,
    task: Annotated[str | None, _option(TASK, "TASK", "Shipped task (see petals-eval tasks) or YAML file.")] = None,
    data: Annotated[
        str | None, _option(TASK, "DATA", "csv, tsv, jsonl, parquet or text file, or hub name. Default: the task's.")
    ] = None,
    subset: Annotated[str | None, _option(TASK, "NAME", "Subset of a hub data set.")] = None,
    split: Annotated[str | None, _option(TASK, "NAME", "Split of a hub data set.")] = None,
    data_revision: Annotated[str | None, _option(TASK, "REV", "Revision of a hub data set.")] = None,
    limit: Annotated[int | None, _option(TASK, "N", "Evaluate this many examples, drawn by --seed.")] = None,
    seed: Annotated[int | None, _option(TASK, "S", "Of the sample and the intervals. Default: 0.")] = None,
    max_length: Annotated[int | None, _option(TASK, "N", "Tokens of text at most. Default: the task's.")] = None,
    shard: Annotated[
        str | None, _option(TASK, "I/N", "Evaluate part I of N, from 1/N to N/N; petals-eval merge joins them.")
    ] = None,
    initial_peers: Annotated[
        list[str] | None, _option(SWARM, "MADDR...", "Multiaddresses of bootstrap peers; one that answers is enough.")
    ] = None,
    public_swarm: Annotated[
        bool | None, _option(SWARM, None, "The public Petals swarm: strangers' machines.", "--public-swarm")
    ] = None,
    local_swarm: Annotated[int | None, _option(SWARM, "N", "N servers embedded on this machine.")] = None,
    dht_prefix: Annotated[
        str | None, _option(SWARM, "NAME", "Name the servers announce. Default: by Petals' rule for the hub name.")
    ] = None,
    require_dtype: Annotated[
        str | None, _option(SERVERS, "DTYPE", "Use only servers that compute in this dtype.")
    ] = None,
    require_quant: Annotated[
        str | None,
        _option(SERVERS, "QUANT", "Use only servers of this quantisation; none leaves quantised ones out."),
    ] = None,
    allow_server: Annotated[
        list[str] | None, _option(SERVERS, "ID...", "Use only these servers (identities or their last letters).")
    ] = None,
    deny_server: Annotated[list[str] | None, _option(SERVERS, "ID...", "Leave these servers out.")] = None,
    allow_nondeterministic: Annotated[
        bool | None,
        _option(
            SERVERS,
            None,
            "Use servers whose blocks run in training mode where nobody else holds them; the report says how far their "
            "answers differ.",
            "--allow-nondeterministic",
        ),
    ] = None,
    verify: Annotated[
        float | None,
        _option(
            SERVERS,
            "SHARE",
            "Of each server's work, computed on another server too and compared. 0: none. Default: 0.02.",
        ),
    ] = None,
    verify_local: Annotated[
        str | None,
        _option(SERVERS, "FIRST:LAST", "Load these blocks here, and hold their servers against them."),
    ] = None,
    deadline: Annotated[
        float | None, _option(SERVERS, "SECONDS", "Wait this long for a server that can take the work. Default: 600.")
    ] = None,
    request_timeout: Annotated[float | None, _option(SERVERS, "SECONDS", "For one call. Default: 180.")] = None,
    window: Annotated[int | None, _option(SERVERS, "N", "Micro-batches in flight at once. Default: found out.")] = None,
    max_tokens_per_call: Annotated[
        int | None, _option(SERVERS, "N", "Tokens a server takes in one call. Default: found out.")
    ] = None,
    tokens_per_micro_batch: Annotated[
        int | None, _option(SERVERS, "N", "Positions sent together, prompts included. Default: found out.")
    ] = None,
    wire: Annotated[
        str | None,
        _option(
            SERVERS,
            "CODE",
            "Send hidden states in a lossy code: float16, blockwise8 or uniform8; the report says how far that moves "
            "answers. Default: lossless.",
        ),
    ] = None,
    push: Annotated[
        str | None,
        _option(
            SERVERS,
            "WHEN",
            "Let servers pass hidden states on to each other, so that each leaves here once: auto (where that is "
            "faster), always or never. Default: auto.",
        ),
    ] = None,
    out: Annotated[
        str | None, _option(OUTPUT, "FOLDER", "Run folder; an unfinished run goes on. Default: runs/<task>-<time>.")
    ] = None,
    max_failed: Annotated[
        int | None, _option(OUTPUT, "N", "Exit code 1 if more examples than this fail. Default: 0.")
    ] = None,
    fail_under: Annotated[
        list[str] | None, _option(OUTPUT, "METRIC=X...", "Exit code 1 if a metric is below this; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool | None, _option(OUTPUT, None, "Show what would be sent; send nothing.", "--dry-run")
    ] = None,
    json_output: Annotated[bool | None, _option(OUTPUT, None, "Print metrics.json alone on stdout.", "--json")] = None,
    config: Annotated[Path | None, _option("Options", "FILE", "YAML file with any of these flags as keys.")] = None,
) -> int:
    flags = {
        name.removesuffix("_output"): value
        for name, value in locals().items()
        if name != "config" and value is not None
    }
    settings = read_settings(config, flags)

    from petals_eval.cli.evaluation import execute

    return execute(settings)


def read_settings(config: Path | None, flags: dict[str, Any]) -> RunSettings:
    """The settings of a run: the file's, overridden by the flags. Raises ConfigError.

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
        values = read_yaml(path.read_text(encoding="utf-8"), same_key=_field_name)
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
    named = {_field_name(key): value for key, value in values.items()}
    return dict(resolve_nulls(named, RunSettings))


def _field_name(key: str) -> str:
    """The field of `RunSettings` that a key names: --max-length, max-length and max_length are one."""
    return key.removeprefix("--").replace("-", "_")
