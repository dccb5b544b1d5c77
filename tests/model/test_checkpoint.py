"""Which tensors are read, from which files, and what is said when one is not there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from petals_eval.errors import ModelError
from petals_eval.model import Checkpoint, LocalModel, tensor_files
from tests.support.tiny_models import FAMILIES, make_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _same(first: LocalModel, second: LocalModel) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_same_tensors(family, tmp_path):
    plain = LocalModel.from_pretrained(str(make_tiny(family, tmp_path / "plain")))
    layouts = {
        "shards": {"shard_size": "20KB"},
        "bin": {"weights": "bin"},
        "bin-shards": {"weights": "bin", "shard_size": "20KB"},
    }
    for name, options in layouts.items():
        other = LocalModel.from_pretrained(str(make_tiny(family, tmp_path / name, **options)))
        assert _same(plain, other)
        assert other.fingerprint == plain.fingerprint | {"model": name}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bare_models_keys_have_no_prefix(family, tmp_path):
    bare = make_tiny(family, tmp_path / "bare", bare=True, tied=True)
    assert not any(key.startswith(("model.", "transformer.")) for key in load_file(bare / "model.safetensors"))
    whole = make_tiny(family, tmp_path / "whole", tied=True)
    assert _same(LocalModel.from_pretrained(str(bare)), LocalModel.from_pretrained(str(whole)))


@pytest.mark.parametrize("weights", ("safetensors", "bin"))
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_shards_that_hold_local_tensors_are_opened(family, weights, tmp_path, monkeypatch):
    make_tiny(family, tmp_path, shard_size="20KB", weights=weights, blocks=4)
    opened = set()
    really_open = tensor_files.open_tensors
    monkeypatch.setattr(
        tensor_files, "open_tensors", lambda path, error: opened.add(path.name) or really_open(path, error)
    )
    LocalModel.from_pretrained(str(tmp_path))
    weight_map = json.loads(next(tmp_path.glob("*.index.json")).read_text())["weight_map"]
    local = {shard for key, shard in weight_map.items() if ".layers." not in key and ".h." not in key}
    assert opened == local
    assert len(local) < len(set(weight_map.values()))


def test_shards_with_blocks_alone_need_not_be_there(tmp_path):
    make_tiny("llama", tmp_path, shard_size="20KB", blocks=4)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    local = {shard for key, shard in weight_map.items() if ".layers." not in key}
    for shard in set(weight_map.values()) - local:
        (tmp_path / shard).unlink()
    LocalModel.from_pretrained(str(tmp_path))
    (tmp_path / weight_map["model.norm.weight"]).unlink()
    with pytest.raises(ModelError, match=r"lacks model-.*model\.norm\.weight"):
        LocalModel.from_pretrained(str(tmp_path))


def test_old_pickles_are_read_too(tmp_path):
    make_tiny("bloom", tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    state = load_file(tmp_path / "old/model.safetensors")
    (tmp_path / "old/model.safetensors").unlink()
    torch.save(state, tmp_path / "old/pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert _same(LocalModel.from_pretrained(str(tmp_path / "new")), LocalModel.from_pretrained(str(tmp_path / "old")))


def test_a_missing_tensor_is_named_with_those_found(tmp_path):
    make_tiny("llama", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"(?s)expected  model\.norm\.weight or norm\.weight\n  found .*more"):
        LocalModel.from_pretrained(str(tmp_path))


def test_a_misshapen_tensor_is_refused(tmp_path):
    make_tiny("llama", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.norm.weight"] = torch.ones(7)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"(?s)norm\.weight has the wrong form.*\(32\).*\(7,\)"):
        LocalModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    (
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a model's config"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "bloom, .*, llama"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights; expected one of model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}'), "Llama"),
    ),
)
def test_a_damaged_folder_is_refused(damage, message, tmp_path):
    make_tiny("llama", tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message):
        LocalModel.from_pretrained(str(tmp_path))


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    make_tiny("llama", tmp_path / "model", shard_size="20KB")
    index = tmp_path / "model/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="outside itself"):
        LocalModel.from_pretrained(str(tmp_path / "model"))


def test_a_path_that_is_not_there_is_no_hub_name():
    with pytest.raises(ModelError, match=r"no folder \./missing"):
        Checkpoint.open("./missing")


def test_the_fingerprint_names_no_path_and_follows_the_weights(tmp_path):
    one = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path / "a/tiny"))).fingerprint
    same = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path / "b/tiny"))).fingerprint
    other = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path / "c/tiny", seed=1))).fingerprint
    assert one == same
    assert one["model"] == "tiny" and one["revision"] is None
    assert one["sha256"] != other["sha256"] and one["lm_head_sha256"] != other["lm_head_sha256"]


class FakeHub:
    """The hub's two calls, served from a folder, with a record of what was asked."""

    def __init__(self, folder: Path, snapshots: Path):
        self.folder = folder
        self.snapshot = snapshots / "snapshots" / COMMIT
        self.asked: list[tuple[str, str, str | None, str | None]] = []

    def download(self, repository, filename, *, revision=None, token=None, cache_dir=None, local_files_only=False):
        from huggingface_hub.utils import EntryNotFoundError

        self.asked.append((repository, filename, revision, token))
        if not (self.folder / filename).is_file():
            raise EntryNotFoundError(f"404: {filename}")
        self.snapshot.mkdir(parents=True, exist_ok=True)
        return shutil.copy(self.folder / filename, self.snapshot / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "remote", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.download)
    monkeypatch.setattr("petals_eval.model.sources._hub_answers", lambda: True)
    return fake


