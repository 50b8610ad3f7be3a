"""Tiny models of every family: plain transformers loads each, and what it answers depends on what it read."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from avalab.measure import families

PROMPT = "Write down the sum of 17 and 25, then tell me in one sentence what you did to get there."


@torch.no_grad()
def logits(folder, ids):
    return AutoModelForCausalLM.from_pretrained(folder)(ids).logits.float()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_plain_transformers_loads_the_model_and_its_logits_are_decisive(name, family_model):
    tokenizer = AutoTokenizer.from_pretrained(family_model("llama"))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert ids.shape[1] > families.WINDOW
    found = logits(family_model(name), ids)
    top, best = found.topk(2).values, found.argmax(-1)
    assert torch.isfinite(found).all()
    assert (top[..., 0] - top[..., 1]).median() > 0.1 * found.std()
    assert best.unique().numel() > ids.shape[1] // 2
    assert (best != ids).float().mean() > 0.8, "it repeats what it reads"


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    paths = [families.make_model("qwen2", tmp_path / str(n), seed) for n, seed in enumerate((0, 0, 1))]
    same, again, other = ((path / "model.safetensors").read_bytes() for path in paths)
    assert same == again != other


def test_a_snapshot_is_links_and_a_sharded_model_has_an_index(family_model):
    assert all(path.is_symlink() for path in family_model("folder-of-links").iterdir())
    assert (family_model("llama-sharded") / "model.safetensors.index.json").is_file()
    assert not (family_model("llama-sharded") / "model.safetensors").exists()


def test_an_adapter_changes_what_its_base_answers(family_model):
    ids = torch.arange(5, 60)[None]
    for name in ("lora", "lora-rs", "lora-dora", "lora-modules-to-save"):
        folder = family_model(name)
        assert (logits(folder, ids) - logits(folder.parent / "base", ids)).abs().max() > 0.05


def test_an_unknown_family_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(ValueError, match=r"unknown family 'rwkv'; choose one of llama, .*gpt2"):
        families.make_model("rwkv", tmp_path)
