"""Seeded schedules of faults over runs with replicas, and what must come of each of them.

One local swarm of server processes serves all schedules: faults are switched on in the middle of a run and off after
it; a server that crashed, or whose wrong clock left a record for an hour, is replaced by a new one.
"""

import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import petals_eval
from petals_eval.errors import MachineError, SwarmError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults import catalog as f
from petals_eval.local_swarm.faults.schedule import Activation, Schedule
from petals_eval.runs import RunFolder

ADAPTER = "trec-deep_ptune"
SPANS = ((0, 3), (3, 5))
REPLICAS = 3
EXAMPLES = 160
KINDS = tuple(kind for kind in f.FAULTS if kind not in f.SESSION_FAULTS + f.LOSSY_WIRE_FAULTS)
"""A run with deep prompts opens no session, and these runs are lossless."""
LYING = (f.FlippedBit, f.Noise, f.OtherWeights, f.Swapped, f.TrainingMode)
"""Answers that look right. A third replica is needed to say who is wrong, so that they hit one of three at most."""
_SILENT = r"does not answer|no server holds|no server of blocks 3:5 has answered"
_LEFT_OUT = r"every server of blocks 3:5 fails .*is left out"
"""Where the record of a server that an earlier schedule ended is still there, and says that there is one more."""
_TWO_OR_WRONG = rf"no server (in evaluation mode|that is trusted) holds blocks 3:5|{_LEFT_OUT}"
SAYS = {
    f.Crash: r"cannot be reached|no server holds|does not answer",
    f.Hang: _SILENT,
    f.InfoOnly: _SILENT,
    f.Slow: _SILENT,
    f.Reset: r"cannot be reached|refuses",
    f.Refuse: r"refuses \(.*(overloaded|does not serve|adapter not found|Could not allocate)",
    f.StaleRecord: r"refuses \(.*does not serve|no server holds",
    f.Truncated: r"answers wrongly \(expected \d+ float32 values",
    f.Oversized: r"answers wrongly \(expected (\d+ float32 values|an answer of at most)",
    f.WrongShape: r"answers wrongly \(expected a tensor of shape",
    f.WrongDtype: r"answers wrongly \(expected float32, found 'float16'",
    f.NotFinite: r"answers wrongly \(1 of \d+ values are not finite",
    f.Noise: _TWO_OR_WRONG,  # it may begin between the two calls of one question
    f.TrainingMode: _TWO_OR_WRONG,
}
"""What a run must say that ends because all servers of blocks 3:5 have this fault."""
SETTINGS = {
    "request_timeout": 3.0,
    "connect_timeout": 2.0,
    "min_backoff": 0.2,
    "max_backoff": 1.0,
    "update_period": 1.0,
    "missing_update_period": 0.5,
}


@dataclass(frozen=True)
class Planned:
    """A schedule. servers of its faults: numbers of `Chaos.servers`, in order of SPANS, each REPLICAS times.

    nobody: every server of blocks 3:5 has the fault for the rest of the run, so that the run must end with its reason.
    """

    seed: int
    schedule: Schedule
    nobody: bool

    @property
    def names(self) -> str:
        return " + ".join(dict.fromkeys(each.fault.name for each in self.schedule.activations))

    @property
    def lies(self) -> bool:
        """Whether a server gives answers that only look right. It begins to in mid-run, when its first answers were
        found to be right; the default share of checks then finds it with a probability that is stated elsewhere."""
        return any(isinstance(each.fault, LYING) for each in self.schedule.activations)


