"""RemoteModel: what stays at home and the blocks that do not, as one model that evaluates and never trains."""

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from petals_eval.config import AdapterPlaces, Blocks, CallSettings, Place, Pool, Settings, SwarmSettings
from petals_eval.data.batching import HasTokens, MicroBatch, Shared, micro_batches
from petals_eval.data.shared_prefixes import prefixed_batches
from petals_eval.environment import local_path
from petals_eval.errors import ConfigError, ExampleError
from petals_eval.tasks.requests import Generated, Request
from petals_eval.validation import shorten

if TYPE_CHECKING:
    import torch

    from petals_eval.generation.engine import GrowingRow
    from petals_eval.model import Adapter, Family, LocalModel, LocalPart
    from petals_eval.model.blocks import BlockSpan
    from petals_eval.swarm import Computed, RemoteSequential, ServedHop, SwarmConnection, Work
    from petals_eval.swarm.lanes.prefix import Prefix

R = TypeVar("R", bound=HasTokens)
Batches = Callable[..., Iterator[MicroBatch[Any]]]
"""Groups requests to micro-batches, as `petals_eval.data.micro_batches` does."""

__all__ = [
    "LocalSide",
    "RemoteModel",
    "RequestAnswer",
    "check_device",
    "check_home_blocks",
    "default_dht_prefix",
    "dtype_of",
    "load_local",
]


@dataclass(frozen=True, eq=False)
class RequestAnswer:
    """A request with its answer, as `Request` describes it, and who computed it, hop by hop."""

    request: Request
    answer: "torch.Tensor | Generated"
    hops: "tuple[ServedHop, ...]"


