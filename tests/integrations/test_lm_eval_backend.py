"""The backend as the harness makes and asks it: arguments, caches, manifest, failures."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import petals_eval
from petals_eval.errors import ConfigError, DeadlineError, ExampleError, RequestTooLargeError, SwarmError
from petals_eval.integrations.lm_eval import LM
from petals_eval.local_swarm.faults.catalog import Noise
from tests.integrations.harness import evaluated, same_answers
from tests.support.real_swarm import stories_swarm

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness's libraries


@pytest.fixture(scope="module")
def lm(where):
    with LM(**where) as model:
        yield model


def likelihoods(*pairs):
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def texts(*asked):
    return [Instance("generate_until", {}, each, index) for index, each in enumerate(asked)]


PAIRS = [(f"Once upon a time there were {count} dogs", word) for count in range(40) for word in (" in", " big")]


def test_simple_evaluate_by_name_with_arguments_as_text(where, task_files, tmp_path):
    peers = "+".join([*where["initial_peers"], *where["initial_peers"]])
    told = f"pretrained={where['pretrained']},initial_peers={peers},dht_prefix={where['dht_prefix']},dtype=float"
    told += f",manifest={tmp_path}/made/manifest.json"
    manager = TaskManager(include_path=str(task_files), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="petals-eval",
        model_args=told,
        tasks=["trec_words"],
        task_manager=manager,
        limit=5,
        device="cuda:0",  # what the harness's command says by itself
        batch_size="auto:4",
        bootstrap_iters=0,
    )
    assert found["n-samples"]["trec_words"] == {"original": 500, "effective": 5}
    manifest = found["config"]["petals_eval"]
    assert json.loads((tmp_path / "made" / "manifest.json").read_text()) | {"updated": ""} == manifest | {"updated": ""}
    assert manifest["requests"] == {"loglikelihood": 30}
    assert {server["requests"] for server in manifest["servers"]} <= set(range(1, 31))
    assert manifest["verification"]["computed"] > 0 and manifest["verification"]["share"] == 0.02
    assert str(Path(where["pretrained"]).parent) not in json.dumps(manifest)
    assert manifest["model"]["name"] == "stories260K-hf" and manifest["packages"]["lm_eval"] == "0.4.13"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("initial_pers=/ip4/127.0.0.1/tcp/1", "unknown setting 'initial_pers'. Did you mean initial_peers?"),
        ("pretrained=x", "expected exactly one swarm: --initial-peers"),
        ("local_swarm=1", "pretrained is missing"),
        ("pretrained=x,parallelize=True,local_swarm=1", "unknown setting 'parallelize'"),
        ("pretrained=x,initial_peers=/ip4/1+/ip4/2", "initial_peers.*multiaddress"),
        ("pretrained=x,local_swarm=1,enable_thinking=True", "think_end_token"),
        ("pretrained=x,local_swarm=1,max_length=0", "max_length"),
    ],
)
def test_arguments_that_are_refused(told, message):
    with pytest.raises(ConfigError, match=message):
        get_model("petals-eval").create_from_arg_string(told, {"batch_size": 1, "device": "cpu"})


def test_the_word_none_is_a_quantisation(where):
    peers = "+".join(where["initial_peers"])
    told = f"pretrained={where['pretrained']},initial_peers={peers},dht_prefix={where['dht_prefix']},require_quant=none"
    with get_model("petals-eval").create_from_arg_string(told) as lm:
        assert lm.manifest["answer_settings"]["require_quant"] == "none"


def test_what_a_model_that_is_given_cannot_be(where, lm):
    with pytest.raises(ConfigError, match="unknown setting 'deadline'"):
        LM(lm.model, deadline=3)
    with pytest.raises(ConfigError, match="max_length: expected 512 at most"):
        LM(lm.model, max_length=513)
    with pytest.raises(ConfigError, match="expected one, for the harness shows one model, found 2"):
        LM(**where, adapter=["a", "b"])
    assert LM(lm.model, max_length=100).loglikelihood(likelihoods(PAIRS[0]), disable_tqdm=True)


def test_peft_is_the_adapter(where, causal_prompt):
    with LM(**where, peft=str(causal_prompt)) as lm:
        assert (lm.prefix_length, lm.max_length) == (8, 504)
        assert lm.manifest["adapter"]["kind"] == "peft-prompt_tuning"


def test_requests_that_read_the_same_are_sent_once(lm, monkeypatch):
    sent = []
    check = lm.model.local.check_request
    monkeypatch.setattr(lm.model.local, "check_request", lambda *asked: (sent.append(asked[0]), check(*asked)))
    asked = [
        (f"There was a dog number {index}. It was", word) for index in range(5) for word in (" big", " red", " in")
    ]
    found = lm.loglikelihood(likelihoods(*asked), disable_tqdm=True)
    lengths = [len(request.input_ids) for request in sent]
    assert len(sent) == 5 and lengths == sorted(lengths, reverse=True)
    assert len({likelihood for likelihood, _ in found}) > 5


def test_noise_stands_in_the_manifest(where, lm, monkeypatch):
    pairs = [(f"There were {count} dogs and", word) for count in range(100) for word in (" in", " a big")]
    compute = lm.model.compute

    def moved(requests, *given, tokens_per_micro_batch=None, **options):
        for found in compute(requests, *given, tokens_per_micro_batch=tokens_per_micro_batch, **options):
            answer = found.answer.clone()
            if tokens_per_micro_batch is not None:  # what is computed again
                answer.view(len(answer), -1)[:, 0] += 0.25
            yield replace(found, answer=answer)

    for is_moved in (False, True):
        with monkeypatch.context() as patched:
            over = LM(lm.model)
            if is_moved:
                patched.setattr(lm.model, "compute", moved)
            quiet = over.loglikelihood(likelihoods(*pairs), disable_tqdm=True)
            documents = [
                Instance("loglikelihood_rolling", {}, (f"It was day {count}.",), count) for count in range(100)
            ]
            over.loglikelihood_rolling(documents, disable_tqdm=True)
        noise = over.manifest["noise"]
        assert {each["way"] for each in noise["recomputed"]} >= {"batching"} and noise["adapter"] == "no prompts"
        for each in noise["recomputed"]:
            assert each["number"] == "log_likelihood" and each["rows"] >= 4
            assert each["largest"] >= 0.25 if is_moved else each["largest"] < 1e-4
    assert len(quiet) == 200 and all(likelihood < 0 for likelihood, _ in quiet)

    over = LM(lm.model)
    over.loglikelihood(likelihoods(*pairs[:4]), disable_tqdm=True)
    assert over.manifest["noise"]["recomputed"] == []
    assert over.manifest["noise"]["notes"] == ["not measured in a call: of 4 requests too few can be computed again"]
    over = LM(lm.model, no_noise=True)
    over.loglikelihood(likelihoods(*pairs), disable_tqdm=True)
    assert over.manifest["noise"] is None


def test_a_server_that_noise_catches_ends_the_call(lm, monkeypatch):
    over = LM(lm.model)
    answers = over._answers
    monkeypatch.setattr(over._noise, "measure", lambda *_, **__: answers._recalled.add("key"))
    with pytest.raises(SwarmError, match="answers that the harness was given before are by servers that were caught"):
        over.loglikelihood(likelihoods(*PAIRS[:2]), disable_tqdm=True)


def test_nothing_asked_is_nothing_answered(lm):
    assert (lm.loglikelihood([]), lm.loglikelihood_rolling([]), lm.generate_until([])) == ([], [], [])
    assert LM(lm.model, add_bos_token=False).loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, ("",), 0)], disable_tqdm=True
    ) == [0.0]


def test_requests_that_the_harness_has_cached_are_those_that_it_makes(lm, task_files, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    options = {"limit": 3, "cache_requests": True, "apply_chat_template": True, "fewshot_as_multiturn": True}
    first, again = [evaluated(lm, task_files, ["trec_words"], shots=1, **options) for _ in range(2)]
    assert list(tmp_path.iterdir()) and same_answers(again, first) == 18
    assert "[user]" in first["samples"]["trec_words"][0]["arguments"][0][0]


def test_a_continuation_that_cannot_be_scored(lm):
    with pytest.raises(ExampleError, match="with neither"):
        lm.loglikelihood(likelihoods(("", "")))
    with pytest.raises(ExampleError, match="makes no token, so that nothing stands before"):
        LM(lm.model, add_bos_token=False).loglikelihood(likelihoods((" ", "dog")), disable_tqdm=True)
    for continuation, message in (("", "makes 0 tokens"), (" dog" * 600, "512 at most")):
        with pytest.raises(RequestTooLargeError, match=message):
            lm.loglikelihood(likelihoods(("A", continuation)), disable_tqdm=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_q": 0.5}, "top_q=0.5 is not known here. Did you mean top_p?"),
        ({"num_beams": 4}, "num_beams=4 is not known here"),
        ({"max_length": 40}, "max_length=40 is not known here"),
        ({"do_sample": True}, "a temperature above 0"),
        ({"max_gen_toks": 512}, "expected less than the 512 tokens"),
        ({"max_gen_toks": 0}, "expected 1 or more"),
    ],
)
def test_generation_settings_that_are_refused(settings, message, lm):
    with pytest.raises(ConfigError, match=message):
        lm.generate_until(texts(("Once", settings)), disable_tqdm=True)


def test_drawn_texts_depend_on_the_seed_the_context_and_how_often_it_was_asked(lm):
    import torch

    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "until": ["zebra"], "num_beams": 1}
    torch.manual_seed(3)  # as the harness's --seed does
    first = lm.generate_until(texts(*[("Once", drawn)] * 3), disable_tqdm=True)
    again = lm.generate_until(texts(("Then", drawn), *[("Once", drawn)] * 2), disable_tqdm=True)
    assert len(set(first)) == 3 and again[1:] == first[:2]
    torch.manual_seed(4)
    assert lm.generate_until(texts(("Once", drawn)), disable_tqdm=True) != first[:1]


def test_what_was_thought_is_no_answer(lm):
    [whole] = lm.generate_until(texts(("Once upon a time", {"max_gen_toks": 24})), disable_tqdm=True)
    words = whole.split(" ")
    thinking = LM(lm.model, think_end_token=f" {words[6]} ")
    [answer] = thinking.generate_until(texts(("Once upon a time", {"max_gen_toks": 24})), disable_tqdm=True)
    assert answer == whole.split(f" {words[6]} ")[-1].lstrip()
    end = lm.tok_encode(words[-1], add_special_tokens=False)[0]
    [answer] = LM(lm.model, think_end_token=str(end)).generate_until(
        texts(("Once upon a time", {"max_gen_toks": 24})), disable_tqdm=True
    )
    assert whole.endswith(answer) and len(answer) < len(whole)


def test_thinking_is_told_to_the_template_and_has_no_likelihoods(lm):
    thinking = LM(lm.model, enable_thinking=True, think_end_token="</think>")
    with pytest.raises(ConfigError, match="likelihoods"):
        thinking.loglikelihood(likelihoods(PAIRS[0]))
    told = {}
    thinking.tokenizer = type(
        "Template", (), {"apply_chat_template": lambda self, messages, **more: told.update(more)}
    )()
    thinking.apply_chat_template([{"role": "user", "content": "a"}])
    assert told["enable_thinking"] is True and told["add_generation_prompt"] is True


def test_a_cache_goes_on_where_it_ended_and_knows_whose_it_is(lm, tmp_path):
    file = str(tmp_path / "cache.db")
    first = CachingLM(lm, file).loglikelihood(likelihoods(*PAIRS[:6]))
    asked_before = lm.manifest["requests"]["loglikelihood"]
    cached = CachingLM(LM(lm.model), file)
    assert cached.loglikelihood(likelihoods(*PAIRS[:8]))[:6] == first
    assert cached.manifest["requests"] == {"loglikelihood": 2} and asked_before >= 6
    with pytest.raises(ConfigError, match=r"another model or settings .*max_length: was 512, now 100"):
        CachingLM(LM(lm.model, max_length=100), file)
    other = CachingLM(lm, str(tmp_path / "other.db"))
    del other.dbdict["petals-eval"]
    other.dbdict["x"] = 1
    with pytest.raises(ConfigError, match="with the answers of another"):
        CachingLM(lm, str(tmp_path / "other.db"))
    lm.set_cache_hook(CacheHook(None))


def test_a_swarm_that_goes_away_raises_and_what_was_answered_is_kept(realdata, tmp_path, monkeypatch):
    with stories_swarm(realdata, [(0, 3), (3, 5)]) as swarm:
        where = {"initial_peers": swarm.initial_peers, "dht_prefix": swarm.dht_prefix}
        bounded = {"deadline": 3, "window": 1, "max_tokens_per_call": 64, "request_timeout": 5}
        with LM(realdata / "stories260K-hf", **where, **bounded) as lm:
            cached = CachingLM(lm, str(tmp_path / "cache.db"))
            add = CacheHook.add_partial

            def add_then_stop(hook, *arguments):
                add(hook, *arguments)
                if swarm.servers[1].is_alive():
                    swarm.servers[1].stop()

            monkeypatch.setattr(CacheHook, "add_partial", add_then_stop)
            with pytest.raises(SwarmError) as raised:
                cached.loglikelihood(likelihoods(*PAIRS))
            assert isinstance(raised.value, DeadlineError) or "no server" in str(raised.value)
            kept = len(cached.dbdict) - 1
            assert 0 < kept < len(PAIRS)
            assert f"answers to {kept} of {len(PAIRS)}" in raised.value.__notes__[0].replace("The ", "")
            monkeypatch.setattr(CacheHook, "add_partial", add)
            swarm.add_server((3, 5))
            assert len(cached.loglikelihood(likelihoods(*PAIRS))) == len(PAIRS)
            assert lm.manifest["requests"] == {"loglikelihood": len(PAIRS)}  # none was asked again


@pytest.mark.soak  # over real servers; in test_lm_eval_answers.py without any
def test_a_server_that_lies_is_named_and_nothing_of_its_is_counted(realdata, lm):
    quiet = lm.loglikelihood(likelihoods(*PAIRS), disable_tqdm=True)
    with stories_swarm(realdata, [(0, 3), (3, 5), (0, 3), (3, 5)]) as swarm:
        liar = swarm.add_server((0, 5), faults=(Noise(size=0.01),))
        with LM(realdata / "stories260K-hf", initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix) as over:
            found = over.loglikelihood(likelihoods(*PAIRS), disable_tqdm=True)
            manifest = over.manifest
        assert liar.fault_counts()["noise"].in_flight > 0
    assert [likelihood for likelihood, _ in found] == pytest.approx([likelihood for likelihood, _ in quiet], abs=1e-4)
    assert [(each["peer_id"], each["is_used"]) for each in manifest["noisy_servers"]] == [(liar.peer_id, False)]
    assert liar.peer_id not in {each["server"]["peer_id"] for each in manifest["servers"]}


def test_the_harness_is_imported_by_nobody_else_and_its_absence_is_told():
    root = Path(petals_eval.__file__).parent
    importing = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if any(line.lstrip().startswith(("import lm_eval", "from lm_eval")) for line in path.read_text().splitlines())
    }
    assert {path.rpartition("/")[0] for path in importing - {"integrations/lm_eval/__init__.py"}} == {
        "integrations/lm_eval"
    }
    code = "import sys; sys.modules['lm_eval'] = None; import importlib.util as util\n"
    code += "util.find_spec = lambda name, find=util.find_spec: None if name == 'lm_eval' else find(name)\n"
    code += "from petals_eval.cli import main; main(['lm-eval', '--', 'ls', 'tasks'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "lm-evaluation-harness is not installed" in done.stderr and "[lm-eval]" in done.stderr
