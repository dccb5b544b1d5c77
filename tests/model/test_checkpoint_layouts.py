"""Checkpoints as the libraries write them that people train with: read, and equal to the library's own forward."""

from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import pytorch_lightning
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from petals_eval.errors import AdapterError
from petals_eval.model import FAMILIES, Adapter, LocalModel, load_adapter
from petals_eval.tasks.requests import Request
from tests.model.reference import TOKENS, causal_lm, classifier, full_logits, local_answers
from tests.support.saving_lines import saving_lines
from tests.support.tiny_models import make_tiny

# What torch, Lightning and PEFT say of themselves and of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

HIDDEN, BLOCKS, PREFIX, LABELS, TASKS = 32, 3, 4, 3, 3
ATOL = 1e-4  # of logits and log-likelihoods


@pytest.fixture(scope="module", params=("llama", "bloom"))
def folders(request, tmp_path_factory):
    """A causal model and a classifier of one family."""
    root = tmp_path_factory.mktemp(request.param)
    causal = make_tiny(request.param, root / "causal")
    return {"CAUSAL_LM": causal, "SEQ_CLS": make_tiny(request.param, root / "classifier", labels=LABELS)}


def whole_model(folders, task: str) -> nn.Module:
    return (causal_lm if task == "CAUSAL_LM" else classifier)(folders[task])


def loaded(path: Path, local: LocalModel, **options) -> Adapter:
    return load_adapter(path, family=local.family, config=local.config, checkpoint=local.checkpoint, **options)


def settings_of(kind: str, task: str) -> peft.PeftConfig:
    """PEFT's settings of a kind of prompts. CPT: with projections so wide that what was trained shows."""
    if kind == "CPT":
        wide = {"opt_projection_epsilon": 50.0, "opt_projection_format_epsilon": 50.0}
        return peft.CPTConfig(task_type=task, cpt_token_ids=[3, 9, 7, 5], cpt_tokens_type_mask=[1, 2, 3, 4], **wide)
    more = {"P_TUNING": {"encoder_hidden_size": 8}, "MULTITASK_PROMPT_TUNING": {"num_tasks": TASKS, "num_ranks": 2}}
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](
        task_type=task, num_virtual_tokens=PREFIX, **more.get(kind, {})
    )


def trained(model: nn.Module, settings: peft.PeftConfig, name: str = "default") -> peft.PeftModel:
    """A PEFT model whose trainable parameters are not as they were at first."""
    tuned = peft.get_peft_model(model, settings, adapter_name=name)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape))
    return tuned.eval()


@torch.no_grad()
def of_peft(tuned: peft.PeftModel, task: int | None) -> torch.Tensor:
    """The logits of PEFT's own forward of TOKENS."""
    more = {} if task is None else {"task_ids": torch.tensor([task])}
    return tuned(input_ids=torch.tensor([TOKENS]), **more).logits[0]


def assert_same_answers(local: LocalModel, whole: nn.Module, adapter: Adapter, logits: torch.Tensor) -> None:
    """Hold our answers against a library's logits, of the classes or of each next token."""
    targets, expected = (), logits
    if logits.ndim == 2:
        targets = tuple(enumerate(TOKENS[1:]))
        likelihoods = torch.log_softmax(logits[PREFIX:], dim=-1)
        expected = torch.stack([likelihoods[position, token] for position, token in targets])
    request = Request("0", 0, TOKENS, targets=targets)
    [answer] = local_answers(whole, local, adapter, [request])
    assert (answer - expected).abs().max() < ATOL
    [without] = local_answers(whole, local, adapter.without_prompts(), [request])
    assert (without - expected).abs().max() > 100 * ATOL  # the prompts do something


PEFT_KINDS = (
    *(
        (kind, task)
        for kind in ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
        for task in ("CAUSAL_LM", "SEQ_CLS")
    ),
    ("CPT", "CAUSAL_LM"),
)


