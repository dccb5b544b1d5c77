"""What stands beside a harness's results: on what, by whom and how far verified its requests were computed."""

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue

from petals_eval.evaluation.prepare import (
    NO_ADAPTER,
    adapter_record,
    answering_settings,
    call_settings,
    model_record,
)
from petals_eval.evaluation.scoring import noisy_server
from petals_eval.remote_model import LocalSide
from petals_eval.runs.code_hash import answering_code
from petals_eval.runs.disk import blame_the_machine, write_atomically
from petals_eval.runs.manifest import (
    AdapterRecord,
    LosslessServer,
    ModelRecord,
    NoiseRecord,
    NoisyServer,
    ServerUsed,
    package_versions,
)
from petals_eval.runs.privacy import shareable_settings
from petals_eval.tasks.tokens import tokenizer_sha256

if TYPE_CHECKING:
    from petals_eval.remote_model import RemoteModel

__all__ = ["BackendManifest", "ServerShare", "Verification"]

Settings = Annotated[dict[str, JsonValue], AfterValidator(shareable_settings)]


class ServerShare(BaseModel):
    """A server, and how many of the harness's requests it computed a part of."""

    server: ServerUsed
    requests: int


class Verification(BaseModel):
    """What was computed a second time by others.

    share: of each server's micro-batches that should be. computed: answers of servers; audited: of these, computed
    elsewhere, too; impossible: nobody else answered.
    """

    share: float
    computed: int = 0
    audited: int = 0
    impossible: int = 0


class BackendManifest(BaseModel):
    """Names and hashes, no local paths and no tokens: it can be shared.

    created, updated: UTC, ISO 8601. answer_settings: what changes an answer besides the model and its prompts;
    run_settings: what does not. requests: of the harness, by the call, that were answered here and not by its cache.
    noisy_servers: as in a run's manifest. noise: how far answers moved that were computed again; None where nobody
    looked. lossless_servers: those that did not take a lossy wire.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    created: str
    updated: str
    model: ModelRecord
    adapter: AdapterRecord
    answer_settings: Settings
    run_settings: Settings
    packages: dict[str, str]
    requests: dict[str, int] = {}
    servers: tuple[ServerShare, ...] = ()
    verification: Verification
    noisy_servers: tuple[NoisyServer, ...] = ()
    noise: NoiseRecord | None = None
    lossless_servers: tuple[LosslessServer, ...] = ()

    @classmethod
    def of(
        cls,
        model: "RemoteModel",
        answer_settings: Mapping[str, Any],
        *,
        code: str,
        packages: Mapping[str, str],
    ) -> "BackendManifest":
        """Return the manifest of a backend that begins now.

        answer_settings: what the backend itself was told that changes an answer. code: the folder of its sources, in
        this package. packages: versions beside those of a run.
        """
        settings = model.blocks.settings
        side = LocalSide(model.local, model.adapters, settings, model.blocks.dht_prefix)
        adapter = model.adapters[0] if model.adapters else None
        return cls(
            created=_now(),
            updated=_now(),
            model=model_record(side),
            adapter=adapter_record(NO_ADAPTER if adapter is None else adapter.name, adapter),
            answer_settings={
                "code": answering_code(code),
                "tokenizer_sha256": tokenizer_sha256(model.local.tokenizer),
                "end_tokens": [*sorted(model.local.end_tokens())],
                **answering_settings(side),
                **answer_settings,
            },
            run_settings=call_settings(settings),
            packages=package_versions() | dict(packages),
            verification=Verification(share=settings.verify),
        )

    def now(self, model: "RemoteModel", requests: Mapping[str, int], servers: Counter[ServerUsed]) -> "BackendManifest":
        """Return the manifest with what was answered so far.

        requests: of the harness, by the call. servers: of how many each computed a part.
        """
        blocks = model.blocks
        audits = blocks.audit_progress()
        refusals = [(peer.peer_id, peer.codec_refusal) for peer in list(blocks.peers.values())]
        return self.model_copy(
            update={
                "updated": _now(),
                "requests": dict(requests),
                "servers": tuple(ServerShare(server=each, requests=n) for each, n in servers.most_common()),
                "verification": Verification(
                    share=self.verification.share,
                    computed=audits.computed,
                    audited=audits.done,
                    impossible=audits.impossible,
                ),
                "noisy_servers": tuple(map(noisy_server, blocks.status().findings)),
                "lossless_servers": tuple(LosslessServer(peer, why) for peer, why in refusals if why is not None),
            }
        )

    def whose(self) -> dict[str, JsonValue]:
        """Return by what the answers of one backend are told from those of another: all but names."""
        record = self.model_dump(mode="json", include={"model", "adapter", "answer_settings"})
        return {
            f"{part}.{key}": value for part, found in record.items() for key, value in found.items() if key != "name"
        }

    def write(self, path: Path) -> None:
        """Write it as JSON, into a folder that is made where there is none. Raises MachineError."""
        with blame_the_machine(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [self.model_dump_json(indent=2), "\n"])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
