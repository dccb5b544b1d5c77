"""Rows computed again at the end of a run: how many, in which ways, and what is said where that fails."""

import contextlib
import json
from types import SimpleNamespace

import pytest

import petals_eval
from petals_eval.errors import DeadlineError
from petals_eval.evaluation import noise
from petals_eval.evaluation.noise import NoisePolicy, rows_each_way
from petals_eval.report import markdown_report
from petals_eval.report.page import page
from petals_eval.runs import NoiseRecord, NumericalNoise, Recomputed, RunFolder
from petals_eval.runs.noise import joined_noise, noise_over_draws
from petals_eval.tasks import GenerationTask
from tests.fake_model import FakeModel, answers_of, evaluate, fake_adapter, write_rows
from tests.runs.test_file_schemas import check_folder
from tests.support.real_swarm import evaluate_trec, stories_swarm, trec_model

ROWS = 200


class MovingModel(FakeModel):
    """Answers a little otherwise when it is asked again, and otherwise still on its other server.

    others: servers that it can do without. fails: what another try raises.
    """

    def __init__(self, others=(), fails=None, **options):
        super().__init__(**options)
        self.local.fingerprint["sha256"] = "a" * 64
        self.asked, self.avoided, self.fails, self.sizes = set(), set(), fails, []
        self.blocks.replaceable = lambda peer_ids: tuple(peer for peer in peer_ids if peer in others)
        self.blocks.avoiding = self.avoiding

    @contextlib.contextmanager
    def avoiding(self, peer_ids):
        self.avoided = set(peer_ids)
        yield
        self.avoided = set()

    def compute(self, requests, adapter, *, on_tick, tokens_per_micro_batch=None, **options):
        on_tick()
        self.sizes.append(tokens_per_micro_batch)
        for request in requests:
            name = getattr(adapter, "name", None)
            again = (name, request.key) in self.asked
            self.asked.add((name, request.key))
            if again and self.fails is not None:
                raise self.fails
            self.sent.append((request.key, request.part))
            ahead = (int(request.key) + 1) / ROWS
            moved = (0.0214 if self.avoided else 0.0107) * again
            yield from answers_of("b" if self.avoided else "a", [request], (0.0, ahead - moved))