@pytest.mark.parametrize(("kind", "task"), PEFT_KINDS)
def test_what_peft_saves_gives_what_peft_computes(kind, task, folders, tmp_path):
    exec(saving_lines(tmp_path)[-1], {"model": trained(whole_model(folders, task), settings_of(kind, task))})
    folder = tmp_path / "prompts"
    tuned = peft.PeftModel.from_pretrained(whole_model(folders, task), folder).eval()
    local = LocalModel.from_pretrained(str(folders[task]))
    for number in range(TASKS) if kind == "MULTITASK_PROMPT_TUNING" else [None]:
        adapter = loaded(folder, local, task=number)
        assert (adapter.kind, adapter.prefix_length, adapter.task) == (f"peft-{kind.lower()}", PREFIX, number)
        assert_same_answers(local, whole_model(folders, task), adapter, of_peft(tuned, number))


@pytest.mark.parametrize("number", (None, -1, TASKS))
def test_a_task_must_be_chosen_among_several(number, folders, tmp_path):
    settings = settings_of("MULTITASK_PROMPT_TUNING", "CAUSAL_LM")
    trained(whole_model(folders, "CAUSAL_LM"), settings).save_pretrained(tmp_path)
    local = LocalModel.from_pretrained(str(folders["CAUSAL_LM"]))
    found = "none" if number is None else number
    with pytest.raises(
        AdapterError, match=f"for 3 tasks; expected --adapter-task, a number from 0 to 2, found {found}"
    ):
        loaded(tmp_path, local, task=number)


def test_of_one_task_there_is_no_choice(folders, tmp_path):
    settings = peft.MultitaskPromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=PREFIX)
    trained(whole_model(folders, "SEQ_CLS"), settings).save_pretrained(tmp_path)
    assert loaded(tmp_path, LocalModel.from_pretrained(str(folders["SEQ_CLS"]))).task == 0


@pytest.mark.parametrize("name", ("default", "sst2-v1", "2"))
def test_an_adapter_of_any_name(name, folders, tmp_path):
    """PEFT saves one that is not called "default" in a folder of that name; the head is under the name, too."""
    tuned = trained(whole_model(folders, "SEQ_CLS"), settings_of("PROMPT_TUNING", "SEQ_CLS"), name)
    tuned.save_pretrained(tmp_path / "peft")
    local = LocalModel.from_pretrained(str(folders["SEQ_CLS"]))
    if name != "default":
        with pytest.raises(AdapterError, match=rf"Name the adapter that is meant: {tmp_path}/peft/{name}$"):
            loaded(tmp_path / "peft", local)
    saved = loaded(tmp_path / "peft" / ("" if name == "default" else name), local)
    torch.save(tuned.state_dict(), tmp_path / "whole.pt")
    whole = loaded(tmp_path / "whole.pt", local)
    assert saved.sha256 == whole.sha256 and saved.pooling == whole.pooling == "last"
    assert_same_answers(local, whole_model(folders, "SEQ_CLS"), whole, of_peft(tuned, None))


def test_an_adapter_that_peft_itself_saves_without_its_head_is_refused(folders, tmp_path):
    """One called "score" loses its head's name."""
    trained(whole_model(folders, "SEQ_CLS"), settings_of("PROMPT_TUNING", "SEQ_CLS"), "score").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"holds base_model\.weight, which an evaluation would leave out"):
        loaded(tmp_path / "score", LocalModel.from_pretrained(str(folders["SEQ_CLS"])))


@pytest.mark.parametrize("kind", ("MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT"))
def test_the_state_dict_of_a_whole_peft_model(kind, folders, tmp_path):
    """Where prompts are there, they are read; where PEFT has to compute them, it is said what to save."""
    tuned = trained(whole_model(folders, "CAUSAL_LM"), settings_of(kind, "CAUSAL_LM"))
    torch.save(tuned.state_dict(), tmp_path / "whole.pt")
    local = LocalModel.from_pretrained(str(folders["CAUSAL_LM"]))
    if kind == "MULTITASK_PROMPT_TUNING":
        adapter = loaded(tmp_path / "whole.pt", local, task=1)
        assert_same_answers(local, whole_model(folders, "CAUSAL_LM"), adapter, of_peft(tuned, 1))
    else:
        with pytest.raises(AdapterError, match=r"(?s)only PEFT can compute.*(delta_emb|mlp_head).*save_pretrained"):
            loaded(tmp_path / "whole.pt", local)


