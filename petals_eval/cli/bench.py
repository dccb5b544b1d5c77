"""`petals-eval bench forward`, `inference` and `simulate`: how fast a swarm is, or would be, seen from here."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from petals_eval.bench.settings import ForwardSettings, InferenceSettings
from petals_eval.cli.command import GroupedCommand
from petals_eval.cli.flags import flags_of
from petals_eval.cli.streams import json_text
from petals_eval.cli.verbose import with_verbose
from petals_eval.config import OUTPUT
from petals_eval.errors import ConfigError

if TYPE_CHECKING:
    from petals_eval.bench.simulate import FaultsOutcome, SimulateOutcome

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
BEGINS = "reading the model's config, and connecting"
SIMULATE = """Simulate evaluations: what this client would make of a swarm, and where the time would go.

The client's own code runs over simulated servers and links in virtual time, the same for a seed: nothing is sent. Times
stand beside the floor, which no client could undercut: the best flow of all positions over servers and links, and one
pass along the nearest route.

\b
A swarm that a file describes (the keys stand in petals_eval/simulator/README.md):
  petals-eval bench simulate swarm.yaml --evaluations 2
The same, with a picture of how busy each server and link is over time; or a swarm with a name:
  petals-eval bench simulate swarm.yaml --plot swarm.svg
  petals-eval bench simulate mixed
Thirty swarms that are drawn, by the seeds from 300 on:
  petals-eval bench simulate --random 30 --seed 300
A hundred schedules of faults, each over a swarm of nine servers; it ends with code 1 where a row is lost:
  petals-eval bench simulate --faults 100