def run(tmp_path, model=None, **options):
    source = write_rows(tmp_path / "rows.csv", (1, 2, 3, 4) * (ROWS // 4))
    return evaluate(model or MovingModel(), source, tmp_path / "run", **options)


@pytest.mark.parametrize("ways", [1, 2, 3])
def test_all_ways_together_take_a_share_of_the_rows(ways):
    for scored in [0, 1, 19, 79, *range(80, 20_001, 83), 20_000, 1_000_000]:
        rows = rows_each_way(scored, ways, computed_before=32)
        assert rows == 0 or NoisePolicy.fewest <= rows <= 64
        assert rows * ways <= 0.05 * scored
        if scored >= 20_000:
            assert rows * ways + 32 <= 0.01 * scored and rows >= 56


def test_what_moved_is_in_every_place_and_is_repeated_from_the_folder(tmp_path):
    result = run(tmp_path, MovingModel(others=["a"]))
    found = result.first.noise
    assert [(each.way, each.number, each.rows, each.changed) for each in found.recomputed] == [
        ("batching", "margin", 5, 0),
        ("replica", "margin", 5, 1),  # the one that is ahead by less than it moves
    ]
    assert [each.mean for each in found.recomputed] == pytest.approx([0.0107, 0.0214], rel=1e-4)
    assert found.margin == pytest.approx(1.25 * 0.0214, rel=1e-4)
    # Margins are 1/200, 2/200, ...: five are below 0.02675, and every second one of them is wrong.
    assert (found.unsure, found.share) == (5, 5 / ROWS)
    low, high = found.ranges["accuracy"]
    accuracy = result.metrics["accuracy"].value
    assert (accuracy - low, high - accuracy) == pytest.approx((3 / ROWS, 2 / ROWS))
    check_folder(tmp_path / "run")
    with RunFolder.open(tmp_path / "run") as folder:
        again = folder.result()
        report = markdown_report(again, folder.manifest)
        shown = page(folder)
    assert again.first.noise == found
    assert f"within noise {low:.4f} - {high:.4f}" in shown and "5 rows again on other servers" in shown
    assert "## Numerical noise" in report and "5 rows again on other servers" in report
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())["noise"]
    assert (told["unsure"], told["ranges"]["accuracy"]) == (5, [low, high])
    frame = petals_eval.load_runs(tmp_path)
    assert frame["unsure_share"].tolist() == [5 / ROWS]


def test_where_only_another_batching_can_be_tried_that_is_said(tmp_path):
    model = MovingModel()
    found = run(tmp_path, model).first.noise
    assert found.ways == ("batching",) and found.recomputed[0].rows == 10
    assert found.notes == ("on other servers not tried: no other server holds the blocks of those that computed",)
    assert "which is all that could be tried" in (tmp_path / "run" / "report.md").read_text()
    assert model.sizes[0] is None and model.sizes[1] not in (None, 0)


def test_the_seed_picks_the_rows(tmp_path):
    picked = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        model = MovingModel()
        run(tmp_path / name, model, seed=seed)
        picked.append(sorted(model.sent[ROWS:]))
    assert picked[0] == picked[1] != picked[2]


def test_left_out_nothing_is_computed_twice(tmp_path):
    model = MovingModel()
    result = run(tmp_path, model, no_noise=True)
    assert result.first.noise is None and len(model.sent) == ROWS
    assert "noise" not in json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "umerical noise" not in (tmp_path / "run" / "report.md").read_text()


def test_a_failure_of_it_is_no_failure_of_the_run(tmp_path):
    result = run(tmp_path, MovingModel(fails=DeadlineError("no server any more")))
    assert result.first.n_scored == ROWS and result.first.noise.margin is None
    assert result.first.noise.notes[-1] == "in another batching not measured: no server any more"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["finished"]


def test_it_takes_no_longer_than_it_may(tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "time", SimpleNamespace(monotonic=iter(range(0, 10_000, 1000)).__next__))
    found = run(tmp_path).first.noise
    assert found.notes[-1].startswith("in another batching not measured: it took longer than 5 s")


def test_each_adapter_has_its_own_and_failed_rows_are_not_asked_again(tmp_path):
    adapters = (fake_adapter("one"), fake_adapter("two"))
    model = MovingModel(adapters=adapters, context=3)
    result = run(tmp_path, model)
    assert {name: each.noise.recomputed[0].rows for name, each in result.adapters.items()} == {"one": 7, "two": 7}
    failed = {str(key) for key in range(3, ROWS, 4)}
    assert result.first.n_failed == len(failed)
    assert not failed & {key for key, _ in model.sent}


def test_few_rows_and_generated_texts_are_not_computed_again(tmp_path):
    found = evaluate(FakeModel(), write_rows(tmp_path / "few.csv"), tmp_path / "few").first.noise
    assert found.notes == ("not measured: of 6 rows too few can be computed again",)
    variant = SimpleNamespace(name="no prompts", task=GenerationTask(name="stories", text="{begin}"))
    measured = noise._measured(None, None, None, (variant.name, None, variant.task), [], None)
    assert measured.notes[0].startswith("not measured: texts are not generated again")


def test_parts_are_joined_row_by_row():
    parts = [
        [NoiseRecord("a", (Recomputed("batching", "margin", 10, 0.1, 0.5, 1),), ("note",))],
        [NoiseRecord("a", (Recomputed("batching", "margin", 30, 0.2, 0.3, 0),), ("note",))],
    ]
    [joined] = joined_noise(parts)
    [found] = joined.recomputed
    assert (found.rows, found.largest, found.changed) == (40, 0.5, 1) and found.mean == pytest.approx(0.175)
    assert joined.notes == ("note",)


def test_several_draws_are_counted_together():
    one = NumericalNoise(0.1, 2, 0.01, {"accuracy": (0.6, 0.8), "mcc": (0.0, 0.1)}, (), ("note",))
    other = NumericalNoise(0.3, 4, 0.02, {"accuracy": (0.4, 0.6)}, (), ("note",))
    found = noise_over_draws([one, other])
    assert (found.margin, found.unsure, found.share, found.notes) == (0.3, 6, 0.015, ("note",))
    assert found.ranges == {"accuracy": pytest.approx((0.5, 0.7))}
    assert noise_over_draws([one, None]) is None
    assert noise_over_draws([one, NumericalNoise(notes=("unknown",))]).unsure is None


# -- over a real swarm


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_servers_of_equal_bits_in_the_same_batching_move_nothing(realdata, tmp_path, monkeypatch, dtype):
    """One row a micro-batch, then and now."""
    monkeypatch.setattr(noise, "another_size", lambda *args: 1)
    with stories_swarm(realdata, [(0, 5), (0, 5)], dtype=dtype) as swarm, trec_model(realdata, swarm) as model:
        result = evaluate_trec(realdata, model, tmp_path / "run", limit=160, tokens_per_micro_batch=1)
    found = result.first.noise
    assert {each.largest for each in found.recomputed} == {0.0} and "batching" in found.ways, found
    assert (found.unsure, found.share, found.margin) == (0, 0.0, 0.0)


def test_replicas_that_round_otherwise_and_a_lossy_wire_are_seen(realdata, tmp_path):
    with stories_swarm(realdata, [(0, 5)]) as swarm:
        swarm.add_server((0, 5), arithmetic="tf32")
        with trec_model(realdata, swarm, wire="float16") as model:
            found = evaluate_trec(realdata, model, tmp_path / "run").first.noise
    assert found.ways == ("batching", "replica", "lossless") and found.notes == ()
    moved = {each.way: each.mean for each in found.recomputed}
    assert moved["replica"] > 3 * moved["lossless"] / 10 > 0
    assert 0 < found.margin < 0.2 and found.share < 0.1
    assert found.ranges["accuracy"][0] <= found.ranges["accuracy"][1]
    check_folder(tmp_path / "run")
