"""On the tiny model: grammars of calls, and fast answers that are those of slow decoding, in torch and in llama.cpp."""

import json

import pytest
import torch
from transformers import AutoTokenizer  # before the package, whose type checks would meet its warnings

from avalab.data import calls
from avalab.engines import gguf, llamacpp
from avalab.engines.calling.decoder import Ask, Decoder
from avalab.engines.calling.grammar import Free, languages_for
from avalab.engines.calling.readers import LlamaCppReader, TorchReader
from avalab.lab.errors import InputError
from avalab.lab.llamacpp_library import Row
from avalab.lab.run import ROOT
from avalab.models import checkpoint
from avalab.models.stops import stop_tokens

pytest.importorskip("llguidance", reason="forced tokens need llguidance: pip install -e '.[calls]'")

TINY = ROOT / "data" / "tiny-llama"


@pytest.fixture(scope="module")
def model():
    return checkpoint.load_model(TINY, "cpu", torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def languages(model, tokenizer):
    return languages_for(tokenizer, model.config.vocab_size, stop_tokens(model, tokenizer))


def asks(tokenizer, languages, *, count=3, refusal=False):
    found = []
    for case in calls.cases("toolbox_multiple", count):
        prompt = tokenizer(calls.case_prompt(tokenizer, case), add_special_tokens=False).input_ids
        language = languages.of_calls(case.functions, refusal=refusal, max_calls=1)
        found.append(Ask(prompt, 40, languages.matcher(language)))
    return found


def answered(reader, languages, asked, **options):
    decoder = Decoder(reader, languages.stops, **options)
    return dict(decoder.answers(asked)), decoder.tally


@pytest.mark.parametrize("refusal", [False, True])
def test_torch_answers_fast_what_it_answers_slowly(model, tokenizer, languages, refusal):
    slow, before = answered(
        TorchReader(model, slots=1, context=640),
        languages,
        asks(tokenizer, languages, refusal=refusal),
        forced=False,
        guess=0,
    )
    fast, after = answered(
        TorchReader(model, slots=3, context=640), languages, asks(tokenizer, languages, refusal=refusal)
    )
    assert fast == slow
    assert after.readings < before.readings / 2


def test_llamacpp_answers_fast_what_it_answers_slowly(tmp_path, tokenizer, languages):
    try:
        llamacpp._library()
    except Exception as error:
        pytest.skip(f"no build of llama.cpp is here: {error}")
    gguf.export(TINY, tmp_path / "tiny.gguf", "f16")
    slow = LlamaCppReader(tmp_path / "tiny.gguf", slots=1, context=640, threads=1)
    fast = LlamaCppReader(tmp_path / "tiny.gguf", slots=3, context=640, threads=1)
    before, spent = answered(slow, languages, asks(tokenizer, languages), forced=False, guess=0)
    after, saved = answered(fast, languages, asks(tokenizer, languages))
    assert before == after
    assert saved.readings < spent.readings / 2
    assert saved.forced > 0


def test_slots_of_different_lengths_are_read_together_as_transformers_reads_them_alone(model):
    reader = TorchReader(model, slots=3, context=32)
    first, second = [5, 6, 7, 8, 9, 10, 11], [20, 21, 22]
    reader.read([Row(0, 0, first[:4]), Row(2, 0, second[:1])])
    a, b = reader.read([Row(0, 4, first[4:], 2), Row(2, 1, second[1:], 1)])
    with torch.inference_mode():
        for got, tokens, wanted in ((a, first, 2), (b, second, 1)):
            right = model(torch.tensor([tokens])).logits[0, -wanted:]
            torch.testing.assert_close(torch.from_numpy(got), right, atol=1e-4, rtol=1e-4)
    reader.share(0, 1, 5)
    (c,) = reader.read([Row(1, 5, first[5:], 2)])
    torch.testing.assert_close(torch.from_numpy(c), torch.from_numpy(a), atol=1e-4, rtol=1e-4)


TOOL = {
    "name": "play",
    "description": "Play.",
    "parameters": {"type": "dict", "properties": {"volume": {"type": "integer"}}, "required": ["volume"]},
}


def test_the_text_before_the_first_value_is_forced(languages, tokenizer):
    matcher = languages.matcher(languages.of_calls([TOOL], max_calls=1))
    assert tokenizer.decode(matcher.forced()).startswith('<tool_call>[{"name": "play", "arguments": {"volume"')


def test_a_call_as_the_lab_writes_it_is_in_the_language_and_another_type_is_not(languages, tokenizer):
    said = '<tool_call>[{"name": "play", "arguments": {"volume": 7}}]</tool_call>'
    for text, whole in ((said, True), (said.replace("7", '"7"'), False)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        matcher = languages.matcher(languages.of_calls([TOOL], max_calls=1))
        assert (matcher.allowed(ids) == len(ids)) == whole


def test_a_schema_that_no_grammar_holds_is_loosened_and_named(languages):
    odd = {
        "name": "odd",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "not": {"const": 1}}}},
    }
    language = languages.of_calls([TOOL, odd])
    assert language.loosened == ("odd",)
    languages.matcher(language)


def test_no_functions_are_refused(languages):
    with pytest.raises(InputError, match="no functions"):
        languages.of_calls([])


def test_free_answers_are_those_of_the_models_own_generate(model, tokenizer, languages):
    prompt = tokenizer("The capital of", add_special_tokens=False).input_ids
    found, _ = answered(TorchReader(model, slots=1, context=64), languages, [Ask(prompt, 12, Free())])
    with torch.inference_mode():
        right = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert found[0] == [token for token in right if token not in languages.stops]
    assert json.dumps(found[0])