@dataclass(frozen=True, eq=False)
class LocalSide:
    """Our side of a model, before anything is connected: what is computed at home, and what is asked of a swarm.

    local, adapters: as `RemoteModel` has them. settings: which servers to use, and how. dht_prefix: the name that they
    announce.
    """

    local: "LocalPart"
    adapters: "tuple[Adapter, ...]"
    settings: CallSettings
    dht_prefix: str

    def blocks_on(self, connection: "SwarmConnection") -> "RemoteSequential":
        """Return the model's blocks on a swarm. Raises MissingBlocksError where nobody announces them."""
        from petals_eval.model.dht_prefixes import other_prefixes

        others = other_prefixes(self.local.family.model_type, str(self.local.fingerprint["model"]), self.dht_prefix)
        return connection.remote_sequential(self.dht_prefix, self.local.num_blocks, others)


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
        if connection is not None:  # for those who never close it; the connection knows nothing of this model
            weakref.finalize(self, connection.close)
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
        model: str | Path,
        *,
        initial_peers: str | Sequence[str],
        adapter: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None,
        adapter_task: int | None = None,
        dht_prefix: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device" = "cpu",
        cache_dir: str | Path | None = None,
        pool: Pool = "auto",
        verify_local: tuple[int, int] | None = None,
        **swarm_settings: Any,
    ) -> "RemoteModel":
        """Load what stays at home and connect to the swarm.

        model: hub name or local folder; only the tensors that stay at home are read.
        initial_peers: multiaddresses of bootstrap peers, one or several; one that answers is enough.
        adapter: one or several prompt-tuned checkpoints (file, folder or hub name), or a mapping of names to such.
        adapter_task: which task's prompts to take of an adapter that has prompts for several, counted from 0.
        dht_prefix: the name the servers announce; by default Petals' own rule for the hub name.
        dtype: of the computation at home, such as "float32" or torch.float32; the checkpoint's own by default.
        pool: which token of a text a class head reads where the text holds the padding token, by one of the rules of
            `petals_eval.model.pooling`; "auto": as the library does that trained the head.
        verify_local: blocks (start, stop) to load here, too, and hold the servers of these blocks against.
        swarm_settings: more fields of petals_eval.config.SwarmSettings, such as active_adapter or deadline.

        Raises ModelError, AdapterError, ConfigError, SwarmUnreachableError, and MissingBlocksError where nobody
        announces the model under its name.
        """
        settings = SwarmSettings(**{"initial_peers": initial_peers, **swarm_settings})
        given: dict[str, Any] = {
            "model": model,
            "adapter": () if adapter is None else adapter,
            "adapter_task": adapter_task,
            "dht_prefix": dht_prefix,
            "revision": revision,
            "token": token,
            "device": _device_text(device),
            "cache_dir": cache_dir,
            "pool": pool,
            "verify_local": verify_local,
        }
        loading = _LoadSettings(**given)
        check_device(loading.device)
        source: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": loading.cache_dir}
        local, adapters = load_local(
            loading.model,
            loading.adapter,
            adapter_task=adapter_task,
            dtype=dtype_of(dtype),
            device=loading.device,
            pool=pool,
            **source,
        )
        side = LocalSide(local, adapters, settings, dht_prefix or default_dht_prefix(loading.model, local.family))
        home = None
        if loading.verify_local is not None:
            from petals_eval.model.blocks import BlockSpan

            check_home_blocks(loading.verify_local, side)
            home = BlockSpan.load(loading.model, *loading.verify_local, **source)
        return cls.connect(side, settings.initial_peers, home)

    @classmethod
    def connect(cls, side: LocalSide, initial_peers: Sequence[str], home: "BlockSpan | None" = None) -> "RemoteModel":
        """Connect our side of a model to the swarm of these bootstrap peers.

        home: blocks to hold the servers of the same blocks against. Raises SwarmUnreachableError, and
        MissingBlocksError where nobody announces the model under its name.
        """
        from petals_eval.swarm import SwarmConnection

        connection = SwarmConnection.connect(SwarmSettings.of(side.settings, initial_peers=tuple(initial_peers)))
        try:
            blocks = side.blocks_on(connection)
            if home is not None:
                blocks.verify_at_home(home)
        except BaseException:
            connection.close()
            raise
        return cls(side.local, blocks, side.adapters, connection)

    def compute(
        self,
        requests: Iterable[Request],
        adapter: "Adapter | None" = None,
        *,
        tokens_per_micro_batch: int | None = None,
        on_tick: Callable[[], object] | None = None,
        on_failed: Callable[[Request, ExampleError], object] | None = None,
        in_lanes: bool = True,
    ) -> Generator[RequestAnswer]:
        """Answer requests as they come back from the swarm, in any order.

        tokens_per_micro_batch: positions (rows x longest, prompts included) sent together at most; None: as many as
            the swarm is best sent at once, found out on the way.

        Requests are taken as the swarm asks for them: memory is bounded by the window and the look-ahead of the
        batches, not by their number. Each local step runs in eval mode under inference mode.

        on_failed: told of each request that the swarm cannot compute whoever tries (too long for every server); the
            others go on. None: the first such error is raised.
        in_lanes: False: by forward calls alone, whatever the settings say of lanes.
        """
        batches: Batches = micro_batches
        if in_lanes and self.blocks.settings.lanes != "never":
            batches = self._prefixed_batches(adapter)
        with closing(self._stream(requests, adapter, tokens_per_micro_batch, on_tick, on_failed, batches)) as stream:
            for computed in stream:
                answers = self._answers(computed, adapter)
                del computed  # its hidden states are of no more use, and the next may be long in coming
                yield from answers

    def generate(
        self,
        requests: Iterable[Request],
        adapter: "Adapter | None" = None,
        *,
        tokens_per_micro_batch: int | None = None,
        on_tick: Callable[[], object] = lambda: None,
        on_failed: Callable[[Request, ExampleError], object] | None = None,
        on_notice: Callable[[str], object] = lambda line: None,
    ) -> Generator[RequestAnswer]:
        """Answer requests with a decoding as their texts are over, in any order: `Generated` each.

        As many texts as the settings' `generation_rows` grow at once, in sessions where the servers open them,
        otherwise by a forward call a token (`tokens_per_micro_batch` is for these). Requests are taken as it has room.

        on_failed: told of each request that cannot be computed; the others go on. None: the first such error is raised.
        on_notice: told what a person should know, such as what forward calls will cost, before they are made.
        Raises SwarmError, ModelError where there is no LM head.
        """
        from petals_eval.generation.engine import generate

        prefix = 0 if adapter is None else adapter.prefix_length

        def fail(request: Request, error: ExampleError) -> None:
            if on_failed is None:
                raise error
            on_failed(request, error)

        def by_calls(
            rows: "Sequence[GrowingRow]",
        ) -> "Generator[tuple[GrowingRow, torch.Tensor, tuple[ServedHop, ...]]]":
            stream = self._stream(
                rows, adapter, tokens_per_micro_batch, on_tick, lambda row, error: fail(row.request, error)
            )
            with closing(stream):
                for computed in stream:
                    batch = computed.tag
                    for index, (row, length) in enumerate(zip(batch.requests, batch.lengths, strict=True)):
                        yield row, computed.hidden[index, prefix + length - 1], computed.hops

        rows = generate(
            requests,
            self.local,
            self.blocks,
            adapter,
            by_calls,
            on_failed=fail,
            on_tick=on_tick,
            on_notice=on_notice,
        )
        with closing(rows):  # by name, so that its sessions are over when this is
            for row in rows:
                yield RequestAnswer(row.request, row.text.generated, tuple(row.hops))

    def _stream(
        self,
        requests: Iterable[R],
        adapter: "Adapter | None",
        tokens_per_micro_batch: int | None,
        on_tick: Callable[[], object] | None,
        on_failed: Callable[[R, ExampleError], object] | None,
        batches: Batches = micro_batches,
    ) -> "Generator[Computed[MicroBatch[R]]]":
        """Return micro-batches of requests as they come back from the swarm."""
        from petals_eval.swarm import Work

        prefix = 0 if adapter is None else adapter.prefix_length
        deep_prompts = None if adapter is None else adapter.deep_prompts
        if deep_prompts is not None:
            deep_prompts = deep_prompts.to(self.local.dtype)  # rounded as the prompts before the first block are

        def outgoing() -> Iterator[Work[MicroBatch[R]]]:
            max_tokens, boundary = tokens_per_micro_batch or self.positions_at_once, self.local.rotary.original_length
            tree = _PrefixTree(self._embed, adapter, deep_prompts)
            for batch in batches(requests, max_tokens=max_tokens, prefix=prefix, boundary=boundary):
                self.local.check_length(batch.input_ids.shape[1], prefix)
                if batch.shared is None:
                    yield Work(batch, self._embed(batch.input_ids, adapter), deep_prompts)
                else:
                    yield tree.work(batch, batch.shared)

        def split_into_rows(batch: MicroBatch[R], error: ExampleError) -> Iterator[Work[MicroBatch[R]]]:
            """Send the rows of a micro-batch that nobody can compute one by one: the shorter ones may fit."""
            if on_failed is None:
                raise error
            if len(batch.requests) == 1:
                on_failed(batch.requests[0], error)
                return
            for request in batch.requests:
                alone = MicroBatch.of([request])
                yield Work(alone, self._embed(alone.input_ids, adapter), deep_prompts)

        return self.blocks.stream(outgoing(), on_tick=on_tick, on_error=split_into_rows)

    def _prefixed_batches(self, adapter: "Adapter | None") -> Batches:
        """Return what groups requests by what they have in common, for lanes."""

        def asked_from(request: Request) -> int:
            if request.targets:
                return min(position for position, _ in request.targets)
            return self.local.pooled_token(request.input_ids, adapter)

        return partial(
            prefixed_batches, lane_rows=partial(self.blocks.lanes.rows, self.blocks.span), asked_from=asked_from
        )

    def positions_at_once(self) -> int:
        """Return how many positions (rows x longest, prompts included) are best sent together now."""
        return self.blocks.positions_at_once(self.local.hidden_size, self.local.dtype)

    def _embed(self, input_ids: "torch.Tensor", adapter: "Adapter | None" = None) -> "torch.Tensor":
        from petals_eval.model import evaluating

        with evaluating(self.local):
            return self.local.embed(input_ids, adapter)

    def _answers(self, computed: "Computed[MicroBatch[Request]]", adapter: "Adapter | None") -> list[RequestAnswer]:
        from petals_eval.model import evaluating

        with evaluating(self.local):
            answers = self.local.head(computed.hidden, computed.tag, adapter)
        pairs = zip(computed.tag.requests, answers, strict=True)
        return [RequestAnswer(request, answer, computed.hops) for request, answer in pairs]

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


