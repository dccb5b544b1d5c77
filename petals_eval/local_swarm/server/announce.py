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
from petals_eval.local_swarm.faults.injector import FaultInjector
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.swarm.wire.messages import block_uid
from petals_eval.swarm.wire.records import ServerRecord, ServerState
from petals_eval.swarm.wire.span import Span

__all__ = ["absent_peer_id", "announce"]

_MIN_LIFETIME = 3.0
"""Seconds that a record lives at least: peers whose clocks differ by more refuse each other (hivemind's limit)."""


async def announce(
    node: DHTNode,
    settings: ServerSettings,
    state: ServerState,
    *,
    num_blocks: int | None = None,
    torch_dtype: str | None = None,
    cache_tokens_left: int | None = None,
    faults: FaultInjector | None = None,
) -> None:
    """Store one record under each block's key, and the model under the index key of the settings.

    num_blocks: of the whole model; None while it is not known yet: the model is not named then.
    torch_dtype: what the server computes in, such as "bfloat16".
    """
    span, version, seconds_off = settings.span, settings.version, 0.0
    peers = [node.peer_id.to_base58()]
    if faults is not None:
        if faults.active_in_record(StaleRecord):
            return  # what the DHT holds is what it held
        if claim := faults.active_in_record(ClaimsSpan):
            span = Span(claim.start, claim.stop)
        if dtype := faults.active_in_record(ClaimsDtype):
            torch_dtype = dtype.dtype
        if lie := faults.active_in_record(VersionLie):
            version = lie.version
        if clock := faults.active_in_record(ClockSkew):
            seconds_off = clock.seconds_off
        if state is ServerState.ONLINE and faults.active_in_record(JoiningForEver):
            state = ServerState.JOINING
        if faults.active_in_record(RecordWithoutServer):
            peers.append(absent_peer_id(peers[0]))
    # The keys are those of the record that clients read. Their validation is left out: a lie must go out as it is.
    record = ServerRecord.model_construct(
        start_block=span.start,
        end_block=span.stop,
        public_name=settings.public_name,
        version=version,
        adapters=settings.adapters,
        torch_dtype=torch_dtype,
        quant_type="none",
        using_relay=False,
        cache_tokens_left=cache_tokens_left,
        forward_rps=None if settings.pace is None else settings.pace * len(settings.span),
    )
    extra = record.model_dump()
    uids = [block_uid(settings.dht_prefix, block) for block in range(span.start, span.stop)]
    expiration = get_dht_time() + seconds_off + max(2 * settings.update_period, _MIN_LIFETIME)
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
        stores.append(node.store(settings.index_key, model, expiration, subkey=settings.dht_prefix))
    await asyncio.gather(*stores)


def absent_peer_id(peer_id: str) -> str:
    """Return the identity (base58) of a peer that does not exist, drawn from that of one that does."""
    sha256_multihash = b"\x12\x20"
    digest = hashlib.sha256(PeerID.from_base58(peer_id).to_bytes()).digest()
    return PeerID(sha256_multihash + digest).to_base58()