"""
STRANGERS = "note: on the public swarm this is work for strangers' machines: keep it short."


Out = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Write bench.json, bench.txt and bench.svg there.", rich_help_panel=OUTPUT),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print bench.json alone on stdout.", rich_help_panel=OUTPUT)]

Compare = Annotated[
    Path | None,
    typer.Option(
        metavar="OLD.json",
        help="End with code 1 where something got slower than in this JSON of an earlier benchmark, beyond the spread "
        "of both.",
        rich_help_panel=OUTPUT,
    ),
]

app = typer.Typer(name="bench", help=SHORT, no_args_is_help=True, rich_markup_mode=None)


@app.command(
    name="forward", help=FORWARD, short_help="Forward passes, many micro-batches in flight.", cls=GroupedCommand
)
@with_verbose
@flags_of(ForwardSettings)
def forward(out: Out = None, json_output: AsJson = False, compare: Compare = None, **flags: Any) -> int:
    typer.echo(BEGINS, err=True)
    settings = ForwardSettings(**flags)

    from petals_eval.bench.sweep import bench_forward

    return _bench(lambda say: bench_forward(settings, say), settings.public_swarm, out, json_output, compare)


@app.command(
    name="inference", help=INFERENCE, short_help="Inference sessions, one position a step.", cls=GroupedCommand
)
@with_verbose
@flags_of(InferenceSettings)
def inference(out: Out = None, json_output: AsJson = False, compare: Compare = None, **flags: Any) -> int:
    typer.echo(BEGINS, err=True)
    settings = InferenceSettings(**flags)

    from petals_eval.bench.sweep import bench_inference

    return _bench(lambda say: bench_inference(settings, say), settings.public_swarm, out, json_output, compare)


@app.command(
    name="simulate", help=SIMULATE, short_help="Evaluations of a described swarm, in virtual time.", cls=GroupedCommand
)
@with_verbose
def simulate(
    scenario: Annotated[
        str | None, typer.Argument(metavar="SCENARIO", help="YAML file of a swarm, or the name of a regime.")
    ] = None,
    random: Annotated[int | None, typer.Option(metavar="N", min=1, help="Draw N swarms instead.")] = None,
    faults: Annotated[int | None, typer.Option(metavar="N", min=1, help="Draw N schedules of faults.")] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of the first of what is drawn.")] = 0,
    evaluations: Annotated[int, typer.Option(metavar="N", min=1, help="Evaluations over one connection.")] = 1,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw how busy each server and link is over time."),
    ] = None,
    compare: Compare = None,
) -> int:
    typer.echo("simulating, in virtual time", err=True)

    from petals_eval.bench.compared import Older
    from petals_eval.bench.simulate import LOOKS, bench_faults, bench_simulate, drawn, read_scenario
    from petals_eval.runs.disk import blame_the_machine, write_atomically

    if [scenario, random, faults].count(None) != 2:
        raise ConfigError("expected one of a file that describes a swarm, --random N and --faults N")
    if plot is not None and scenario is None:
        raise ConfigError("expected --plot with a file that describes a swarm: it draws one")
    if compare is not None and faults is not None:
        raise ConfigError("expected --compare with a file or with --random N: schedules of faults are right or wrong")
    older = None if compare is None else Older.read(compare)
    say = partial(typer.echo, err=json_output)
    found: FaultsOutcome | SimulateOutcome
    if faults is not None:
        found = bench_faults(faults, seed, say)
    elif random is not None:
        found = bench_simulate(drawn(random, seed), evaluations, say)
    elif scenario is not None:
        found = bench_simulate([read_scenario(scenario)], evaluations, say, looks=LOOKS if plot else None)
        if plot is not None:
            with blame_the_machine(plot):
                write_atomically(plot, [found.plot()])
    told = found.to_json()
    slower = older.compare(told, say) if older is not None else 0
    if json_output:
        typer.echo(json_text(told, indent=2))
    return int(bool(found.failed or slower))


class Folding:
    """Cuts the rows of a table that are wider than the terminal, all at the end of one column; in a pipe none.

    The columns are right-aligned, so that they end in every row where they end in the head, which is told first.
    """

    def __init__(self, stream: IO[str]):
        self._width = shutil.get_terminal_size().columns if stream.isatty() else None
        self._cuts: list[int] = []

    def __call__(self, line: str) -> list[str]:
        """Return the lines to print for one."""
        if self._width is None or len(line) <= self._width:
            return [line]
        if not self._cuts:
            ends = [at for at in range(1, len(line)) if line[at - 1] != " " and line[at] == " "]
            begin, room = 0, self._width
            while fitting := [at for at in ends if begin < at <= begin + room]:
                self._cuts.append(begin := fitting[-1])
                room = self._width - len(_INDENT)
                if len(line) - begin <= room:
                    break
        parts = [line[begin:end] for begin, end in pairwise([0, *self._cuts, len(line)])]
        return [parts[0], *(f"{_INDENT}{part.rstrip()}" for part in parts[1:])]


_INDENT = "    "  # of the second line of a row


def _bench(
    measure: Callable[[Callable[[str], None]], Any],
    public: bool,
    out: Path | None,
    json_output: bool,
    compare: Path | None,
) -> int:
    from petals_eval.bench.compared import Older
    from petals_eval.runs.disk import blame_the_machine, write_atomically

    lines: list[str] = []
    fold = Folding(sys.stderr if json_output else sys.stdout)

    def say(line: str) -> None:
        lines.append(line)
        for part in fold(line):
            typer.echo(part, err=json_output)

    if public:
        typer.echo(STRANGERS, err=True)
    if out is not None:
        with blame_the_machine(out):  # now, and not after minutes of measuring
            out.mkdir(parents=True, exist_ok=True)
    older = None if compare is None else Older.read(compare)
    found = measure(say)
    told = found.to_json()
    slower = older.compare(told, say) if older is not None else 0
    text = json.dumps(told, indent=2) + "\n"
    if json_output:
        typer.echo(text, nl=False)
    if out is not None:
        write_atomically(out / "bench.json", [text])
        write_atomically(out / "bench.txt", [line + "\n" for line in lines])
        write_atomically(out / "bench.svg", [found.plot()])
    return int(bool(slower))