@pytest.mark.parametrize("kind", ("PREFIX_TUNING", "CARTRIDGE"))
def test_the_past_of_a_whole_peft_model_is_refused(kind, folders, tmp_path):
    more = {} if kind == "PREFIX_TUNING" else {"num_frozen_tokens": 1}
    settings = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](
        task_type="CAUSAL_LM", num_virtual_tokens=PREFIX, **more
    )
    tuned = trained(whole_model(folders, "CAUSAL_LM"), settings)
    torch.save(tuned.state_dict(), tmp_path / "whole.pt")
    with pytest.raises(AdapterError, match=r"past keys and values for the attention of every block|only PEFT can"):
        loaded(tmp_path / "whole.pt", LocalModel.from_pretrained(str(folders["CAUSAL_LM"])))


TAKEN = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
WHY = {
    "PREFIX_TUNING": r"past keys and values.*PROMPT_TUNING, P_TUNING or Petals' deep_ptune instead\.",
    "CARTRIDGE": r"past keys and values.*PROMPT_TUNING, P_TUNING or Petals' deep_ptune instead\.",
    "ADAPTION_PROMPT": r"adds to the attention of blocks.*PROMPT_TUNING, P_TUNING or Petals' deep_ptune instead\.",
    "LORA": r"LoRA runs on the servers; name it with --active-adapter\.",
    "XLORA": r"chooses among low-rank updates.*--active-adapter, or tune prompts\.",
    "POLY": r"chooses among low-rank updates.*--active-adapter, or tune prompts\.",
    "TRAINABLE_TOKENS": r"rows of the embedding matrix.*merge_and_unload\), save the whole model, and evaluate that",
}
INSIDE = r"changes what the blocks compute.*--active-adapter, tune prompts, or serve the model that it was merged into"


@pytest.mark.parametrize("kind", sorted({each.value for each in peft.PeftType} - set(TAKEN)))
def test_every_other_kind_of_peft_is_refused_with_what_would_do(kind, tmp_path):
    needed = {"num_virtual_tokens": PREFIX} if kind in ("PREFIX_TUNING", "CARTRIDGE") else {}
    if kind == "ADALORA":
        needed["total_step"] = 10
    settings = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](task_type="CAUSAL_LM", **needed)
    settings.save_pretrained(tmp_path)
    config = SimpleNamespace(hidden_size=HIDDEN, num_hidden_layers=BLOCKS, max_position_embeddings=64)
    with pytest.raises(
        AdapterError, match=rf"(?s) is a {kind} adapter; expected .* or CPT\.\n  .*{WHY.get(kind, INSIDE)}"
    ):
        load_adapter(tmp_path, family=FAMILIES["llama"], config=config)


# -- Petals' parameters, in what people wrap a model in


def tuned_as_petals(folders) -> nn.Module:
    """A classifier with the modules that Petals gives it, under Petals' names."""
    model = whole_model(folders, "SEQ_CLS")
    model.base_model.prompt_embeddings = nn.Embedding(PREFIX, HIDDEN)
    model.base_model.intermediate_prompt_embeddings = nn.Embedding(PREFIX, BLOCKS * HIDDEN)
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)


def compiled_by_block(model: nn.Module) -> nn.Module:
    blocks = next(each for each in model.base_model.children() if isinstance(each, nn.ModuleList))
    for number, block in enumerate(blocks):
        blocks[number] = torch.compile(block)
    return torch.compile(model)


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


class Lit(pytorch_lightning.LightningModule):
    """A training loop of Lightning's."""

    def __init__(self, model: nn.Module, learning_rate: float = 0.0):
        super().__init__()
        self.save_hyperparameters(ignore="model")
        self.model = model

    def training_step(self, batch, index):
        return self.model(input_ids=batch).logits.mean()

    def configure_optimizers(self):
        return torch.optim.Adam([each for each in self.parameters() if each.requires_grad], lr=0.0)


