"""`avalab show`: folders and files of every kind, made here by the libraries that others make them with."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from avalab.lab.run import ROOT

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 10}


@pytest.fixture
def model(tmp_path):
    """A model folder with 30 weights in two tensors, as it is published."""
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": np.zeros((2, 5), np.float16), "b": np.zeros(20, np.float16)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def gguf_file(tmp_path):
    """A file of an architecture that this project does not know, written by the package gguf."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "wombat")
    writer.add_name("Wombat 1")
    writer.add_block_count(3)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.add_tensor("output.weight", np.zeros((4, 8), np.float16))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return tmp_path / "small.gguf"


def test_a_model_folder_shows_family_sizes_and_weights(avalab, model):
    code, text, _ = avalab("show", model)
    assert code == 0
    assert "model folder, llama, not quantised" in text
    assert "num hidden layers: 2" in text
    assert "30 in 2 tensors of f16" in text
    assert "without a chat template" in text


def test_the_projects_own_tiny_model_has_a_chat_template(avalab):
    assert "with a chat template" in avalab("show", ROOT / "data" / "tiny-llama")[1]


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_gguf_file_shows_its_architecture_whatever_it_is(avalab, gguf_file, as_folder):
    code, text, error = avalab("show", gguf_file.parent if as_folder else gguf_file)
    assert code == 0, error
    assert "Wombat 1" in text
    assert "gguf, wombat" in text
    assert "block count: 3" in text
    assert "64 in 2 tensors" in text
    sizes = {line.split()[1]: int(line.split()[2].replace(",", "")) for line in text.splitlines() if "bytes " in line}
    assert (sizes["f32"], sizes["f16"], sizes["total"]) == (128, 64, gguf_file.stat().st_size)


def test_an_adapter_of_pefts_shows_base_and_rank(avalab, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "lora_alpha": 16, "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "adapter_model.safetensors")
    code, text, _ = avalab("show", tmp_path)
    assert code == 0
    assert "adapter of PEFT, LORA, DoRA" in text
    assert "org/base" in text
    assert "8, alpha 16" in text
    assert "q_proj, v_proj" in text


@pytest.mark.parametrize(
    ("file", "engine"),
    [
        ("openvino_model.xml", "openvino"),
        ("genai_config.json", "onnx"),
        ("model.pt2", "aot"),
        ("model.pte", "executorch"),
        ("decoder.onnx", "onnxruntime"),
    ],
)
def test_an_exported_folder_without_a_card_shows_its_engine_and_files(avalab, tmp_path, file, engine):
    (tmp_path / file).write_bytes(b"12345")
    code, text, _ = avalab("show", tmp_path)
    assert code == 0
    assert f"engine: {engine}" in text
    assert f"{file}" in text
    assert "100.0%" in text


def test_an_exported_artefact_shows_its_files_and_what_was_measured(avalab, tmp_path):
    from avalab.lab import artifacts

    def save(folder):
        (folder / "openvino_model.xml").write_text("<net/>")
        (folder / "openvino_model.bin").write_bytes(b"1234")
        return {"logit_difference": 0.25, "steps": {"a": 1}}

    about = {"base": {"name": "b", "sha256": "0" * 64}, "recipe": [], "format": "openvino", "engines": ["openvino"]}
    folder = artifacts.write_artifact("there", tmp_path, save, **about).path
    code, text, _ = avalab("show", folder)
    assert code == 0
    assert "openvino (engines: openvino)" in text
    assert "logit difference: 0.25" in text
    assert "openvino_model.bin" in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[]", "config.json is damaged: it holds a list"),
        ("config.json", "[" * 100_000, "config.json is damaged"),
        ("adapter_config.json", "nonsense", "adapter_config.json is damaged"),
        ("card.json", "{}", "card.json is damaged"),
        ("model.gguf", "GGUF", "model.gguf is damaged"),
        ("model.gguf", "", "model.gguf is damaged: it is empty"),
        (
            "notes.txt",
            "hello",
            "and no model (config.json or a .gguf file); it holds notes.txt",
        ),
    ],
)
def test_what_is_damaged_is_one_line_that_names_the_file(avalab, tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    code, _, error = avalab("show", tmp_path)
    assert (code, error.strip().count("\n")) == (2, 0), error
    assert says in error


def test_a_truncated_safetensors_file_is_named(avalab, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    code, _, error = avalab("show", model)
    assert (code, error.strip().count("\n")) == (2, 0)
    assert "model.safetensors is damaged" in error


def test_a_misspelt_path_names_the_closest_model_beside_it(avalab, model):
    code, _, error = avalab("show", model.parent / "a modle")
    assert code == 2
    assert "(models beside it: a model); did you mean 'a model'?" in error
