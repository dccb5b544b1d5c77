"""`petals-eval swarm MODEL`: a local swarm in the foreground."""

from typing import Annotated

import typer

__all__ = ["HELP", "swarm"]

HELP = """Serve a model's blocks on this machine until Ctrl-C, and print the peers to connect to.

Example: petals-eval swarm ./my-llama --servers 3
"""


def swarm(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    servers: Annotated[int, typer.Option(help="Servers; the blocks are split evenly among them.", min=1)] = 3,
    span: Annotated[
        list[str] | None, typer.Option(help="FIRST:LAST blocks of one server, once per server, instead of --servers.")
    ] = None,
    dht_prefix: Annotated[str | None, typer.Option(help="Name to announce. Default: by the model's name.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the checkpoint's.")] = None,
) -> int:
    from petals_eval.errors import ConfigError
    from petals_eval.local_swarm import LocalSwarm

    spans = None
    if span:
        try:
            spans = [(int(first), int(last)) for first, last in (text.split(":") for text in span)]
        except ValueError:
            raise ConfigError(f"--span: expected FIRST:LAST such as 0:4, found {' '.join(span)}") from None
    with LocalSwarm(model, servers=servers, spans=spans, dht_prefix=dht_prefix, dtype=dtype) as running:
        typer.echo(f"serving {running.num_blocks} blocks as {running.dht_prefix!r}:")
        for server in running.servers:
            typer.echo(f"  blocks {server.span[0]}:{server.span[1]}  {server.peer_id}")
        typer.echo("connect with:")
        typer.echo(
            f"  petals-eval run --model {model} --dht-prefix {running.dht_prefix} "
            f"--initial-peers {running.initial_peers[0]} --adapter ... --task ..."
        )
        typer.echo("Ctrl-C ends it.")
        try:
            running.wait()
        except KeyboardInterrupt:
            typer.echo("\nstopping")
    return 0
