"""PEFT's folders: what is taken from them and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from petals_eval.errors import AdapterError
from petals_eval.model import FAMILIES, Adapter, load_adapter

HIDDEN = 16
CONFIG = SimpleNamespace(hidden_size=HIDDEN, num_hidden_layers=3, max_position_embeddings=64)


def _folder(path: Path, tensors: dict[str, torch.Tensor] | None = None, **fields: object) -> Path:
    path.mkdir(exist_ok=True)
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "token_dim": HIDDEN, "task_type": "SEQ_CLS"}
    settings |= {"num_transformer_submodules": 1, "base_model_name_or_path": "owner/base"}
    (path / "adapter_config.json").write_text(json.dumps(settings | fields))
    save_file({"prompt_embeddings": torch.ones(4, HIDDEN)} | (tensors or {}), path / "adapter_model.safetensors")
    return path


def _load(path: Path | str) -> Adapter:
    return load_adapter(str(path), family=FAMILIES["llama"], config=CONFIG)


@pytest.mark.parametrize("kind", ("PROMPT_TUNING", "P_TUNING"))
def test_folder_or_file(kind, tmp_path):
    folder = _folder(tmp_path / "mine", peft_type=kind)
    for path in (folder, folder / "adapter_model.safetensors", folder / "adapter_config.json"):
        adapter = _load(path)
        assert (adapter.kind, adapter.name, adapter.prefix_length) == (f"peft-{kind.lower()}", "mine", 4)
        assert adapter.head_weight is None


@pytest.mark.parametrize(
    "name",
    (
        "base_model.score",
        "base_model.model.score",
        "base_model.classifier",
        "base_model.model.classifier.modules_to_save.default",
        "base_model.model.score.modules_to_save",
        "score",
    ),
)
def test_heads_under_every_name(name, tmp_path):
    weight, bias = torch.randn(3, HIDDEN), torch.randn(3)
    before = f"{name.split('.modules')[0]}.original_module.weight"
    tensors = {f"{name}.weight": weight, f"{name}.bias": bias, before: torch.zeros(2, HIDDEN)}
    adapter = _load(_folder(tmp_path, tensors))
    assert torch.equal(adapter.head_weight, weight) and torch.equal(adapter.head_bias, bias)


def test_two_heads_are_refused(tmp_path):
    tensors = {"base_model.score.weight": torch.ones(2, HIDDEN), "base_model.classifier.weight": torch.ones(3, HIDDEN)}
    with pytest.raises(AdapterError, match="more than one head"):
        _load(_folder(tmp_path, tensors))


@pytest.mark.parametrize(
    ("kind", "reason"),
    (
        ("PREFIX_TUNING", "past keys and values.*a Petals server cannot take"),
        ("LORA", "LoRA runs on the servers; name it with --active-adapter"),
        ("IA3", "changes what the blocks compute"),
        ("A_KIND_OF_TOMORROW", "changes what the blocks compute"),
    ),
)
def test_other_kinds_are_refused_with_the_reason(kind, reason, tmp_path):
    with pytest.raises(AdapterError, match=rf"(?s)a {kind} adapter; expected PROMPT_TUNING, P_TUNING, .*{reason}"):
        _load(_folder(tmp_path, peft_type=kind))


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"token_dim": 64}, r"another model \(owner/base\): token_dim 64; expected 16"),
        ({"num_virtual_tokens": 9}, "holds 4 tokens; expected 9"),
        ({"num_transformer_submodules": 2}, "an encoder and a decoder"),
    ),
)
def test_configs_that_do_not_fit_are_refused(fields, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        _load(_folder(tmp_path, **fields))


def test_fields_that_older_versions_leave_out(tmp_path):
    adapter = _load(_folder(tmp_path, token_dim=None, num_transformer_submodules=None, num_virtual_tokens=None))
    assert adapter.prefix_length == 4


def test_misshapen_prompts_are_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"(?s)prompt_embeddings has the wrong shape.*\(4, 32\)"):
        _load(_folder(tmp_path, {"prompt_embeddings": torch.ones(4, 32)}))


def test_missing_prompts_are_refused_with_what_was_found(tmp_path):
    save_file({"base_model.score.weight": torch.ones(2, 16)}, _folder(tmp_path) / "adapter_model.safetensors")
    with pytest.raises(
        AdapterError, match=r"(?s)expected  prompt_embeddings  \(4, 16\).*base_model.score.weight \(2, 16\)"
    ):
        _load(tmp_path)


def test_missing_weights_and_damaged_configs_are_refused(tmp_path):
    (_folder(tmp_path) / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no weights; expected adapter_model\.safetensors or adapter_model\.bin"):
        _load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="not a PEFT config"):
        _load(tmp_path)


def test_weights_without_their_config_are_refused(tmp_path):
    (_folder(tmp_path) / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"keep them in one folder with their adapter_config\.json"):
        _load(tmp_path / "adapter_model.safetensors")


def test_from_the_hub(tmp_path, monkeypatch):
    from huggingface_hub.utils import EntryNotFoundError

    folder = _folder(tmp_path / "remote")
    asked = []

    def download(repository, filename, **options):
        asked.append((repository, filename, options["revision"], options["token"]))
        if not (folder / filename).exists():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("petals_eval.model.sources._hub_answers", lambda: True)
    load = {"family": FAMILIES["llama"], "config": CONFIG, "revision": "v1", "token": "secret"}
    adapter = load_adapter("owner/prompts", **load)
    assert adapter.name == "owner/prompts" and adapter.kind == "peft-prompt_tuning"
    assert asked == [
        ("owner/prompts", "adapter_config.json", "v1", "secret"),
        ("owner/prompts", "adapter_model.safetensors", "v1", "secret"),
    ]

    # A repository with a Petals state dict: its files are listed to find it.
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save({"model.prompt_embeddings.weight": torch.ones(4, HIDDEN)}, folder / "prompts.pt")
    monkeypatch.setattr(
        "huggingface_hub.HfApi.list_repo_files", lambda self, name, **options: ["README.md", "prompts.pt", "runs/a.pt"]
    )
    assert load_adapter("owner/prompts", **load).kind == "ptune"


def test_the_published_bloomz_adapter(realdata):
    config = SimpleNamespace(hidden_size=1024, num_hidden_layers=24)
    place = str(realdata / "adapters/bloomz-560m-prompt-adapter")
    adapter = load_adapter(place, family=FAMILIES["bloom"], config=config)
    assert adapter.kind == "peft-prompt_tuning" and adapter.head_weight is None
    assert tuple(adapter.prompts.shape) == (8, 1024) and adapter.prompts.dtype == torch.float32
    with pytest.raises(AdapterError, match=r"\(bigscience/bloomz-560m\): token_dim 1024; expected 16"):
        _load(place)


def test_a_head_for_tokens_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"task_type TOKEN_CLS\): its head gives each token a label of its own"):
        _load(_folder(tmp_path / "mine", task_type="TOKEN_CLS"))
