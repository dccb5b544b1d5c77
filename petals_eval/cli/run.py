"""`petals-eval run`: evaluate a model, with its prompts, on a task, over a swarm."""

from pathlib import Path
from typing import Annotated, Any

import typer

from petals_eval.config import RunSettings
from petals_eval.errors import ConfigError

__all__ = ["HELP", "read_settings", "run"]

HELP = """Evaluate a model on a task over a swarm and print its metrics; a run folder shows how they came about.

On the public swarm:
  petals-eval run --model bigscience/bloom --adapter ./sst2-prompts --task sst2 --public-swarm --out runs/sst2
On your own swarm:
  petals-eval run --model ./my-llama --dht-prefix my-llama --initial-peers /ip4/... --adapter ./prompts --task trec
Without any swarm, on servers embedded on this machine:
  petals-eval run --model ./my-llama --local-swarm 3 --adapter ./prompts --task ./my-task.yaml --data test.csv

Every flag is also a key of the YAML file given with --config; a flag wins over the file.
"""

MODEL, TASK, SWARM, OUTPUT = "Model", "Task and data", "Swarm", "Output"


def run(
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these flags as keys.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub name or local folder.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the hub.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token for gated repositories (or HF_TOKEN).")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Prompt-tuned checkpoint: file, folder or hub name. Several are shown side by side."),
    ] = None,
    active_adapter: Annotated[
        str | None, typer.Option(help="LoRA adapter on the servers; only servers that announce it are used.")
    ] = None,
    without_prompts: Annotated[
        bool | None, typer.Option("--without-prompts", help="Also evaluate without the prompts, with the same head.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation at home. Default: the checkpoint's.")] = None,
    device: Annotated[str | None, typer.Option(help="Of the computation at home. Default: cpu.")] = None,
    task: Annotated[str | None, typer.Option(help="Shipped task (see petals-eval tasks) or YAML file.")] = None,
    data: Annotated[
        str | None, typer.Option(help="csv, tsv, jsonl, parquet or text file, or hub name. Default: the task's.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a hub data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set.")] = None,
    data_revision: Annotated[str | None, typer.Option(help="Revision of a hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate this many examples, drawn by --seed.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sample and the intervals. Default: 0.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of text. Default: the task's.")] = None,
    initial_peers: Annotated[
        list[str] | None, typer.Option(help="Multiaddress of a bootstrap peer; once per address.")
    ] = None,
    public_swarm: Annotated[
        bool | None, typer.Option("--public-swarm", help="The public Petals swarm: strangers' machines.")
    ] = None,
    local_swarm: Annotated[int | None, typer.Option(help="Servers of an embedded swarm on this machine.")] = None,
    dht_prefix: Annotated[
        str | None, typer.Option(help="Name the servers announce. Default: by Petals' rule for the hub name.")
    ] = None,
    require_dtype: Annotated[str | None, typer.Option(help="Use only servers that compute in this dtype.")] = None,
    require_quant: Annotated[
        str | None, typer.Option(help="Use only servers of this quantisation; none leaves quantised ones out.")
    ] = None,
    allow_server: Annotated[
        list[str] | None, typer.Option(help="Use only this server (identity or its last letters); once per server.")
    ] = None,
    deny_server: Annotated[list[str] | None, typer.Option(help="Leave this server out; once per server.")] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds to wait for a server that can take the work. Default: 600.")
    ] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds for one call. Default: 180.")] = None,
    window: Annotated[int | None, typer.Option(help="Micro-batches in flight at once. Default: 8.")] = None,
    max_tokens_per_call: Annotated[
        int | None, typer.Option(help="Tokens a server takes in one call. Default: found out.")
    ] = None,
    tokens_per_micro_batch: Annotated[
        int | None, typer.Option(help="Positions sent together, prompts included. Default: 1024.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Run folder. Default: runs/<task>-<time>.")] = None,
    dry_run: Annotated[bool | None, typer.Option("--dry-run", help="Show what would be sent; send nothing.")] = None,
    json_output: Annotated[bool | None, typer.Option("--json", help="Print metrics.json alone on stdout.")] = None,
) -> int:
    """Parse; the work is in petals_eval.runs."""
    flags = {
        name.removesuffix("_output"): value
        for name, value in locals().items()
        if name != "config" and value is not None
    }
    settings = read_settings(config, flags)

    from petals_eval.cli.evaluation import execute

    return execute(settings)


def read_settings(config: Path | None, flags: dict[str, Any]) -> RunSettings:
    """The settings of a run: the file's, overridden by the flags. Raises ConfigError."""
    values = {} if config is None else _read_yaml(config)
    return RunSettings(**{**values, **flags})


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {path}: expected `flag: value` lines, found {type(values).__name__}")
    return {key.replace("-", "_"): value for key, value in values.items()}
