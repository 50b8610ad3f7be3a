"""What a GGUF file says of a model: read by transformers' own loader, by pencil, and what is refused."""

import math

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from avalab.engines import checks
from avalab.engines import gguf as gguf_file
from avalab.lab import llamacpp_library
from avalab.lab.errors import Unavailable
from avalab.measure import families
from avalab.models import gguf_layout

# Its loader takes no head size from a Qwen3, and no multipliers, biases or scaled positions from any.
READ_ALONE = ["llama-tied", "llama-one-kv-head", "llama-wide-heads", "qwen2", "gemma2", "phi3", "stablelm", "gpt2"]
WRITTEN = [
    *READ_ALONE,
    *("qwen3", "gemma3", "granite", "olmo2", "mistral-sliding", "llama-biases", "llama-padded-vocabulary"),
    *("llama-rope-llama3", "llama-rope-linear", "llama-rope-yarn"),
]
CONTEXT = families.SHAPE["max_position_embeddings"]
PROMPT = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The function from a family to its source folder and its float32 file, alone in another folder; made once."""
    made = {}

    def export(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = families.make_model(name, folder / "source")
            (folder / "alone").mkdir()
            gguf_file.export(source, folder / "alone" / "m.gguf", "f32")
            made[name] = source, folder / "alone" / "m.gguf"
        return made[name]

    return export


def header(file) -> dict:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(PROMPT, use_cache=False).logits[0]


def plain(source) -> torch.nn.Module:
    """Plain transformers, with attention that knows every part of a family."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", READ_ALONE)
def test_transformers_own_loader_reads_the_file_alone_as_the_same_model(name, exported):
    """Sizes, names, order of rows and gains are right for a reader that is not ours."""
    source, file = exported(name)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    if name == "gemma2":
        config.query_pre_attn_scalar = 64  # which is no key of GGUF: readers scale by the head size
    options = {"gguf_file": file.name, "dtype": torch.float32, "attn_implementation": "eager", "config": config}
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    torch.testing.assert_close(logits(theirs), logits(plain(source)), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_is_read_back_as_the_model_of_its_folder(name, exported):
    source, file = exported(name)
    back = gguf_layout.read_back(file, AutoConfig.from_pretrained(source))
    torch.testing.assert_close(logits(back), logits(plain(source)), atol=1e-3, rtol=1e-4)


@pytest.fixture(scope="module")
def library():
    """llama.cpp, in whichever build is here."""
    try:
        return llamacpp_library.opened(llamacpp_library.find())
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [*WRITTEN, "smollm3"])
def test_llama_cpp_computes_from_the_file_what_transformers_computes_from_the_folder(name, exported, library):
    """Weights in float32; within 0.5 % of the logits' spread: its cache has 16 bits and its GELU is a table."""
    source, file = exported(name)
    model = llamacpp_library.Model(library, file, context=64, batch=64, threads=1)
    found = torch.from_numpy(model.read(PROMPT[0].tolist(), every=True).copy())
    assert checks.difference(found, logits(plain(source))) < 5e-3


def test_rows_that_turn_together_become_neighbours_and_go_back():
    """Two heads of four rows: row i turns with row i + 2."""
    rows = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13]).float()
    turned = gguf_layout.interleaved(rows, 2)
    assert turned.tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    assert torch.equal(gguf_layout.apart(turned, 2), rows)


def test_gains_of_gemma_are_stored_with_their_one(exported):
    source, file = exported("gemma3")
    stored = dict(gguf_layout.stored_tensors(file))
    gain = plain(source).model.norm.weight
    assert torch.equal(stored["output_norm.weight"], gain.detach() + 1)


