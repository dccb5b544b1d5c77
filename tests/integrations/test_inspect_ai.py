"""The provider of inspect_ai: its answers are those of inspect's own `hf`, and no failure becomes one."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task, eval
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, get_model
from inspect_ai.scorer import includes, perplexity
from inspect_ai.solver import generate
from inspect_ai.tool import ToolInfo

import petals_eval
from petals_eval.demo import export_demo
from petals_eval.errors import ConfigError, RequestTooLargeError, SwarmError
from petals_eval.integrations.inspect_ai.settings import ProviderSettings
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import Noise, Refuse
from petals_eval.tasks.requests import Request
from tests.model.reference import causal_lm, local_answers
from tests.support.pages import Page
from tests.support.real_swarm import stories_swarm

pytestmark = pytest.mark.filterwarnings("ignore")  # of inspect's libraries

GUIDE = Page("inspect_ai")
TEXTS = [
    "Once upon a time",
    "Lily and Tom went to the park.",
    "The dog",
    "One day a girl named Sue found a big box. It",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """inspect keeps logs, traces and a cache."""
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path / "logs"))


@pytest.fixture(scope="module", autouse=True)
def no_handler_left_behind():
    """inspect shows every warning of the process from its first evaluation on, those of later tests too."""
    yield
    root = logging.getLogger()
    for handler in [each for each in root.handlers if type(each).__module__.startswith("inspect_ai")]:
        root.removeHandler(handler)


@pytest.fixture(scope="module")
def arguments(where):
    return {"model": f"petals-eval/{where['pretrained']}", **{k: v for k, v in where.items() if k != "pretrained"}}


@pytest.fixture(scope="module")
def greedy(arguments):
    model = get_model(**arguments, do_sample=False, stop_in_text=True, memoize=False)
    yield model
    model.api.close()


@pytest.fixture(scope="module")
def drawing(arguments):
    model = get_model(**arguments, memoize=False)
    yield model
    model.api.close()


def answers(model, asked, **config):
    async def ask():
        return await asyncio.gather(*(model.generate(each, config=GenerateConfig(**config)) for each in asked))

    return asyncio.run(ask())


def test_it_is_found_by_its_entry_point():
    [ours] = [each for each in entry_points(group="inspect_ai") if each.name == "petals_eval"]
    assert ours.value == "petals_eval.integrations.inspect_ai"


def test_nobody_else_imports_it_and_its_absence_is_told():
    root = Path(petals_eval.__file__).parent
    importing = {
        path.relative_to(root).parent.as_posix()
        for path in root.rglob("*.py")
        if any(re.match(r"\s*(import|from) inspect_ai", line) for line in path.read_text().splitlines())
    }
    assert importing == {"integrations/inspect_ai"}
    code = "import importlib.util as util, sys; sys.modules['inspect_ai'] = None\n"
    code += "util.find_spec = lambda name, find=util.find_spec: None if name == 'inspect_ai' else find(name)\n"
    code += "import petals_eval.integrations.inspect_ai"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ConfigError: inspect_ai is not installed" in done.stderr and "[inspect]" in done.stderr


@pytest.mark.parametrize("templated", [True, False])
def test_greedy_texts_and_log_probabilities_are_those_of_hf(templated, greedy, where, monkeypatch):
    hf = get_model(
        f"hf/{where['pretrained']}", do_sample=False, device="cpu", use_chat_template=templated, memoize=False
    )
    monkeypatch.setattr(greedy.api, "use_chat_template", templated)
    asked = [[ChatMessageSystem(content="Tell a story."), ChatMessageUser(content=text)] for text in TEXTS]
    config = {"max_tokens": 16, "logprobs": True, "top_logprobs": 3, "stop_seqs": [". ", "dog"]}
    for ours, theirs in zip(answers(greedy, asked, **config), answers(hf, asked, **config), strict=True):
        assert ours.completion == theirs.completion
        found, expected = (each.choices[0].logprobs.content for each in (ours, theirs))
        assert 0 < len(found) == ours.usage.output_tokens <= len(expected)  # those of hf go on with its batch
        for one, right in zip(found, expected, strict=False):
            assert (one.token, one.bytes) == (right.token, right.bytes)
            assert [each.token for each in one.top_logprobs] == [each.token for each in right.top_logprobs]
            values = [[each.logprob for each in (of, *of.top_logprobs)] for of in (one, right)]
            assert values[0] == pytest.approx([float(value) for value in values[1]], abs=1e-4)


def test_a_stop_sequence_is_in_no_text_unless_asked_for(greedy, monkeypatch):
    [whole] = answers(greedy, TEXTS[:1], max_tokens=24)
    stop = whole.completion.split()[3]
    for kept in (True, False):
        monkeypatch.setattr(greedy.api, "settings", greedy.api.settings.model_copy(update={"stop_in_text": kept}))
        [ended] = answers(greedy, TEXTS[:1], max_tokens=24, stop_seqs=[stop])
        assert (stop in ended.completion) is kept and ended.stop_reason == "stop"
        assert whole.completion.startswith(ended.completion)
    assert whole.stop_reason == "max_tokens"


@pytest.mark.parametrize("prompted", [False, True])
def test_the_perplexity_scorer(prompted, arguments, where, causal_prompt):
    more = {"adapter": str(causal_prompt)} if prompted else {}
    model = get_model(**arguments, completions=True, memoize=False, **more)
    samples = [Sample(input=text, target="") for text in TEXTS]
    solver = generate(max_tokens=1, prompt_logprobs=1)
    [log] = eval(Task(dataset=samples, solver=solver, scorer=perplexity()), model=model, display="none")
    assert log.status == "success", log.error
    local, [adapter] = model.api.remote.local, model.api.remote.adapters or [None]
    blocks = causal_lm(where["pretrained"])
    for sample in log.samples:
        ids = tuple(local.tokenizer(sample.input)["input_ids"])
        request = Request("", 0, ids, tuple((at, token) for at, token in enumerate(ids[1:])))
        expected = local_answers(blocks, local, adapter, [request])[0]
        found = [each.logprob for each in sample.output.choices[0].prompt_logprobs.content]
        assert found == pytest.approx(expected.tolist(), abs=1e-4)
        assert sample.scores["perplexity"].value == pytest.approx(-float(expected.mean()), abs=1e-4)
    model.api.close()


def test_tools_are_told_to_the_template_which_may_not_show_them(greedy):
    config = GenerateConfig(max_tokens=6)
    told = asyncio.run(greedy.generate(TEXTS[0], tools=[ToolInfo(name="look", description="Looks.")], config=config))
    [untold] = answers(greedy, TEXTS[:1], max_tokens=6)
    assert told.completion == untold.completion and not told.message.tool_calls


def test_seeds(drawing):
    asked = [TEXTS[0]] * 3
    once, again, other = (
        [answer.completion for answer in answers(drawing, asked, max_tokens=12, seed=seed, temperature=1.5)]
        for seed in (1, 1, 2)
    )
    assert len(set(once)) == 3, "asked again, the same text goes on in another way"
    assert not set(once) & set(other)
    assert not set(once) & set(again), "how often it was asked counts"
    drawing.api._asked.clear()
    assert sorted(once) == sorted(
        answer.completion for answer in answers(drawing, asked, max_tokens=12, seed=1, temperature=1.5)
    )


def test_a_text_ends_where_the_model_reads_no_further(greedy):
    long = " ".join(["once upon a time there was a dog"] * 40)
    [found] = answers(greedy, [long], max_tokens=2000)
    assert found.stop_reason == "model_length" and found.usage.total_tokens == 513
    with pytest.raises(RequestTooLargeError, match="expected a text of 512 tokens at most"):
        answers(greedy, [long * 3], max_tokens=5)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"initial_pers": "x", "local_swarm": 1}, "unknown setting 'initial_pers'. Did you mean initial_peers"),
        ({}, "expected exactly one swarm"),
        ({"local_swarm": 1, "load_in_4bit": True}, "unknown setting 'load_in_4bit'"),
        ({"local_swarm": 1, "adapter": ["a", "b"]}, "expected one, for the harness shows one model, found 2"),
    ],
)
def test_arguments_that_are_refused(told, message):
    with pytest.raises(PrerequisiteError) as refused:
        get_model("petals-eval/model", memoize=False, **told)
    assert re.search(message, str(refused.value.message)) and isinstance(refused.value.__cause__, ConfigError)


def test_settings_of_a_call_that_are_refused(greedy):
    for config in ({"num_choices": 2}, {"logit_bias": {1: 3.0}}, {"prompt_logprobs": 3}, {"presence_penalty": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(config))):
            answers(greedy, TEXTS[:1], max_tokens=2, **config)


def test_what_is_answered_before_the_swarm_fails_is_kept_and_nothing_is_made_up(realdata, tmp_path):
    with stories_swarm(realdata, [(0, 5)], mode="thread") as swarm:
        told = {"initial_peers": swarm.initial_peers, "dht_prefix": swarm.dht_prefix, "deadline": 1}
        told |= {"do_sample": False}
        model = get_model(f"petals-eval/{realdata}/stories260K-hf", memoize=False, **told)
        manifest = model.api.manifest
        samples = [Sample(input=text, target=".") for text in TEXTS]

        def evaluated(**more):
            solver = generate(max_tokens=3, **more)
            task = Task(dataset=samples, solver=solver, scorer=includes(), fail_on_error=False)
            [log] = eval(task, model=model, display="none", max_connections=1)
            return log

        whole = {sample.input: sample.output.completion for sample in evaluated().samples}
        swarm.servers[0].switch(Refuse(after=6))
        log = evaluated(cache=True)
        answered = [sample for sample in log.samples if sample.error is None]
        failed = [sample for sample in log.samples if sample.error is not None]
        assert answered and failed and all("DeadlineError" in sample.error.traceback for sample in failed)
        assert all(sample.output.completion == whole[sample.input] for sample in answered)
        assert all(not sample.scores for sample in failed)

        model.api.close()
        swarm.servers[0].switch()
        model = get_model(f"petals-eval/{realdata}/stories260K-hf", memoize=False, **told | {"deadline": 30})
        assert {sample.input: sample.output.completion for sample in evaluated(cache=True).samples} == whole
        assert model.api.manifest["requests"] == {"generate": len(failed)}, "the others are in inspect's cache"
        model.api.close()
    assert manifest["requests"] == {"generate": 0}


def test_the_cache_of_inspect_knows_whose_answers_it_holds(arguments, greedy, causal_prompt):
    other = get_model(**arguments, do_sample=False, stop_in_text=True, adapter=str(causal_prompt), memoize=False)
    same = get_model(**arguments | {"deadline": 7}, do_sample=False, stop_in_text=True, memoize=False)
    config = GenerateConfig(max_tokens=8)
    for model in (greedy, other, same):
        asyncio.run(model.generate(TEXTS[1], config=config, cache=True))
    assert other.api.manifest["requests"] == {"generate": 1}
    assert same.api.manifest["requests"] == {"generate": 0}
    for model in (other, same):
        model.api.close()


@pytest.mark.soak  # over real servers; in test_inspect_calls.py without any
def test_a_server_that_is_caught(realdata):
    with stories_swarm(realdata, [(0, 5), (0, 5), (0, 5)], mode="thread") as swarm:
        told = {
            "initial_peers": swarm.initial_peers,
            "dht_prefix": swarm.dht_prefix,
            "verify": 1.0,
            "completions": True,
        }
        model = get_model(f"petals-eval/{realdata}/stories260K-hf", memoize=False, do_sample=False, **told)
        asked = [f"{text} and then {count}" for text in TEXTS for count in range(6)]
        config = {"max_tokens": 1, "prompt_logprobs": 1}
        right = answers(model, asked, **config)
        given = {server["server"]["peer_id"]: server["requests"] for server in model.api.manifest["servers"]}
        liar = next(server for server in swarm.servers if server.peer_id in given)
        liar.switch(Noise(size=0.3))
        with pytest.raises(SwarmError, match="was given answers before by servers that were caught since"):
            for _ in range(5):
                answers(model, asked, **config)
        model.api.close()

        again = get_model(f"petals-eval/{realdata}/stories260K-hf", memoize=False, do_sample=False, **told)
        found = answers(again, asked * 3, **config)
        manifest = again.api.manifest
        again.api.close()
    for index, output in enumerate(found):
        one, other = (
            [each.logprob for each in of.choices[0].prompt_logprobs.content]
            for of in (output, right[index % len(asked)])
        )
        assert one == pytest.approx(other, abs=1e-4)
    assert [(each["peer_id"], each["is_used"]) for each in manifest["noisy_servers"]] == [(liar.peer_id, False)]
    assert liar.peer_id not in {each["server"]["peer_id"] for each in manifest["servers"]}


# -- the guide


def test_every_key_is_named():
    [table] = re.findall(r"^\| keys .*?\n\n", GUIDE.text, re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.strip().splitlines()))) - {"peft"}
    assert named == ProviderSettings.model_fields.keys() - {"model"}


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    export_demo(tmp_path)
    Path("reviews_task.py").write_text(GUIDE.blocks("python")[0])


@pytest.mark.usefixtures("surroundings")
def test_the_examples_of_the_guide(tmp_path):
    names: dict[str, Any] = {}
    with LocalSwarm("my-llama", servers=2, mode="thread") as swarm:
        names["peers"] = swarm.initial_peers
        exec(GUIDE.blocks("python")[1], names)
        names["model"].api.close()
    assert names["log"].status == "success" and len(names["log"].samples) == 20
    assert names["log"].samples[0].output.metadata["petals_eval"]["servers"]


@pytest.mark.soak
@pytest.mark.usefixtures("surroundings")
def test_the_command_of_the_guide(tmp_path):
    [command] = [each for each in GUIDE.typed() if each.words[0] == "inspect"]
    words = [*command.words[1:]]
    words += ["-M", "manifest=manifest.json"]
    ended = subprocess.run([sys.executable, "-m", "inspect_ai", *words], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0 and "accuracy" in ended.stdout, ended.stdout + ended.stderr
    assert json.loads(Path("manifest.json").read_text())["requests"] == {"generate": 20}
    words[words.index("local_swarm=2")] = "local_swrm=2"
    refused = subprocess.run([sys.executable, "-m", "inspect_ai", *words], capture_output=True, text=True, timeout=200)
    assert refused.returncode != 0 and "Traceback" not in refused.stderr + refused.stdout
    assert "Did you mean local_swarm" in (refused.stdout + refused.stderr).replace("\n", " ")
