"""A dry run and the estimate: what tasks of every kind would ask for, counted by hand here."""

import json
from dataclasses import replace

import pytest

from petals_eval.cli.dry_run import show_dry_run
from petals_eval.config import CallSettings, RunSettings
from petals_eval.demo import demo_paths
from petals_eval.errors import RequestTooLargeError
from petals_eval.evaluation.dry_run import Generating, dry_run
from petals_eval.evaluation.estimate import estimate_generation, expected_new_tokens, expected_positions
from petals_eval.evaluation.prepare import prepare
from petals_eval.remote_model import LocalSide, load_local
from petals_eval.swarm.wire.records import ServerRecord, Snapshot, SpanServer
from petals_eval.swarm.wire.span import Span
from petals_eval.tasks.requests import Decoding, Example, Request
from tests.cli.invoking import invoke

PREFIX, HIDDEN, BLOCKS = 8, 64, 6
ROWS = 3


class Asking:
    """A task that asks what `make` makes of a row's index."""

    name, columns, label_names, metrics, head = "asking", ("score",), (), (), "lm"

    def __init__(self, kind, make):
        self.kind = kind
        self._make = make

    def examples(self, rows, tokenizer):
        return (self._make(number, row) for number, row in enumerate(rows))

    def predict(self, example, answers):
        raise AssertionError("a dry run computes nothing")

    def fingerprint(self):
        return {}


@pytest.fixture(scope="module")
def prepared():
    """A run of the demo's model, prompts and first rows."""
    demo = demo_paths()
    local, adapters = load_local(str(demo.model), str(demo.prompts))
    side = LocalSide(local, adapters, CallSettings(), "demo")
    return prepare(lambda: side, task=demo.task, data=demo.data, limit=ROWS, is_kept=False)


@pytest.fixture
def plan_of(prepared):
    def plan(kind, make):
        return dry_run(replace(prepared, task=Asking(kind, make)), prepared.side.adapters[0])

    return plan


@pytest.fixture
def shown(prepared, capsys):
    """What the command prints of a run."""

    def printed(kind, make, **more):
        settings = RunSettings(model="demo", task="asking", local_swarm=2, **more)
        assert show_dry_run(settings, replace(prepared, task=Asking(kind, make))) == 0
        return capsys.readouterr().out

    return printed


def example(row, *requests, label=None, error=None):
    n_tokens = sum(len(request.input_ids) for request in requests)
    return Example(str(row.index), label, requests, n_tokens, False, "a text", error=error)


def choices(number, row):
    """Two choices after one context of 4 tokens; the last row says nothing of which is right."""
    of = [
        Request(str(row.index), part, (1, 5, 6, 7, *extra), ((3, 8), (4, 9))) for part, extra in enumerate(((8,), (9,)))
    ]
    return example(row, *of, label=None if number == ROWS - 1 else 1)


def windows(number, row):
    """Documents of 1, 2 and 3 windows, of 10 scored tokens each. The first one begins with two opening tokens."""
    opening = (1, 1) if number == 0 else (1, 7)
    targets = tuple((position, 9) for position in range(10))
    return example(
        row, *(Request(str(row.index), part, (*opening, *range(5, 13)), targets) for part in range(number + 1))
    )


def texts(number, row):
    """Texts that go on from 5, 7 and 9 tokens, none of them an opening one."""
    decoding = Decoding(10, ("\n\n", "END"), temperature=0.5, top_k=3, top_p=0.9, seed=4)
    return example(row, Request(str(row.index), 0, (7,) * (5 + 2 * number), decoding=decoding))


def broken(number, row):
    if number == 1:
        return example(row, error=RequestTooLargeError("choice 2 begins inside a token"))
    return example(row, Request(str(row.index), 0, (1,) * (200 if number == 2 else 4), ((3, 7),)))


def test_choices_are_counted_with_their_targets_and_rows_without_a_label(plan_of):
    plan = plan_of("choice", choices)
    assert (plan.n_examples, plan.n_requests, plan.most_requests, plan.n_targets) == (3, 6, 2, 12)
    assert (plan.n_unlabelled, plan.n_failed, plan.n_text_tokens) == (1, 0, 30)
    assert plan.n_positions == 6 * (PREFIX + 5)
    assert plan.bos_tokens == {1: 6}
    assert plan.generating is None
    assert "  positions 8-12: " in plan.shown[0] and "the word head is asked for" in plan.shown[0]


