"""RemoteModel: what stays at home and the blocks that do not, as one model that evaluates and never trains."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from petals_eval.config import Pool, SwarmSettings
from petals_eval.data.batching import MicroBatch, micro_batches
from petals_eval.errors import ConfigError, ExampleError
from petals_eval.tasks.requests import Request

if TYPE_CHECKING:
    import torch

    from petals_eval.model import Adapter, LocalModel, LocalPart
    from petals_eval.model.blocks import BlockSpan
    from petals_eval.swarm import RemoteSequential, ServedHop, SwarmConnection

__all__ = ["Answered", "RemoteModel", "default_dht_prefix", "load_local"]


@dataclass(frozen=True, eq=False)
class Answered:
    """A request with its answer: float32 (labels,) or (targets,), and who computed it, hop by hop."""

    request: Request
    answer: "torch.Tensor"
    hops: "tuple[ServedHop, ...]"


class RemoteModel:
    """Embeddings, prompts, norm and head at home; the transformer blocks on a swarm.

        with RemoteModel.from_pretrained("bigscience/bloom", adapter="./prompts", initial_peers=peers) as model:
            result = petals_eval.evaluate(model, task="sst2")

    adapters: the prompt-tuned checkpoints to evaluate; without any, the model is evaluated as it is.
    """

    def __init__(
        self,
        local: "LocalPart",
        blocks: "RemoteSequential",
        adapters: Sequence["Adapter"] = (),
        connection: "SwarmConnection | None" = None,
    ):
        self.local = local
        self.blocks = blocks
        self.adapters = tuple(adapters)
        self._connection = connection
        blocks.warn_of_dropout(self.config_dropout)
        blocks.limit_steps(local.rotary.original_length)

    @property
    def config_dropout(self) -> dict[str, float]:
        """What the model's config says of dropout in its blocks, where it is above zero."""
        from petals_eval.swarm.trust.determinism import dropout_in

        return dropout_in(self.local.config.to_dict())

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        initial_peers: str | Sequence[str],
        adapter: str | Sequence[str] | None = None,
        dht_prefix: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        dtype: "torch.dtype | None" = None,
        device: str = "cpu",
        cache_dir: str | None = None,
        pool: Pool = "auto",
        verify_local: tuple[int, int] | None = None,
        **swarm_settings: Any,
    ) -> "RemoteModel":
        """Load what stays at home and connect to the swarm.

        model: hub name or local folder; only the tensors that stay at home are read.
        initial_peers: multiaddresses of bootstrap peers, one or several; one that answers is enough.
        adapter: one or several prompt-tuned checkpoints (file, folder or hub name).
        dht_prefix: the name the servers announce; by default Petals' own rule for the hub name.
        dtype: of the computation at home; the checkpoint's own by default.
        pool: which token of a text a class head reads where the text holds the padding token, by one of the rules of
            `petals_eval.model.pooling`; "auto": as the library does that trained the head.
        verify_local: blocks first:last to load here, too, and hold the servers of these blocks against.
        swarm_settings: more fields of petals_eval.config.SwarmSettings, such as active_adapter or deadline.

        Raises ModelError, AdapterError, ConfigError, SwarmUnreachableError.
        """
        from petals_eval.swarm import SwarmConnection

        settings = SwarmSettings(**{"initial_peers": initial_peers, **swarm_settings})
        local, adapters = load_local(
            model, adapter, revision=revision, token=token, dtype=dtype, device=device, cache_dir=cache_dir, pool=pool
        )
        prefix = dht_prefix or default_dht_prefix(model, local)
        connection = SwarmConnection.connect(settings)
        try:
            blocks = connection.remote_sequential(prefix, local.num_blocks)
            if verify_local is not None:
                blocks.verify_at_home(
                    load_blocks(model, verify_local, settings, revision=revision, token=token, cache_dir=cache_dir)
                )
        except BaseException:
            connection.close()
            raise
        return cls(local, blocks, adapters, connection)

    def compute(
        self,
        requests: Iterable[Request],
        adapter: "Adapter | None" = None,
        *,
        tokens_per_micro_batch: int | None = None,
        on_tick: Callable[[], object] | None = None,
        on_failed: Callable[[Request, ExampleError], object] | None = None,
    ) -> Generator[Answered]:
        """Answer requests as they come back from the swarm, in any order.

        tokens_per_micro_batch: positions (rows x longest, prompts included) sent together at most; None: as many as
            the swarm is best sent at once, found out on the way.

        Requests are taken as the swarm asks for them: memory is bounded by the window and the look-ahead of the
        batches, not by their number. Each local step runs in eval mode under inference mode.

        on_failed: told of each request that the swarm cannot compute whoever tries (too long for every server); the
            others go on. None: the first such error is raised.
        """
        from petals_eval.model import evaluating
        from petals_eval.swarm import Work

        prefix = adapter.prefix_length if adapter is not None else 0
        deep_prompts = adapter.deep_prompts if adapter is not None else None
        if deep_prompts is not None:
            deep_prompts = deep_prompts.to(self.local.dtype)  # rounded as the prompts before the first block are

        def outgoing() -> Iterator[Work[MicroBatch[Request]]]:
            max_tokens, boundary = tokens_per_micro_batch or at_once, self.local.rotary.original_length
            for batch in micro_batches(requests, max_tokens=max_tokens, prefix=prefix, boundary=boundary):
                self.local.check_length(batch.input_ids.shape[1], prefix)
                made_for = None if tokens_per_micro_batch else self.blocks.micro_batch_bytes
                yield Work(batch, embedded(batch), deep_prompts, made_for)

        def at_once() -> int:
            return self.blocks.positions_at_once(self.local.hidden_size, self.local.dtype)

        def embedded(batch: MicroBatch[Request]) -> "torch.Tensor":
            with evaluating(self.local):
                return self.local.embed(batch.input_ids, adapter)

        def instead(batch: MicroBatch[Request], error: ExampleError) -> Iterator[Work[MicroBatch[Request]]]:
            """What to send in place of a micro-batch that nobody can compute: its rows one by one, for the shorter
            ones may fit."""
            if on_failed is None:
                raise error
            if len(batch.requests) == 1:
                on_failed(batch.requests[0], error)
                return
            for request in batch.requests:
                alone = MicroBatch.of([request])
                yield Work(alone, embedded(alone), deep_prompts)

        for computed in self.blocks.stream(outgoing(), on_tick=on_tick, on_error=instead):
            with evaluating(self.local):
                answers = self.local.head(computed.hidden, computed.tag, adapter)
            requests_back, hops = computed.tag.requests, computed.hops
            del computed  # its hidden states are of no more use, and the next may be long in coming
            for request, answer in zip(requests_back, answers, strict=True):
                yield Answered(request, answer, hops)

    def close(self) -> None:
        """End the connection to the swarm. Safe to call twice."""
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> "RemoteModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_local(
    model: str,
    adapter: str | Sequence[str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: "torch.dtype | None" = None,
    device: str = "cpu",
    cache_dir: str | None = None,
    pool: Pool = "auto",
) -> "tuple[LocalModel, tuple[Adapter, ...]]":
    """What stays at home, and the prompts tuned for it. Raises ModelError, AdapterError."""
    from petals_eval.model import LocalModel, load_adapter

    local = LocalModel.from_pretrained(
        model,
        revision=revision,
        token=token,
        dtype=dtype,
        device=device,
        cache_dir=cache_dir,
        pooling=None if pool == "auto" else pool,
    )
    names = [adapter] if isinstance(adapter, str) else list(adapter or ())
    return local, tuple(
        load_adapter(
            name,
            family=local.family,
            config=local.config,
            checkpoint=local.checkpoint,
            token=token,
            cache_dir=cache_dir,
        )
        for name in names
    )


def load_blocks(
    model: str,
    blocks: tuple[int, int],
    settings: SwarmSettings,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> "BlockSpan":
    """Blocks first:last at home, to hold servers against. Raises ModelError, ConfigError."""
    if settings.active_adapter is not None:
        raise ConfigError(
            f"blocks at home (--verify-local) have no LoRA adapter, and the servers' apply {settings.active_adapter}: "
            "leave one of the two out"
        )
    from petals_eval.model.blocks import BlockSpan

    return BlockSpan.load(model, *blocks, revision=revision, token=token, cache_dir=cache_dir)


def default_dht_prefix(model: str, local: "LocalModel") -> str:
    """The prefix Petals servers announce for a hub repository; a local folder has none on a foreign swarm."""
    from pathlib import Path

    if Path(model).expanduser().is_dir():
        raise ConfigError(
            f"{model} is a local folder, so the name its servers announce is not known: give it with --dht-prefix "
            "(dht_prefix=... in Python). For a hub model it would follow from the hub name."
        )
    return local.family.dht_prefix(model)