def test_from_the_hub_only_the_shards_needed_are_downloaded(hub):
    make_tiny("mixtral", hub.folder, shard_size="20KB", blocks=4)
    local = LocalModel.from_pretrained("owner/name", revision="main", token="secret")
    weight_map = json.loads((hub.folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for key, shard in weight_map.items() if ".layers." not in key}
    files = {filename for _, filename, _, _ in hub.asked}
    assert {filename for filename in files if filename.startswith("model-")} == needed
    assert len(needed) < len(set(weight_map.values()))
    assert {(name, token) for name, _, _, token in hub.asked} == {("owner/name", "secret")}
    # The first file tells the commit that "main" is; all others come from it.
    assert [revision for _, _, revision, _ in hub.asked] == ["main"] + [COMMIT] * (len(hub.asked) - 1)
    assert local.fingerprint["model"] == "owner/name" and local.fingerprint["revision"] == COMMIT


def test_the_hubs_own_cache_serves_without_a_network(tmp_path, monkeypatch):
    """The real download code over a cache laid out as the hub's, with the network off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--name"
    make_tiny("llama", repository / "snapshots" / COMMIT, shard_size="20KB")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    local = LocalModel.from_pretrained("owner/name", cache_dir=str(tmp_path))
    assert local.fingerprint["revision"] == COMMIT
    assert local.tokenizer(" good").input_ids[0] == 1
    with pytest.raises(ModelError, match=r"(?s)config\.json of owner/other from the hub.*the network"):
        LocalModel.from_pretrained("owner/other", cache_dir=str(tmp_path))


def test_a_tokenizer_class_of_a_newer_transformers_is_read_by_its_file(tmp_path, monkeypatch):
    local = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path)))

    def unknown_class(*args, **options):
        raise ValueError("Tokenizer class TokenizersBackend does not exist or is not currently imported.")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unknown_class)
    assert local.tokenizer(" good it").input_ids == [1, 262, 280]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer that can be loaded .*: Tokenizer class"):
        _ = LocalModel.from_pretrained(str(tmp_path)).tokenizer


def test_a_tokenizer_file_from_the_future_is_a_clear_error(tmp_path):
    """tokenizers raises Exception itself for a file it cannot read."""
    folder = make_tiny("llama", tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "9.0", "model": {"type": "from the future"}}')
    with pytest.raises(ModelError, match=r"no tokenizer that can be loaded by transformers .* and tokenizers .*newer"):
        _ = LocalModel.from_pretrained(str(folder)).tokenizer