def test_windows_of_documents_are_counted(plan_of, shown):
    plan = plan_of("perplexity", windows)
    assert (plan.n_requests, plan.most_requests, plan.n_targets, plan.n_unlabelled) == (6, 3, 60, 0)
    assert plan.bos_tokens == {1: 5, 2: 1}
    lines = shown("perplexity", windows).splitlines()
    assert "would send 3 documents as 6 windows in 1 micro-batch:" in lines
    assert "  60 tokens whose log-likelihood is wanted, of up to 3 windows a document" in lines
    assert "  beginning-of-text tokens in front of a text: 1 (5 times), 2 (1 time)" in lines
    assert any("10 tokens after positions 8-17: " in line for line in lines)


def test_texts_to_generate_cost_at_most_this(plan_of, shown):
    plan = plan_of("generation", texts)
    assert plan.generating == Generating(
        n_texts=3,
        n_new_tokens=30,
        session_positions=(8 + 5 + 9) + (8 + 7 + 9) + (8 + 9 + 9),
        session_bytes=72 * HIDDEN * 4,
        longest_session=8 + 9 + 9,
        forward_positions=sum(PREFIX + length + step for length in (5, 7, 9) for step in range(10)),
        forward_bytes=585 * HIDDEN * 4,
    )
    assert (plan.n_micro_batches, plan.n_positions, plan.hidden_bytes) == (0, 0, 0)
    assert plan.prompt_bytes == 3 * BLOCKS * PREFIX * HIDDEN * 4
    lines = shown("generation", texts).splitlines()
    assert "would send 3 examples as 3 requests:" in lines
    assert "  no beginning-of-text token in front of the texts" in lines
    assert any(
        line.startswith("  30 new tokens at most, in sessions of up to 26 positions: 72 positions, 18.4 kB of hidden")
        for line in lines
    )
    assert "  where no server opens a session, a forward call a token: 585 positions, 149.8 kB" in lines
    assert (
        "  goes on for at most 10 tokens, or until '\\n\\n' or 'END'; drawn at temperature 0.5, from the 3 likeliest, "
        "from those that have 0.9 together, seed 4" in lines
    )


def test_texts_without_a_right_one_are_counted_where_texts_are_compared(prepared, monkeypatch):
    def two_of_three(number, row):
        return replace(texts(number, row), reference=None if number == 1 else ("right",))

    asking = Asking("generation", two_of_three)
    for columns, expected in ((("new_tokens", "stopped_by_length"), 0), (("new_tokens", "exact_match"), 1)):
        monkeypatch.setattr(asking, "columns", columns, raising=False)
        assert dry_run(replace(prepared, task=asking), prepared.side.adapters[0]).n_unlabelled == expected


def test_a_lossy_wire_makes_forward_calls_smaller_and_no_session(prepared):
    lossy = replace(prepared.side, settings=CallSettings(wire="blockwise8"))
    adapter = prepared.side.adapters[0]
    plan = dry_run(replace(prepared, side=lossy, task=Asking("generation", texts)), adapter)
    assert (plan.generating.session_bytes, plan.generating.forward_bytes) == (72 * HIDDEN * 4, 585 * HIDDEN)


def test_what_cannot_be_computed_is_said_with_the_reasons(plan_of, shown, prepared):
    plan = plan_of("choice", broken)
    keys = [str(row.index) for row in prepared.part]
    assert (plan.n_examples, plan.n_failed, plan.n_requests) == (3, 2, 1)
    assert [key for key, _ in plan.failures] == keys[1:]
    assert plan.failures[0][1] == "choice 2 begins inside a token"
    assert "208" in plan.failures[1][1]
    lines = shown("choice", broken).splitlines()
    assert "  2 examples cannot be computed:" in lines
    assert f"    example {keys[1]}: choice 2 begins inside a token" in lines
    assert "  cannot be computed: choice 2 begins inside a token" in lines