def plan(seed: int, attempt: int = 0) -> Planned:
    """The schedule of this seed. Twelve seeds in a row switch on every kind of fault over replicas."""
    drawn_by = seed + 1_000_003 * attempt
    draws = random.Random(f"chaos {drawn_by}")
    if seed % 4 == 3:
        kinds = list(SAYS)
        kind = kinds[seed // 4 % len(kinds)]
        servers = range(REPLICAS, 2 * REPLICAS)
        drawn = [Schedule.draw(drawn_by + each, servers=[each], kinds=[kind]).activations[0] for each in servers]
        at = draws.uniform(0.1, 0.4)
        hopeless = {"share": 1.0, "after": 0, "repeats": False}
        special = {f.Slow: {"delay": 60.0}, f.Refuse: {"reason": draws.choice(("overload", "adapter", "cache"))}}
        activations = [
            replace_fault(each, at, {**hopeless, **special.get(kind, {})}, server)
            for each, server in zip(drawn, servers, strict=True)
        ]
        return Planned(seed, Schedule(seed=drawn_by, activations=tuple(activations)), nobody=True)
    ordinal = seed - seed // 4  # of the schedules with replicas
    first, second = (KINDS[(2 * ordinal + each) % len(KINDS)] for each in (0, 1))
    spans = draws.sample(range(len(SPANS)), len(SPANS))
    chosen = [(first, spans[0]), (second, spans[1])]
    if first not in LYING and draws.random() < 0.4:  # two of three replicas
        others = [kind for kind in KINDS if kind not in LYING]
        chosen.append((draws.choice(others), spans[0]))
    activations, hit = [], set()
    for number, (kind, span) in enumerate(chosen):
        servers = [server for server in range(span * REPLICAS, (span + 1) * REPLICAS) if server not in hit]
        found = Schedule.draw(drawn_by * 8 + number, servers=servers, num_blocks=5, kinds=[kind], within=0.6)
        hit.add(found.activations[0].server)
        activations += found.activations
    in_order = tuple(sorted(activations, key=lambda each: each.at))
    return Planned(seed, Schedule(seed=drawn_by, activations=in_order), nobody=False)


def replace_fault(activation: Activation, at: float, fields: dict, server: int) -> Activation:
    known = {name: value for name, value in fields.items() if name in type(activation.fault).model_fields}
    return Activation(at=at, server=server, fault=activation.fault.model_copy(update=known))


@dataclass
class Outcome:
    """wrong: what was not as it must be. in_flight: calls under way that each fault hit.
    attempts: schedules drawn until they had hit some."""

    planned: Planned
    wrong: list[str] = field(default_factory=list)
    in_flight: dict[str, int] = field(default_factory=dict)
    ended: str = ""
    retries: int = 0
    seconds: float = 0.0
    attempts: int = 1
    caught: tuple[str, ...] = ()

    @property
    def has_hit(self) -> bool:
        """Whether every fault has hit a call under way. Where nobody was left one is enough, unless the run had its
        last answers from a server before the fault hit that, too."""
        return (any if self.planned.nobody and self.ended != "done" else all)(self.in_flight.values())


class Switcher:
    """Progress that switches faults on, at a share of the examples. A context manager around the run."""

    def __init__(self, servers: Sequence, planned: Planned):
        self._servers = servers
        self._left = list(planned.schedule.activations)
        self._ended = threading.Event()
        self._announcing: list[threading.Thread] = []
        self.before = [in_flight_of(server) for server in servers]
        self.messages: list[str] = []

    def __enter__(self) -> "Switcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._announcing:
            thread.join()

    def update(self, done, retries=0, servers=0, message=None):
        if message is not None:
            self.messages.append(message)
        at_once = []
        while self._left and done >= self._left[0].at * EXAMPLES:
            each = self._left.pop(0)
            if isinstance(each.fault, ANNOUNCED):
                # Aside: the run must go on, or no call would come.
                self._announcing.append(threading.Thread(target=self._announce, args=(each,)))
                self._announcing[-1].start()
            else:
                at_once.append(threading.Thread(target=switch, args=(self._servers[each.server], each.fault)))
        # Together: one after the other, the last one would be well for long enough to end the run.
        for thread in at_once:
            thread.start()
        for thread in at_once:
            thread.join()

    def waiting(self, message):
        self.messages.append(message)

    def _announce(self, each: Activation) -> None:
        """What it says goes out at once, and a call must be under way then: afterwards there may be none any more."""
        server = self._servers[each.server]
        before = server.fault_counts().get("slow", f.FaultCount()).times
        switch(server, SLOWED)
        while server.is_alive() and server.fault_counts().get("slow", f.FaultCount()).times == before:
            if self._ended.wait(0.02):
                return
        switch(server, each.fault, SLOWED)

    def in_flight(self, each: Activation) -> int:
        """Calls under way that the fault hit in this run."""
        return in_flight_of(self._servers[each.server]).get(each.fault.name, 0) - self.before[each.server].get(
            each.fault.name, 0
        )


def switch(server, *faults: f.AnyFault) -> None:
    try:
        if server.is_alive():
            server.switch(*faults)
    except MachineError:  # it crashes just now
        if server.is_alive():
            raise


ANNOUNCED = (f.RecordWithoutServer, f.ClaimsSpan, f.ClaimsDtype, f.VersionLie, f.ClockSkew, f.JoiningForEver)
SLOWED = f.Slow(delay=0.5)


def in_flight_of(server) -> dict[str, int]:
    return {name: count.in_flight for name, count in server.fault_counts().items()}


class Chaos:
    """The swarm, the quiet run's predictions, and runs of schedules over it. A context manager."""

    def __init__(self, realdata: Path, folder: Path):
        self._folder = folder
        shipped = (Path(petals_eval.__file__).parent / "tasks" / "builtin" / "trec.yaml").read_text()
        self._task = folder / "trec.yaml"
        self._task.write_text(re.sub(r"(?m)^metrics: .*", "metrics: [accuracy]", shipped))
        self._model = str(realdata / "stories260K-hf")
        self._adapter = str(realdata / "adapters" / ADAPTER)
        self._data = str(realdata / "trec" / "TREC.test.all")
        self._swarm = LocalSwarm(self._model, spans=[s for s in SPANS for _ in range(REPLICAS)], update_period=5.0)
        self.servers: list = []
        self.quiet: dict = {}

    def __enter__(self) -> "Chaos":
        self._swarm.start()
        try:
            self.servers = list(self._swarm.servers)
            with self._connected() as model:
                self._evaluate(model, self._folder / "quiet", None)
            self.quiet = predictions(self._folder / "quiet")
        except BaseException:
            self._swarm.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.kill()
        self._swarm.stop()

    def run(self, seed: int) -> Outcome:
        """Run a seed's schedule; drawn again while one of its faults hit no call under way."""
        started = time.monotonic()
        for attempt in range(8):
            outcome = self._run(plan(seed, attempt), self._folder / f"{seed}-{attempt}")
            outcome.attempts = attempt + 1
            if outcome.wrong or outcome.has_hit:
                break
        else:
            outcome.wrong.append(f"no call under way was hit: {outcome.in_flight}")
        outcome.seconds = time.monotonic() - started
        return outcome

    def _run(self, planned: Planned, folder: Path) -> Outcome:
        outcome = Outcome(planned)
        self._make_well()
        switcher = Switcher(self.servers, planned)
        settings = {"deadline": 4.0 if planned.nobody else 30.0}
        if planned.lies:
            settings["verify"] = 1.0
        try:
            with self._connected(**settings) as model, switcher:
                try:
                    result = self._evaluate(model, folder, switcher)
                    outcome.ended, outcome.retries = "done", result.retries
                    outcome.caught = tuple(each.verdict for each in result.noisy_servers)
                except SwarmError as error:
                    outcome.ended = f"{type(error).__name__} ({error.exit_code}): {error}"
            outcome.in_flight = {
                f"{each.fault.name}@{each.server}": switcher.in_flight(each) for each in planned.schedule.activations
            }
        finally:
            self._make_well()
        self._judge(planned, outcome, folder)
        return outcome

    def _judge(self, planned: Planned, outcome: Outcome, folder: Path) -> None:
        if planned.nobody and (outcome.ended != "done" or outcome.has_hit):
            says = SAYS[type(planned.schedule.activations[0].fault)]
            if outcome.ended == "done" or "(3)" not in outcome.ended or not re.search(says, outcome.ended):
                outcome.wrong.append(f"expected exit code 3 and /{says}/, it ended: {outcome.ended}")
                return
            kept = predictions(folder)
            outcome.wrong += differences(kept, {key: one for key, one in self.quiet.items() if key in kept})
            with self._connected(deadline=30.0) as model:  # well again: the same run goes on
                self._evaluate(model, folder, None)
        elif outcome.ended != "done":
            outcome.wrong.append(f"expected it to end well, it ended: {outcome.ended}")
            return
        outcome.wrong += differences(predictions(folder), self.quiet)

    def _make_well(self) -> None:
        """No faults any more, and every server there."""
        for index, server in enumerate(self.servers):
            if server.is_alive() and "clock_skew" in server.fault_counts():
                server.kill()  # its record would outlive it by an hour and be newer than any other
            if server.is_alive():
                server.switch()
            else:
                server.kill()
                self.servers[index] = self._swarm.add_server(server.span)

    def _connected(self, **settings):
        return petals_eval.RemoteModel.from_pretrained(
            self._model,
            adapter=self._adapter,
            initial_peers=self._swarm.initial_peers,
            dht_prefix=self._swarm.dht_prefix,
            **{**SETTINGS, **settings},
        )

    def _evaluate(self, model, out: Path, progress):
        return petals_eval.evaluate(
            model,
            task=str(self._task),
            data=self._data,
            limit=EXAMPLES,
            out=out,
            progress=progress,
            tokens_per_micro_batch=96,
        )


def predictions(path: Path) -> dict:
    """The valid rows of a run by key; a key that has two is an error."""
    folder = RunFolder.open(path)
    try:
        rows = list(folder.journal.predictions(ADAPTER))
    finally:
        folder.close()
    by_key = {row.key: row for row in rows}
    if len(by_key) != len(rows):
        raise AssertionError(f"{len(rows) - len(by_key)} examples are there twice")
    return by_key


def differences(found: dict, expected: dict) -> list[str]:
    """How the predictions differ: lost, doubled or other ones, or probabilities beyond float32's rounding."""
    wrong = [f"lost: {len(expected.keys() - found.keys())}"] if expected.keys() - found.keys() else []
    wrong += [f"too many: {len(found.keys() - expected.keys())}"] if found.keys() - expected.keys() else []
    for key in found.keys() & expected.keys():
        one, other = found[key], expected[key]
        apart = max(abs(a - b) for a, b in zip(one.probabilities, other.probabilities, strict=True))
        if (one.label, one.prediction) != (other.label, other.prediction) or not apart < 1e-5:
            wrong.append(f"{key}: {one.prediction} for {other.prediction}, probabilities {apart:.2g} apart")
    return wrong[:3] + ([f"and {len(wrong) - 3} more"] if len(wrong) > 3 else [])


__all__ = ["Chaos", "Outcome", "Planned", "differences", "plan"]