class LitUnderAnotherName(Lit):
    def __init__(self, model: nn.Module):
        super().__init__(model)
        del self.model
        self.net = model

    def training_step(self, batch, index):
        return self.net(input_ids=batch).logits.mean()


def lightning_checkpoint(module: pytorch_lightning.LightningModule, folder: Path) -> Path:
    """One step of training, and the checkpoint that Lightning's trainer leaves."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pytorch_lightning.Trainer(max_steps=1, accelerator="cpu", default_root_dir=folder, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.tensor([TOKENS]), batch_size=1))
    [path] = folder.rglob("*.ckpt")
    return path


def expected_of(model: nn.Module, family) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {
        "prompts": state[f"{family.base}.prompt_embeddings.weight"],
        "deep": state[f"{family.base}.intermediate_prompt_embeddings.weight"],
        "head": state["score.weight"],
    }


def assert_is(adapter: Adapter, expected: dict[str, torch.Tensor]) -> None:
    assert adapter.kind == "deep_ptune" and torch.equal(adapter.prompts, expected["prompts"])
    assert torch.equal(adapter.deep_prompts.squeeze(1).permute(1, 0, 2).flatten(1), expected["deep"])
    assert adapter.head_weight is None if "head" not in expected else torch.equal(adapter.head_weight, expected["head"])


@pytest.mark.parametrize(
    ("wrapped", "what"),
    (
        *((compiled, what) for what in ("whole", "trained", "base")),
        *((data_parallel, what) for what in ("whole", "trained", "base")),
        (compiled_by_block, "whole"),
    ),
)
def test_a_wrapped_model(wrapped, what, folders, tmp_path):
    model = tuned_as_petals(folders)
    local = LocalModel.from_pretrained(str(folders["SEQ_CLS"]))
    expected = expected_of(model, local.family)
    if what == "base":
        expected.pop("head")
    state = wrapped(model.base_model if what == "base" else model).state_dict()
    if what == "trained":
        state = {name: value for name, value in state.items() if "prompt" in name or "score" in name}
    assert any(name.startswith(("_orig_mod.", "module.")) for name in state)
    torch.save(state, tmp_path / "a.pt")
    adapter = loaded(tmp_path / "a.pt", local)
    assert_is(adapter, expected)
    assert set(adapter.unused) <= set(state)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone, which torch's parallel wrappers ask for."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_torch_wraps_for_several_machines(one_process, folders, tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    local = LocalModel.from_pretrained(str(folders["SEQ_CLS"]))
    model = tuned_as_petals(folders)
    expected = {name: value.clone() for name, value in expected_of(model, local.family).items()}
    torch.save(DistributedDataParallel(model).state_dict(), tmp_path / "ddp.pt")
    assert_is(loaded(tmp_path / "ddp.pt", local), expected)

    kind = type(model.base_model.prompt_embeddings)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    named = {name: value.detach().clone() for name, value in sharded.named_parameters()}
    assert any(name.startswith("_fsdp_wrapped_module.") for name in named)
    torch.save(named, tmp_path / "fsdp.pt")
    assert_is(loaded(tmp_path / "fsdp.pt", local), expected)


@pytest.mark.parametrize("module", (Lit, LitUnderAnotherName))
def test_a_checkpoint_of_lightning(module, folders, tmp_path):
    local = LocalModel.from_pretrained(str(folders["SEQ_CLS"]))
    model = tuned_as_petals(folders)
    expected = {name: value.clone() for name, value in expected_of(model, local.family).items()}
    path = lightning_checkpoint(module(model), tmp_path)
    assert_is(loaded(path, local), expected)
    assert_is(loaded(path.parent, local), expected)


def test_a_peft_model_in_lightning(folders, tmp_path):
    local = LocalModel.from_pretrained(str(folders["SEQ_CLS"]))
    tuned = trained(whole_model(folders, "SEQ_CLS"), settings_of("PROMPT_TUNING", "SEQ_CLS"), "mine")
    adapter = loaded(lightning_checkpoint(Lit(tuned), tmp_path), local)
    assert_same_answers(local, whole_model(folders, "SEQ_CLS"), adapter, of_peft(tuned.eval(), None))


# -- prompts alone, without names


def test_the_recipes_that_keep_no_names(folders, tmp_path):
    """The tuple that Petals' maintainers recommend, and what comes to the same."""
    local = LocalModel.from_pretrained(str(folders["SEQ_CLS"]))
    base = tuned_as_petals(folders).base_model
    first, deep = base.prompt_embeddings, base.intermediate_prompt_embeddings
    recipes = [
        (first, deep),
        [first, deep],
        (first.weight, deep.weight),
        (first.weight.detach(), deep.weight.detach()),
        (first.state_dict(), deep.state_dict()),
    ]
    found = []
    for number, recipe in enumerate(recipes):
        torch.save(recipe, tmp_path / f"{number}.bin")
        found.append(loaded(tmp_path / f"{number}.bin", local))
        assert_is(found[-1], {"prompts": first.weight, "deep": deep.weight})
    assert len({each.sha256 for each in found}) == 1
    whole = whole_model(folders, "SEQ_CLS")
    [answer] = local_answers(whole, local, found[0], [Request("0", 0, TOKENS)])
    assert torch.allclose(answer, full_logits(whole, local, found[0]), atol=ATOL)
    for recipe in (first, first.weight, first.state_dict()):
        torch.save(recipe, tmp_path / "one.bin")
        alone = loaded(tmp_path / "one.bin", local)
        assert alone.kind == "ptune" and torch.equal(alone.prompts, first.weight)