@pytest.mark.parametrize(
    ("kind", "make"),
    [("choice", choices), ("perplexity", windows), ("generation", texts), ("choice", broken)],
    ids=["choice", "perplexity", "generation", "failures"],
)
def test_all_of_it_is_there_as_json(shown, plan_of, kind, make):
    found = json.loads(shown(kind, make, json=True))
    plan = plan_of(kind, make)
    [adapter] = found["adapters"]
    assert (found["schema_version"], found["task"], found["kind"]) == (1, "asking", kind)
    assert found["servers"] == [f"blocks {span}  a server embedded on this machine" for span in ("0:3", "3:6")]
    for name in ("n_examples", "n_requests", "n_targets", "n_text_tokens", "n_positions", "n_failed", "n_unlabelled"):
        assert adapter[name] == getattr(plan, name)
    assert adapter["bos_tokens"] == {str(count): requests for count, requests in plan.bos_tokens.items()}
    assert [(each["key"], each["reason"]) for each in adapter["failures"]] == list(plan.failures)
    assert (adapter["generating"] or {}).get("n_new_tokens") == (30 if kind == "generation" else None)
    assert len(adapter["examples"]) == 2 and "token_ids" in adapter["examples"][0]["requests"][0]


def test_the_estimate_counts_new_tokens_in_sessions(prepared):
    first = tuple(Asking("generation", texts).examples(prepared.part, None))
    run = replace(prepared, first_examples=first)
    assert expected_new_tokens(run) == 30
    assert expected_positions(run) == 3 * PREFIX + 5 + 7 + 9 + 27
    assert expected_new_tokens(prepared) == 0


def test_servers_that_do_not_say_how_fast_they_generate():
    silent = Snapshot(2, {"a": SpanServer("a", Span(0, 2), ServerRecord(state=2, throughput=50.0))})
    assert estimate_generation(silent, 1) == (
        "generation: at most 1 new token; how fast the servers are at that, they do not say"
    )


KINDS = {
    "choice": 'text: "{q}"\nchoices_column: choices\nlabel_column: label\ndelimiter: ""\n'
    "metrics: [acc, acc_mutual_info]\n",
    "continuation": 'text: "{q}"\ntarget: "{answer}"\ndelimiter: " "\n',
    "perplexity": 'text: "{q}"\nmetrics: [token_perplexity]\nmax_length: 8\n',
    "generation": 'text: "{q}"\nmax_new_tokens: 20\nstop: ["\\n"]\n',
}


@pytest.mark.parametrize(
    ("kind", "n_requests", "n_targets", "n_failed", "n_new_tokens"),
    [
        ("choice", 8, 40, 1, None),
        ("continuation", 3, 1 + 3 + 6, 0, None),
        ("perplexity", 2 + 1 + 1, 13 + 7 + 6, 0, None),
        ("generation", 3, 0, 0, 60),
    ],
)
def test_the_command_counts_what_real_tasks_of_every_kind_ask_for(
    realdata, tmp_path, monkeypatch, kind, n_requests, n_targets, n_failed, n_new_tokens
):
    """Against the tokens that stories260K's tokenizer makes, counted by looking at them."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"q": "Once upon a time, there was a girl named", "choices": [" Lily.", " Tom."], "label": 0, "answer": "Lily"},
        {"q": "Tom ran to the", "choices": [" park.", " house with his mum."], "label": 1, "answer": "park"},
        {"q": "I see th", "choices": ["e", "at"], "label": 0, "answer": "animals"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(f"kind: {kind}\n{KINDS[kind]}")
    command = ["run", "--model", realdata / "stories260K-hf", "--task", "task.yaml", "--data", "rows.jsonl"]
    outcome = invoke(*command, "--local-swarm", 1, "--dry-run", "--json")
    assert outcome.code == 0
    [plan] = json.loads(outcome.out)["adapters"]
    assert (plan["n_requests"], plan["n_targets"], plan["n_failed"]) == (n_requests, n_targets, n_failed)
    assert (plan["generating"] or {}).get("n_new_tokens") == n_new_tokens
