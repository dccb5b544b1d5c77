"""`petals-eval bench forward` and `petals-eval bench inference`: how fast a swarm is, seen from here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from petals_eval.cli.command import GroupedCommand

__all__ = ["SHORT", "app"]

SHORT = "Measure how fast a swarm is, seen from here."
FORWARD = """Measure forward passes: micro-batches of random hidden states, many in flight, as an evaluation sends them.

Of the model only its config is read. Every combination of the values given is measured.

\b
Your own swarm:
  petals-eval bench forward --model ./my-llama --dht-prefix my-llama \\
    --initial-peers /ip4/... --lengths 32,128,512 --batches 1,8 --windows auto,1,16
Three servers on this machine, behind links of 20 ms and 100 Mbit/s each way:
  petals-eval bench forward --model ./my-llama --local-swarm 3 --delay 20 --rate 100
"""
INFERENCE = """Measure inference sessions: a step over a prompt, then one position after the other.

Of the model only its config is read. Every combination of the values given is measured; --windows are sessions at once.

\b
  petals-eval bench inference --model ./my-llama --dht-prefix my-llama \\
    --initial-peers /ip4/... --lengths 32,512 --windows 1,4 --new-tokens 32
"""
STRANGERS = "note: on the public swarm this is work for strangers' machines: keep it short."


def _option(group: str, metavar: str | None, help: str, *names: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=group, show_default=False)


MODEL, SWARM, SWEEP, OUTPUT = "Model", "Swarm", "Sweep", "Output"
Model = Annotated[str, _option(MODEL, "NAME", "Hub name or local folder.")]
Revision = Annotated[str | None, _option(MODEL, "REV", "Revision of the model on the hub.")]
Token = Annotated[str | None, _option(MODEL, "TOKEN", "Hub token for gated repositories (or set HF_TOKEN).")]
Peers = Annotated[list[str] | None, _option(SWARM, "MADDR...", "Multiaddresses of bootstrap peers.")]
PublicSwarm = Annotated[
    bool | None, _option(SWARM, None, "The public Petals swarm: strangers' machines.", "--public-swarm")
]
LocalSwarm = Annotated[int | None, _option(SWARM, "N", "N servers embedded on this machine.")]
Delay = Annotated[float | None, _option(SWARM, "MS", "Of the embedded servers' links, one way.")]
Rate = Annotated[float | None, _option(SWARM, "MBIT", "Of the embedded servers' links, Mbit/s each way.")]
Prefix = Annotated[str | None, _option(SWARM, "NAME", "Name the servers announce. Default: by Petals' rule.")]
ActiveAdapter = Annotated[str | None, _option(SWARM, "NAME", "LoRA adapter on the servers.")]
RequireDtype = Annotated[str | None, _option(SWARM, "DTYPE", "Use only servers that compute in this dtype.")]
RequireQuant = Annotated[str | None, _option(SWARM, "QUANT", "Use only servers of this quantisation.")]
Allow = Annotated[list[str] | None, _option(SWARM, "ID...", "Use only these servers (identities or their ends).")]
Deny = Annotated[list[str] | None, _option(SWARM, "ID...", "Leave these servers out.")]
Deadline = Annotated[float | None, _option(SWARM, "SECONDS", "Wait this long for a server. Default: 60.")]
Lengths = Annotated[str | None, _option(SWEEP, "N,N,...", "Positions of a row. Default: 32,128,512.")]
Batches = Annotated[str | None, _option(SWEEP, "N,N,...", "Rows together. Default: 1,8.")]
Prompts = Annotated[int | None, _option(SWEEP, "N", "Deep prompts of this many positions. Default: none.")]
Repeats = Annotated[int | None, _option(SWEEP, "N", "Runs of each combination. Default: 3.")]
Wires = Annotated[str | None, _option(SWEEP, "NAME,...", "How hidden states travel; lossless only.", "--wires")]
Out = Annotated[Path | None, _option(OUTPUT, "FOLDER", "Write bench.json, bench.txt and bench.svg there.")]
AsJson = Annotated[bool, _option(OUTPUT, None, "Print bench.json alone on stdout.", "--json")]

app = typer.Typer(name="bench", help=SHORT, no_args_is_help=True, rich_markup_mode=None)


@app.command(
    name="forward", help=FORWARD, short_help="Forward passes, many micro-batches in flight.", cls=GroupedCommand
)
def forward(
    model: Model,
    revision: Revision = None,
    token: Token = None,
    initial_peers: Peers = None,
    public_swarm: PublicSwarm = None,
    local_swarm: LocalSwarm = None,
    delay: Delay = None,
    rate: Rate = None,
    dht_prefix: Prefix = None,
    active_adapter: ActiveAdapter = None,
    require_dtype: RequireDtype = None,
    require_quant: RequireQuant = None,
    allow_server: Allow = None,
    deny_server: Deny = None,
    deadline: Deadline = None,
    lengths: Lengths = None,
    batches: Batches = None,
    windows: Annotated[
        str | None, _option(SWEEP, "N,N,...", "Micro-batches in flight; auto: the client's choice. Default: auto.")
    ] = None,
    wires: Annotated[
        str | None,
        _option(SWEEP, "NAME,...", "Of lossless, float16, blockwise8, uniform8. Default: lossless.", "--wires"),
    ] = None,
    prompts: Prompts = None,
    seconds: Annotated[float | None, _option(SWEEP, "SECONDS", "Of each run. Default: 3.")] = None,
    warm_up: Annotated[float | None, _option(SWEEP, "SECONDS", "Before each combination. Default: 1.")] = None,
    repeats: Repeats = None,
    out: Out = None,
    json_output: AsJson = False,
) -> int:
    flags = {name: value for name, value in locals().items() if name not in ("out", "json_output")}
    from petals_eval.bench.settings import ForwardSettings
    from petals_eval.bench.sweep import bench_forward

    settings = ForwardSettings(**_given(flags))
    return _bench(lambda say: bench_forward(settings, say), settings.public_swarm, out, json_output)


@app.command(
    name="inference", help=INFERENCE, short_help="Inference sessions, one position a step.", cls=GroupedCommand
)
def inference(
    model: Model,
    revision: Revision = None,
    token: Token = None,
    initial_peers: Peers = None,
    public_swarm: PublicSwarm = None,
    local_swarm: LocalSwarm = None,
    delay: Delay = None,
    rate: Rate = None,
    dht_prefix: Prefix = None,
    active_adapter: ActiveAdapter = None,
    require_dtype: RequireDtype = None,
    require_quant: RequireQuant = None,
    allow_server: Allow = None,
    deny_server: Deny = None,
    deadline: Deadline = None,
    lengths: Lengths = None,
    batches: Batches = None,
    windows: Annotated[str | None, _option(SWEEP, "N,N,...", "Sessions at once. Default: 1.")] = None,
    wires: Wires = None,
    prompts: Prompts = None,
    new_tokens: Annotated[int | None, _option(SWEEP, "N", "Steps after the prompt's. Default: 16.")] = None,
    repeats: Repeats = None,
    out: Out = None,
    json_output: AsJson = False,
) -> int:
    flags = {name: value for name, value in locals().items() if name not in ("out", "json_output")}
    from petals_eval.bench.settings import InferenceSettings
    from petals_eval.bench.sweep import bench_inference

    settings = InferenceSettings(**_given(flags))
    return _bench(lambda say: bench_inference(settings, say), settings.public_swarm, out, json_output)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given; the others have their defaults in the settings."""
    return {name: value for name, value in flags.items() if value is not None and value != []}


def _bench(measure: Callable[[Callable[[str], None]], Any], public: bool, out: Path | None, json_output: bool) -> int:
    from petals_eval.runs.disk import blame_the_machine, write_atomically

    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        typer.echo(line, err=json_output)

    if public:
        typer.echo(STRANGERS, err=True)
    if out is not None:
        with blame_the_machine(out):  # now, and not after minutes of measuring
            out.mkdir(parents=True, exist_ok=True)
    found = measure(say)
    text = json.dumps(found.to_json(), indent=2) + "\n"
    if json_output:
        typer.echo(text, nl=False)
    if out is not None:
        write_atomically(out / "bench.json", [text])
        write_atomically(out / "bench.txt", [line + "\n" for line in lines])
        write_atomically(out / "bench.svg", [found.plot()])
    return 0