def test_more_than_can_be_told_apart_without_names_is_refused(folders, tmp_path):
    local = LocalModel.from_pretrained(str(folders["SEQ_CLS"]))
    torch.save([torch.ones(PREFIX, HIDDEN)] * 4, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="holds 4 modules without names; expected prompt_embeddings and"):
        loaded(tmp_path / "a.pt", local)


def test_what_caikit_saves_for_tgis(folders, tmp_path):
    """Its `decoder.pt` is the tensor that PEFT would save, beside a config of its own."""
    tuned = trained(whole_model(folders, "CAUSAL_LM"), settings_of("PROMPT_TUNING", "CAUSAL_LM"))
    torch.save(tuned.get_prompt_embedding_to_save("default"), tmp_path / "decoder.pt")
    (tmp_path / "config.yml").write_text("has_base_model: false\nDECODER: decoder.pt\nENCODER: ''\n")
    local = LocalModel.from_pretrained(str(folders["CAUSAL_LM"]))
    for place in (tmp_path, tmp_path / "decoder.pt"):
        assert_same_answers(local, whole_model(folders, "CAUSAL_LM"), loaded(place, local), of_peft(tuned, None))
    (tmp_path / "encoder.pt").write_bytes((tmp_path / "decoder.pt").read_bytes())
    with pytest.raises(AdapterError, match="for a model with an encoder"):
        loaded(tmp_path, local)


# -- two models in one file


def test_one_name_in_two_places_is_an_error(folders, tmp_path):
    local = LocalModel.from_pretrained(str(folders["SEQ_CLS"]))
    state = tuned_as_petals(folders).state_dict()
    for name, both in {
        "ema": {"state_dict": state, "model": {each: value + 1 for each, value in state.items()}},
        "list": [state, {each: value + 1 for each, value in state.items()}],
    }.items():
        torch.save(both, tmp_path / f"{name}.pt")
        with pytest.raises(AdapterError, match="twice, in different places"):
            loaded(tmp_path / f"{name}.pt", local)
    for pair, message in {
        ("student", "teacher"): r"holds teacher\..*, which an evaluation would leave out",
        ("_orig_mod", "teacher"): r"holds two tensors that are .*: _orig_mod\..* and teacher\.",
    }.items():
        torch.save({f"{one}.{name}": value for one in pair for name, value in state.items()}, tmp_path / "two.pt")
        with pytest.raises(AdapterError, match=message):
            loaded(tmp_path / "two.pt", local)