def test_llama_3s_factors_divide_high_frequencies_by_one_and_low_ones_by_the_factor(exported):
    """Wavelengths below 64 / 4 tokens stay, above 64 / 1 are stretched by 4."""
    _, file = exported("llama-rope-llama3")
    factors = dict(gguf_layout.stored_tensors(file))["rope_freqs.weight"]
    lengths = 2 * math.pi * 10_000 ** (torch.arange(0, 32, 2) / 32)
    assert torch.allclose(factors[lengths < 16], torch.tensor(1.0))
    assert torch.allclose(factors[lengths > 64], torch.tensor(4.0))
    between = factors[(lengths > 16) & (lengths < 64)]
    assert ((between > 1) & (between < 4)).all()
    assert "llama.rope.scaling.type" not in header(file)  # readers would scale once more


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama-rope-linear", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
        (
            "llama-rope-yarn",
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
                "llama.rope.scaling.attn_factor": 1.0,
            },
        ),
        (
            "granite",
            {
                "granite.embedding_scale": 6.0,
                "granite.logit_scale": 2.0,
                "granite.residual_scale": 0.5,
                "granite.attention.scale": 0.25,
            },
        ),
        ("gemma2", {"gemma2.attention.sliding_window": families.WINDOW, "gemma2.attn_logit_softcapping": 50.0}),
        ("gemma3", {"gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 1e4, "gemma3.context_length": CONTEXT}),
        ("stablelm", {"stablelm.rope.dimension_count": 8, "stablelm.use_parallel_residual": False}),
        ("mistral-sliding", {"general.architecture": "llama", "llama.context_length": families.WINDOW}),
        ("llama-wide-heads", {"llama.attention.key_length": 64, "llama.rope.dimension_count": 64}),
    ],
)
def test_the_header_says_what_the_configuration_says(name, says, exported):
    """Keys of the GGUF specification; a window that llama.cpp's Llama does not know ends the context."""
    found = header(exported(name)[1])
    assert {key: found.get(key) for key in says} == says


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("qwen3-moe", {}, "is a qwen3_moe; GGUF is written for llama, mistral, .*what remains: the engine torch"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "rotary embeddings in other layers"),
        ("qwen3", {"attention_bias": True}, r"has biases \(attention_bias\)"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "queries scaled by 100 instead of its head size 64"),
        ("olmo2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of type 'dynamic'"),
        ("stablelm", {"use_parallel_residual": True}, "side by side"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "another scale of attention"),
    ],
)
def test_what_readers_would_not_compute_is_refused_in_one_line(name, changes, says):
    config = families.configuration(families.FAMILIES[name])
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=says) as caught:
        gguf_layout.family_of(config, "mine")
    assert str(caught.value).startswith("mine ")
    assert "\n" not in str(caught.value)


def test_smollm3_with_its_own_layers_is_written_and_read_back(tmp_path):
    """Every fourth of four layers has no rotary embedding."""
    row = families.Family("SmolLM3Config", {"num_hidden_layers": 4, "tie_word_embeddings": True})
    families._write_base(row, tmp_path / "s", 0)
    gguf_file.export(tmp_path / "s", tmp_path / "m.gguf", "f32")
    back = gguf_layout.read_back(tmp_path / "m.gguf", AutoConfig.from_pretrained(tmp_path / "s"))
    torch.testing.assert_close(logits(back), logits(plain(tmp_path / "s")), atol=1e-3, rtol=1e-4)


def test_phi_3s_long_and_short_factors_are_tensors_and_its_attention_is_scaled(tmp_path):
    """sqrt(1 + ln(context / 64) / ln 64)."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 64
    row = families.Family("Phi3Config", {"rope_parameters": rope, "original_max_position_embeddings": 64})
    families._write_base(row, tmp_path / "p", 0)
    gguf_file.export(tmp_path / "p", tmp_path / "m.gguf", "f32")
    stored, found = dict(gguf_layout.stored_tensors(tmp_path / "m.gguf")), header(tmp_path / "m.gguf")
    assert stored["rope_factors_long.weight"].tolist() == [2.0] * 16
    assert stored["rope_factors_short.weight"].tolist() == [1.0] * 16
    expected = math.sqrt(1 + math.log(CONTEXT / 64) / math.log(64))
    assert found["phi3.rope.scaling.attn_factor"] == pytest.approx(expected)


def test_a_file_that_is_not_its_configurations_is_refused_by_tensor(exported):
    source, file = exported("llama-tied")
    config = AutoConfig.from_pretrained(source)
    config.intermediate_size = 128
    with pytest.raises(
        ValueError, match=r"m\.gguf: tensor blk\.0\.ffn_gate\.weight is \(256, 128\), its configuration"
    ):
        gguf_layout.read_back(file, config)


def test_the_bytes_of_the_tensors_and_the_header_are_the_file(base):
    file = next(gguf_file.write(base, "q8_0").path.glob("*.gguf"))
    found = gguf_layout.tensor_bytes(file)
    assert {name: kind for name, (kind, _) in found.items()} == gguf_layout.read_header(file).types
    held = sum(size for _, size in found.values())
    assert 0.9 * file.stat().st_size < held < file.stat().st_size