class _PrefixTree:
    """What micro-batches have in common, embedded once: what they all begin with, and the contexts of the last rows."""

    def __init__(
        self,
        embed: "Callable[[torch.Tensor, Adapter | None], torch.Tensor]",
        adapter: "Adapter | None",
        deep_prompts: "torch.Tensor | None",
    ):
        self._embed, self._adapter, self._deep_prompts = embed, adapter, deep_prompts
        self._root: tuple[tuple[int, ...], Prefix] | None = None
        self._context: tuple[Shared, Prefix] | None = None

    def work(self, batch: MicroBatch[R], shared: "Shared") -> "Work[MicroBatch[R]]":
        """Return a micro-batch of what comes after the prefix of its rows."""
        from petals_eval.swarm import Work
        from petals_eval.swarm.lanes.prefix import LaneSize, Prefix

        root = prefix = self._common(shared.common)
        if shared.context:
            if self._context is None or self._context[0] is not shared:
                tokens = batch.input_ids[:, len(shared.common) : shared.length]
                self._context = shared, Prefix(self._embed(tokens, None), root)
            prefix = self._context[1]
        size = LaneSize(shared.rows, root.end - len(shared.common) + shared.longest)
        return Work(batch, self._embed(batch.input_ids[:, shared.length :], None), None, prefix, size)

    def _common(self, tokens: tuple[int, ...]) -> "Prefix":
        import torch

        from petals_eval.swarm.lanes.prefix import Prefix

        if self._root is None or self._root[0] != tokens:
            input_ids = torch.tensor([tokens], dtype=torch.int64, device="cpu")
            self._root = tokens, Prefix(self._embed(input_ids, self._adapter), None, self._deep_prompts)
        return self._root[1]


