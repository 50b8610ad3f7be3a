"""Folders as people have them, loaded whole or refused by name; what is right comes from transformers and PEFT."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from avalab.lab import artifacts
from avalab.lab.errors import LabError
from avalab.lab.run import ROOT, Run, artifacts_root
from avalab.measure import families
from avalab.models import checkpoint, loading

TINY = ROOT / "data" / "tiny-llama"
TOKENS = torch.arange(5, 45)[None]
DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def artifacts_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("AVALAB_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(Run, "artifacts_dir", property(lambda self: artifacts_root() / self.name))
    return tmp_path / "artifacts"


@pytest.fixture
def mine(tmp_path):
    return copy_of_tiny(tmp_path / "mine")


@pytest.fixture(scope="module")
def weights():
    return load_file(TINY / "model.safetensors")


@pytest.fixture(scope="module")
def logits():
    return plain_logits(TINY)


def copy_of_tiny(folder: Path) -> Path:
    return Path(shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.md", "__pycache__")))


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def plain_logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS).logits


@torch.no_grad()
def our_logits(folder: Path) -> torch.Tensor:
    return checkpoint.load_model(folder, dtype=torch.float32)(TOKENS).logits


def base_of_folder(folder: Path):
    return checkpoint.base_artifact(Run("t", "smoke", model=str(folder)))


def one_line(caught) -> str:
    said = str(caught.value)
    assert "\n" not in said
    return said


# --- names of tensors ------------------------------------------------------------------------------------------------

WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of a compiled model": lambda name: f"module._orig_mod.{name}",
    "a compiled DDP": lambda name: f"_orig_mod.module.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "FSDP": lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module.").replace("mlp", "mlp._orig_mod"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_prefixes_of_wrappers_are_taken_off_and_said(wrapper, mine, weights, logits, caplog):
    write(mine, {WRAPPED[wrapper](name): tensor for name, tensor in weights.items()})
    with caplog.at_level(logging.WARNING):
        assert torch.equal(our_logits(mine), logits)
    assert "taken off the names of its tensors" in caplog.text


def test_a_base_of_wrapped_names_is_saved_without_them_and_its_card_says_so(mine, weights, artifacts_dir):
    write(mine, {f"_orig_mod.{name}": tensor for name, tensor in weights.items()})
    base = base_of_folder(mine)
    assert load_file(base.path / "model.safetensors").keys() == weights.keys()
    assert base.card["recipe"][0]["prefixes_taken_off"] == ["_orig_mod."]


HARMLESS = {
    "no prefix": lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()},
    "a tied head, written twice": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]},
    "rotary buffers": lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)},
}


@pytest.mark.parametrize("extra", HARMLESS)
def test_what_transformers_knows_to_be_harmless_passes(extra, mine, weights, logits):
    write(mine, HARMLESS[extra](weights))
    assert torch.equal(our_logits(mine), logits)


def test_a_head_of_its_own_survives_a_configuration_that_calls_it_tied(mine, weights, artifacts_dir):
    own = torch.randn_like(weights["model.embed_tokens.weight"])
    write(mine, weights | {"lm_head.weight": own})
    expected = plain_logits(mine)
    assert torch.equal(our_logits(mine), expected)
    base = base_of_folder(mine)
    assert not json.loads((base.path / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(our_logits(base.path), expected)


SPOILT = {
    "lacks 1 tensor: model.layers.2.mlp.down_proj.weight": lambda t: {n: v for n, v in t.items() if n != DOWN},
    "lacks 36 tensors: model.layers.0": lambda t: {n: v for n, v in t.items() if "layers" not in n},
    "holds 2 tensors that the model does not have: model.layers.9.x, score.weight": lambda t: (
        t | {"model.layers.9.x": torch.ones(2), "score.weight": torch.ones(2)}
    ),
    r"model.norm.weight is \(64,\), not \(128,\)": lambda t: t | {"model.norm.weight": torch.ones(64)},
}


@pytest.mark.parametrize("message", SPOILT)
def test_tensors_that_do_not_fit_are_refused_by_name_and_leave_nothing(message, mine, weights, artifacts_dir):
    write(mine, SPOILT[message](weights))
    for load in (checkpoint.load_model, base_of_folder):
        with pytest.raises(ValueError, match=message) as caught:
            load(mine)
        assert str(mine) in one_line(caught)
    assert not [path for path in artifacts_dir.rglob("*") if path.is_file()]


@pytest.mark.parametrize("index", [0, 1])
def test_a_quantised_artefact_that_lacks_or_has_too_many_tensors_is_refused(index, quantised, tmp_path):
    folder = Path(shutil.copytree(quantised[index].path, tmp_path / "copy"))
    whole = load_file(folder / "model.safetensors")
    layer = [name for name in whole if name.startswith("model.layers.2.mlp.down_proj.weight")]
    for changed in (
        {name: tensor for name, tensor in whole.items() if name not in layer},
        {name: tensor for name, tensor in whole.items() if name != "model.layers.1.input_layernorm.weight"},
        whole | {"model.layers.7.mlp.up_proj.bias": torch.ones(3)},
    ):
        write(folder, changed)
        named = min(changed.keys() ^ whole.keys()).partition(".weight")[0]
        with pytest.raises(ValueError, match=named) as caught:
            checkpoint.load_model(folder)
        assert str(folder) in one_line(caught)


# --- forms of folders ------------------------------------------------------------------------------------------------


def sharded(folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.save_pretrained(folder, max_shard_size="500KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def test_shards_with_an_index_load_and_one_that_is_not_there_is_named(tmp_path, logits):
    folder = sharded(tmp_path / "sharded")
    assert torch.equal(our_logits(folder), logits)
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(LabError, match=f"names {lost.name}, which is not there") as caught:
        checkpoint.load_model(folder)
    one_line(caught)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_of_other_precisions_become_bf16_ones(dtype, mine, weights, artifacts_dir):
    write(mine, {name: tensor.to(dtype) for name, tensor in weights.items()})
    saved = load_file(base_of_folder(mine).path / "model.safetensors")
    assert all(torch.equal(saved[name], weights[name].to(dtype).bfloat16()) for name in weights)


def test_a_read_only_snapshot_of_links_is_read_and_called_by_its_repository(tmp_path, artifacts_dir, logits):
    blobs = copy_of_tiny(tmp_path / "models--Org--Some-Model" / "blobs")
    snapshot = tmp_path / "models--Org--Some-Model" / "snapshots" / ("a1" * 20)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    snapshot.chmod(0o555)
    base = base_of_folder(snapshot)
    assert base.name == "org-some-model"
    assert torch.equal(our_logits(snapshot), logits)


def test_a_folder_without_tokenizer_says_which_file_is_wanted(mine):
    (mine / "tokenizer.json").unlink()
    with pytest.raises(LabError, match=r"has no tokenizer; copy the model's tokenizer\.json") as caught:
        checkpoint.load_tokenizer(mine)
    assert str(mine) in one_line(caught)


def test_named_templates_in_the_configuration_are_read(mine):
    text = (mine / "chat_template.jinja").read_text()
    (mine / "chat_template.jinja").unlink()
    about = json.loads((mine / "tokenizer_config.json").read_text())
    about["chat_template"] = [{"name": name, "template": text} for name in ("default", "tool_use")]
    (mine / "tokenizer_config.json").write_text(json.dumps(about))
    chat = [{"role": "user", "content": "hello"}]
    ours, plain = checkpoint.load_tokenizer(mine), checkpoint.load_tokenizer(TINY)
    assert ours.apply_chat_template(chat, tokenize=False) == plain.apply_chat_template(chat, tokenize=False)


# --- what a publisher says of decoding -------------------------------------------------------------------------------


@torch.no_grad()
def argmax_loop(folder: Path, tokens: torch.Tensor, count: int) -> list[int]:
    model, new = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for _ in range(count):
        new.append(int(model(torch.cat([tokens, torch.tensor([new], dtype=torch.long)], 1)).logits[0, -1].argmax()))
    return new


def test_a_publishers_settings_change_nothing_of_greedy_and_never_stop_a_save(mine, artifacts_dir):
    said = {"bos_token_id": 0, "eos_token_id": 2, "do_sample": False, "temperature": 0.6, "repetition_penalty": 9.0}
    (mine / "generation_config.json").write_text(json.dumps(said | {"num_beams": 3, "top_p": 0.9}))
    base = base_of_folder(mine)
    left = ["num_beams", "repetition_penalty", "temperature", "top_p"]
    assert base.card["recipe"][0]["generation_settings_left_out"] == left
    for folder in (mine, base.path):
        model = checkpoint.load_model(folder)
        found = model.generate(TOKENS[:, :6], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert found[0, 6:].tolist() == argmax_loop(TINY, TOKENS[:, :6], 12)
    kept = json.loads((base.path / "generation_config.json").read_text())
    assert not set(left) & kept.keys()
    assert kept["eos_token_id"] == 2


# --- adapters --------------------------------------------------------------------------------------------------------

KINDS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "a whole module": {"modules_to_save": ["lm_head"]},
    "other ranks": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
}


@pytest.fixture
def lora(mine, tmp_path):
    def make(kind: str) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(mine, dtype=torch.float32)
        adapted = get_peft_model(
            model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], **KINDS[kind])
        )
        for name, parameter in adapted.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.data += torch.randn_like(parameter) * 0.05
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are no")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_folder_is_a_model_merged_as_peft_merges_it_in_float32(kind, lora, mine, artifacts_dir):
    folder = lora(kind)
    plain = AutoModelForCausalLM.from_pretrained(mine, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, folder).merge_and_unload()
    with torch.no_grad():
        expected = merged(TOKENS).logits
    assert not torch.allclose(expected, plain_logits(mine), atol=1e-2)
    assert torch.allclose(our_logits(folder), expected, atol=1e-5)
    saved = checkpoint.load_model(base_of_folder(folder), dtype=torch.float32)
    for name, parameter in merged.named_parameters():
        assert torch.equal(saved.get_parameter(name), parameter.bfloat16().float()), name


def test_tensors_of_an_adapter_that_meet_no_layer_are_refused_by_name(lora):
    folder = lora("plain")
    tensors = load_file(folder / "adapter_model.safetensors")
    first = min(tensors)
    strange = first.replace("layers.0", "layers.8")
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != first},
        tensors | {strange: tensors[first]},
        tensors | {first: tensors[first][:, :5]},
    ):
        save_file({n: t.clone() for n, t in changed.items()}, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"lacks|does not have|another shape") as caught:
            checkpoint.load_model(folder)
        assert (strange if strange in changed else first).removeprefix("base_model.model.") in one_line(caught)


def test_an_adapter_without_its_base_says_where_it_was_looked_for(lora, mine, tmp_path):
    folder = lora("plain")
    mine.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"base .* was not found; looked for") as caught:
        checkpoint.load_model(folder)
    assert str(mine) in one_line(caught)
    (tmp_path / "elsewhere").rename(mine)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"/home/somebody/{mine.name}"  # trained elsewhere, the base lies beside it here
    (folder / "adapter_config.json").write_text(json.dumps(config))
    checkpoint.load_model(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="is a IA3 adapter; merged are LoRA") as caught:
        checkpoint.load_model(folder)


# --- identity --------------------------------------------------------------------------------------------------------


def test_the_same_recipe_in_another_folder_has_the_same_hash_and_shows_no_path(tmp_path, artifacts_dir, monkeypatch):
    from avalab.compress import quantize

    hashes = []
    for place in (tmp_path / "a", tmp_path / "b" / "deeper"):
        monkeypatch.setenv("AVALAB_ARTIFACTS", str(place / "artifacts"))
        run = Run("t", "smoke", model=str(copy_of_tiny(place / "mine")))
        base = checkpoint.base_artifact(run)
        made = [base] + [quantize.compress_artifact(base, method, run=run) for method in ("nf4", "rtn", "torchao-int8")]
        hashes.append([artifact.sha256 for artifact in made])
        for file in (file for artifact in made for file in artifact.path.rglob("*") if file.is_file()):
            assert str(place).encode() not in file.read_bytes(), file
    assert hashes[0] == hashes[1]


def test_a_base_is_found_by_its_hash_beside_and_in_the_folders_of_all_runs(mine, artifacts_dir, tmp_path):
    base = base_of_folder(mine)

    def fill(folder: Path) -> None:
        (folder / "x.txt").write_text("x")

    made = artifacts.make_artifact(tmp_path / "far" / "small", fill, base=base, step={"step": "x"}, format="bf16")
    assert checkpoint.base_of(made).path == base.path
    base.path.rename(tmp_path / "far" / "under another name")
    assert checkpoint.base_of(made).path == tmp_path / "far" / "under another name"
    shutil.rmtree(tmp_path / "far" / "under another name")
    with pytest.raises(ValueError, match=r"the base mine \(sha256 .* was not found; looked in") as caught:
        checkpoint.base_of(made)
    assert str(artifacts_dir) in one_line(caught)


# --- damaged files ---------------------------------------------------------------------------------------------------

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    return copy_of_tiny(tmp_path_factory.mktemp("fuzz") / "victim")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(FILES))
def test_a_truncated_or_altered_file_ends_in_one_line_or_changes_nothing_that_matters(data, name, victim):
    file, whole = victim / name, (TINY / name).read_bytes()
    if data.draw(st.booleans(), label="truncated"):
        spoilt = whole[: data.draw(st.integers(0, len(whole) - 1), label="length")]
    else:
        at = data.draw(st.integers(0, min(len(whole), 20_000) - 1), label="at")
        spoilt = whole[:at] + data.draw(st.binary(min_size=1, max_size=4), label="bytes") + whole[at + 1 :]
    file.write_bytes(spoilt)
    said = ""
    try:
        checkpoint.load_model(victim)
        checkpoint.load_tokenizer(victim)
    except LabError as error:  # anything else is a traceback, and fails the test
        said = str(error)
    finally:
        file.write_bytes(whole)
    assert not said or (str(victim) in said and "\n" not in said)


def test_a_folder_of_two_gguf_files_names_both_and_says_how_to_choose(tmp_path):
    for name in ("a.f16.gguf", "b.q8_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds a\.f16\.gguf, b\.q8_0\.gguf; give one of them as the model: .*a\.f16"):
        checkpoint.load_model(tmp_path)


def test_buffers_that_no_checkpoint_holds_are_not_missed(tmp_path):
    """A quantised Gemma was refused for the scale of its embedding."""
    folder = families.make_model("gemma2", tmp_path)
    model = checkpoint.load_model(folder)
    found = loading._never_saved(folder, model.config)
    assert {"model.embed_tokens.embed_scale", "model.rotary_emb.inv_freq"} <= found
    assert not found & model.state_dict().keys()
