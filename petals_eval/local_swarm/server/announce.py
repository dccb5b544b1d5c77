"""What a server tells the DHT about itself, again and again while it lives."""

import asyncio
import hashlib
from pathlib import Path

from hivemind.dht.node import DHTNode
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
from hivemind.utils.timed_storage import get_dht_time

from petals_eval.local_swarm.faults.catalog import (
    ClaimsDtype,
    ClaimsSpan,
    ClockSkew,
    JoiningForEver,
    RecordWithoutServer,
    StaleRecord,
    VersionLie,
)
from petals_eval.local_swarm.faults.injector import Switchboard
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.swarm.wire.records import ServerState

__all__ = ["announce", "nobody"]

# Peers whose clocks differ by more than 3 s refuse each other (hivemind's limit): nothing should live shorter.
_MIN_LIFETIME = 3.0


async def announce(
    node: DHTNode,
    settings: ServerSettings,
    state: ServerState,
    *,
    num_blocks: int | None = None,
    torch_dtype: str | None = None,
    cache_tokens_left: int | None = None,
    faults: Switchboard | None = None,
) -> None:
    """Store one record under each block's key, and the model under `_petals.models`.

    num_blocks: of the whole model; None while it is not known yet: the model is not named then.
    torch_dtype: what the server computes in, such as "bfloat16".
    """
    first, last, version, skew = settings.first, settings.last, settings.version, 0.0
    if faults is not None:
        if faults.tells(StaleRecord):
            return  # what the DHT holds is what it held
        if span := faults.tells(ClaimsSpan):
            first, last = span.first, span.last
        if dtype := faults.tells(ClaimsDtype):
            torch_dtype = dtype.dtype
        if lie := faults.tells(VersionLie):
            version = lie.version
        if clock := faults.tells(ClockSkew):
            skew = clock.seconds_off
        if state is ServerState.ONLINE and faults.tells(JoiningForEver):
            state = ServerState.JOINING
    extra = {
        "start_block": first,
        "end_block": last,
        "public_name": settings.public_name,
        "version": version,
        "network_rps": None,
        "forward_rps": None,
        "inference_rps": None,
        "adapters": settings.adapters,
        "torch_dtype": torch_dtype,
        "quant_type": "none",
        "using_relay": False,
        "cache_tokens_left": cache_tokens_left,
        "next_pings": None,
    }
    uids = [f"{settings.dht_prefix}.{block}" for block in range(first, last)]
    expiration = get_dht_time() + skew + max(2 * settings.update_period, _MIN_LIFETIME)
    peers = [node.peer_id.to_base58()]
    if faults is not None and faults.tells(RecordWithoutServer):
        peers.append(nobody(peers[0]))
    stores = [
        node.store_many(
            keys=uids,
            values=[(int(state), settings.throughput or 0.0, extra)] * len(uids),
            expiration_time=expiration,
            subkeys=[peer_id] * len(uids),
            num_workers=len(uids),
        )
        for peer_id in peers
    ]
    # A prefix with an underscore in front is a private model: its blocks are announced, its name is not.
    if num_blocks is not None and state is not ServerState.OFFLINE and not settings.dht_prefix.startswith("_"):
        repository = None if Path(settings.model).is_dir() else f"https://huggingface.co/{settings.model}"
        model = {"num_blocks": num_blocks, "repository": repository}
        stores.append(node.store("_petals.models", model, expiration, subkey=settings.dht_prefix))
    await asyncio.gather(*stores)


def nobody(peer_id: str) -> str:
    """The identity of a peer that does not exist, drawn from that of one that does."""
    sha256_multihash = b"\x12\x20"
    digest = hashlib.sha256(PeerID.from_base58(peer_id).to_bytes()).digest()
    return PeerID(sha256_multihash + digest).to_base58()