class _LoadSettings(Settings):
    """What `RemoteModel.from_pretrained` takes beside the settings of a swarm."""

    model: Place
    adapter: AdapterPlaces
    adapter_task: Annotated[int, Field(ge=0)] | None
    dht_prefix: str | None
    revision: str | None
    token: str | None
    device: str
    cache_dir: Place | None
    pool: Pool
    verify_local: Blocks | None


def dtype_of(dtype: "str | torch.dtype | None") -> "torch.dtype | None":
    """Return the dtype of torch that is meant, such as by "float32"; None and "auto" stand for the checkpoint's own.

    Raises ConfigError for what is no dtype of floating point.
    """
    import torch

    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"dtype: expected a dtype of floating point, such as float32 or bfloat16, found {shorten(dtype)}"
        )
    return found


def check_device(device: str) -> None:
    """Raise ConfigError for a device that this machine or torch does not have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: expected one that torch can use here, found {device!r}: {reason}") from error


def _device_text(device: object) -> object:
    """Return how torch spells a device of its own; what is none stays as it is, to be refused."""
    import torch

    return str(device) if isinstance(device, torch.device) else device


def load_local(
    model: str | Path,
    adapter: str | Sequence[str | tuple[str, str]] = (),
    *,
    adapter_task: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: "torch.dtype | None" = None,
    device: str = "cpu",
    cache_dir: str | Path | None = None,
    pool: Pool = "auto",
) -> "tuple[LocalModel, tuple[Adapter, ...]]":
    """Load what stays at home, and the prompts tuned for it.

    adapter: places of adapters, or pairs of a name and a place. adapter_task: as `RemoteModel.from_pretrained` has it.

    Raises ModelError, AdapterError.
    """
    from petals_eval.model import LocalModel, load_adapter
    from petals_eval.model.prompts import named_adapters

    local = LocalModel.from_pretrained(
        model,
        revision=revision,
        token=token,
        dtype=dtype,
        device=device,
        cache_dir=cache_dir,
        pooling=None if pool == "auto" else pool,
    )
    adapters = tuple(
        replace(
            load_adapter(
                place,
                family=local.family,
                config=local.config,
                checkpoint=local.checkpoint,
                task=adapter_task,
                token=token,
                cache_dir=cache_dir,
            ),
            name=name,
        )
        for name, place in named_adapters([adapter] if isinstance(adapter, str) else adapter)
    )
    if adapter_task is not None and all(each.task is None for each in adapters):
        raise ConfigError(
            f"--adapter-task {adapter_task}: expected an adapter that has prompts for several tasks (PEFT's "
            "MULTITASK_PROMPT_TUNING), found none. Leave it out."
        )
    return local, adapters


def check_home_blocks(blocks: tuple[int, int], side: LocalSide) -> None:
    """Raise ConfigError or ModelError where blocks (start, stop) at home could not be held against their servers."""
    from petals_eval.model.blocks import check_blocks

    adapter = side.settings.active_adapter
    if adapter is not None:
        raise ConfigError(
            f"blocks at home (--verify-local) have no LoRA adapter, and the servers' apply {adapter}: "
            "leave one of the two out"
        )
    check_blocks(*blocks, side.local.num_blocks, str(side.local.fingerprint["model"]))


def default_dht_prefix(model: str | Path, family: "Family") -> str:
    """Return the prefix that servers announce for a hub repository by default.

    Raises ConfigError for a local folder: it has none on a foreign swarm.
    """
    from petals_eval.model.dht_prefixes import default_prefix

    if local_path(model).is_dir():
        raise ConfigError(
            f"{model} is a local folder, so the name its servers announce is not known: give it with --dht-prefix "
            "(dht_prefix=... in Python). For a hub model it would follow from the hub name."
        )
    return default_prefix(family.model_type, str(model))
