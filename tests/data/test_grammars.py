"""Constrained decoding: whatever is sampled under a grammar can be read, and satisfies the functions' schemas."""

import json

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from avalab.data import grammars
from avalab.data.calls import Case, check_calls, parse_calls
from avalab.data.grammars import (
    call_grammar,
    grammar_compiler,
    greedy_answers,
    left_padded,
    logits_mask,
)
from avalab.lab import assets
from avalab.lab.run import ROOT
from avalab.lab.schemas import to_json_schema
from avalab.models.stops import stop_tokens

ADD = {
    "name": "math.add",
    "parameters": {
        "type": "dict",
        "properties": {"a": {"type": "integer"}, "b": {"type": "float"}},
        "required": ["a", "b"],
    },
}
BOOK = {
    "name": "book",
    "parameters": {
        "type": "dict",
        "properties": {
            "room": {"type": "string", "enum": ["small", "large"]},
            "guests": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
            "span": {"type": "tuple", "items": {"type": "integer"}, "maxItems": 2},
            "extras": {"type": "dict", "properties": {"sea": {"type": "boolean"}}, "required": ["sea"]},
            "stay": {
                "type": "array",
                "maxItems": 1,
                "items": {"type": "dict", "properties": {"n": {"type": "integer"}}},
            },
        },
        "required": ["room", "extras"],
    },
}
NOW = {"name": "now", "parameters": {"type": "dict", "properties": {}, "required": []}}
NOT_A = {"not": {"const": "a"}, "type": "string"}
ODD = {
    "name": "odd",
    "parameters": {
        "type": "object",
        "properties": {"tags": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}, "not": NOT_A},
        "required": ["tags"],
    },
}
UNTRANSLATABLE = {
    "name": "remote",
    "parameters": {"type": "object", "properties": {"x": {"$ref": "#/missing/place"}}, "required": ["x"]},
}


@pytest.fixture(scope="module")
def tiny_compiler(tokenizer):
    return grammar_compiler(tokenizer, len(tokenizer))


def ending_bias(tokenizer, size):
    """Likes tokens that close something, so that a random text ends."""
    bias = torch.zeros(size)
    for text, token in tokenizer.get_vocab().items():
        if text and set(text) <= set('"}]'):
            bias[token] = 4.0
    bias[list(stop_tokens(tokenizer))] = 4.0
    return bias


def sample(tokenizer, batch, seed, size, steps=150):
    """Sample every row under its grammar from random logits; rows that do not end in time come back as None."""
    generator = torch.Generator().manual_seed(seed)
    mask, stop, bias = logits_mask(batch), stop_tokens(tokenizer)[0], ending_bias(tokenizer, size)
    tokens, done = torch.full((len(batch), 1), stop), [False] * len(batch)
    for _ in range(steps):
        logits = mask(tokens, torch.randn(len(batch), size, generator=generator) * 2 + bias)
        chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        chosen = torch.where(torch.tensor(done)[:, None], stop, chosen)
        done = [was or token == stop for was, token in zip(done, chosen.flatten().tolist(), strict=True)]
        tokens = torch.cat([tokens, chosen], 1)
        if all(done):
            break
    texts = tokenizer.batch_decode([[t for t in row if t != stop] for row in tokens.tolist()])
    return [text if ended else None for text, ended in zip(texts, done, strict=True)]


def assert_valid(text, functions, *, refusal):
    schemas = {f["name"]: to_json_schema(f) for f in functions}
    if "<tool_call>" not in text:
        assert refusal
        return 0
    calls = parse_calls(text)
    assert isinstance(calls, list), text
    for call in calls:
        jsonschema.validate(call.arguments, schemas[call.name])
    return len(calls)


@pytest.mark.parametrize("refusal", [True, False])
def test_whatever_is_sampled_can_be_read_and_satisfies_the_schema(tokenizer, tiny_compiler, refusal):
    sets = [[ADD], [BOOK], [ADD, BOOK, NOW], [NOW]] * 8
    batch = [call_grammar(tiny_compiler, functions, refusal=refusal) for functions in sets]
    texts = sample(tokenizer, batch, seed=0, size=len(tokenizer))
    counts = [assert_valid(t, f, refusal=refusal) for t, f in zip(texts, sets, strict=True) if t is not None]
    assert len(counts) >= 24
    assert refusal or (min(counts) >= 1 and max(counts) > 1)


def test_the_same_holds_for_the_embedded_models_tokenizer():
    folder = assets.CACHE / "smollm2-135m-instruct-gguf"
    artifact = ROOT / "artifacts" / "laptop" / "smollm2-135m-instruct"
    if not (folder.exists() and (artifact / "tokenizer.json").exists()):
        pytest.skip("the embedded model has not been fetched")
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    size = 49152
    assert tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer)[0]) == "<|im_end|>"
    batch = [call_grammar(grammar_compiler(tokenizer, size), [ADD, BOOK], refusal=False)] * 4
    texts = [text for text in sample(tokenizer, batch, seed=1, size=size) if text is not None]
    assert texts
    assert all(assert_valid(text, [ADD, BOOK], refusal=False) for text in texts)


def accepts(grammar, text):
    matcher = grammars.xgrammar.GrammarMatcher(grammar.compiled)
    return matcher.accept_string(text) and matcher.is_completed()


def call_text(*calls):
    return f"<tool_call>{json.dumps([{'name': name, 'arguments': arguments} for name, arguments in calls])}</tool_call>"


def test_calls_to_the_offered_functions_are_accepted_and_nothing_else_that_looks_like_one(tiny_compiler):
    grammar = call_grammar(tiny_compiler, [ADD, NOW], max_calls=2)
    assert accepts(grammar, call_text(("math.add", {"a": 1, "b": -2.5e3})))
    assert accepts(grammar, call_text(("now", {}), ("math.add", {"a": 1, "b": 2})))
    assert not accepts(grammar, call_text(("other", {})))
    assert not accepts(grammar, call_text(("math.add", {"a": 1})))
    assert not accepts(grammar, call_text(("math.add", {"a": 1.5, "b": 2})))
    assert not accepts(grammar, call_text(("now", {}), ("now", {}), ("now", {})))
    assert not accepts(grammar, call_text())
    assert not accepts(grammar, f"Sure: {call_text(('now', {}))}")


def test_a_refusal_is_any_text_without_the_marker_unless_it_is_forbidden(tiny_compiler):
    allowed = call_grammar(tiny_compiler, [NOW])
    for text in ("", "No function fits.", "1 < 2 <tool_cal <t", '{"a": 1}\nünï'):
        assert accepts(allowed, text)
        assert not accepts(call_grammar(tiny_compiler, [NOW], refusal=False), text)
    assert not accepts(allowed, "I would call <tool_call>")
    assert accepts(call_grammar(tiny_compiler, []), "There are no functions.")
    with pytest.raises(ValueError, match="no functions and no refusal"):
        call_grammar(tiny_compiler, [], refusal=False)


def test_a_refusal_ends_after_its_token_limit(tokenizer, tiny_compiler, monkeypatch):
    monkeypatch.setattr(grammars, "REFUSAL_TOKENS", 5)
    fresh = grammar_compiler(tokenizer, len(tokenizer))
    mask, stop = logits_mask([call_grammar(fresh, [])]), stop_tokens(tokenizer)[0]
    never_stop = torch.zeros(1, len(tokenizer))
    never_stop[0, stop] = -100
    tokens = torch.tensor([[stop]])
    for _ in range(8):
        chosen = mask(tokens, never_stop.clone()).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], 1)
    assert tokens[0, 6] == stop


def _mean_of(kind: str) -> dict:
    values = {"type": "array", "items": {"type": kind}}
    settings = {"type": "dict", "properties": {}, "additionalProperties": True}
    fields = {"values": values, "places": {"type": "integer"}, "settings": settings}
    return {"name": "mean", "parameters": {"type": "dict", "properties": fields, "required": ["values"]}}


def test_a_list_of_python_floats_has_decimal_points_and_one_of_numbers_need_not(tiny_compiler):
    whole, decimal = call_text(("mean", {"values": [12, -3]})), call_text(("mean", {"values": [12.0, -0.5]}))
    floats, numbers = (call_grammar(tiny_compiler, [_mean_of(kind)]) for kind in ("float", "number"))
    assert [accepts(floats, text) for text in (decimal, whole)] == [True, False]
    assert [accepts(numbers, text) for text in (decimal, whole)] == [True, True]
    assert accepts(floats, call_text(("mean", {"values": [1.0], "places": 2, "settings": {"seed": 3}})))
    assert accepts(floats, "Nothing fits.")


def test_what_a_grammar_cannot_enforce_is_loosened_and_named(tiny_compiler):
    odd = call_grammar(tiny_compiler, [ADD, ODD], refusal=False)
    assert odd.loosened == ("odd",)
    assert accepts(odd, call_text(("odd", {"tags": [1, 1]})))
    assert not accepts(odd, call_text(("math.add", {"a": "1", "b": 2})))  # the others stay strict
    remote = call_grammar(tiny_compiler, [UNTRANSLATABLE, ADD], refusal=False)
    assert remote.loosened == ("remote",)
    assert accepts(remote, call_text(("remote", {"x": [1]})))
    assert call_grammar(tiny_compiler, [ADD]).loosened == ()


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, 1),
        ({"type": "number", "multipleOf": 0.5}, 1.3),
        ({"type": "string", "pattern": "b"}, "a"),
        ({"type": "array", "contains": {"const": 1}}, [2]),
        ({"if": {"const": 1}, "then": False}, 1),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, {"a": 1}),
    ],
)
def test_every_word_that_is_not_enforced_is_loosened(tiny_compiler, schema, value):
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}, "required": ["x"]}}
    grammar = call_grammar(tiny_compiler, [function], refusal=False)
    assert grammar.loosened == ("f",)
    assert accepts(grammar, call_text(("f", {"x": value})))


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "integer", "minimum": 3, "maximum": 9}, 3, 10),
        ({"type": "integer", "multipleOf": 2}, 4, 3),
        ({"type": "string", "pattern": "^a+$"}, "aa", "b"),
        ({"type": "string", "format": "date"}, "2026-01-31", "tomorrow"),
        ({"type": ["string", "null"]}, None, 1),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, 3, 1),
        ({"type": "array"}, [1, "a"], {}),
        ({"type": "object"}, {"any": [1]}, []),
        ({}, {"any": [1]}, None),
    ],
)
def test_every_other_word_is_enforced(tiny_compiler, schema, right, wrong):
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}, "required": ["x"]}}
    grammar = call_grammar(tiny_compiler, [function], refusal=False)
    assert grammar.loosened == ()
    assert accepts(grammar, call_text(("f", {"x": right})))
    assert wrong is None or not accepts(grammar, call_text(("f", {"x": wrong})))


def test_a_grammar_is_compiled_once_for_equal_functions(tiny_compiler):
    copy = json.loads(json.dumps([ADD, BOOK]))
    assert call_grammar(tiny_compiler, [ADD, BOOK]) is call_grammar(tiny_compiler, copy)
    assert call_grammar(tiny_compiler, [ADD, BOOK]) is not call_grammar(tiny_compiler, [BOOK, ADD])


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPTS = ["short", "a much longer prompt than the first", "one of middle length", "x"]


@pytest.mark.parametrize("mode", ["free", "refusal", "calls"])
def test_batched_answers_are_those_of_transformers_generate(model, tokenizer, tiny_compiler, mode):
    """Also when rows end at different times, in batches of every size: greedy decoding does not depend on the batch."""
    functions = [ADD, NOW, BOOK, NOW]
    chosen = [call_grammar(tiny_compiler, [f], refusal=mode == "refusal", max_calls=1) for f in functions]
    chosen = None if mode == "free" else chosen
    stops = list(stop_tokens(tokenizer))
    expected = []
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, eos_token_id=stops,
            pad_token_id=stops[0], logits_processor=[logits_mask([chosen[index]])] if chosen else [],
        )  # fmt: skip
        expected.append([token for token in output[0, ids.shape[1] :].tolist() if token not in stops])
    for batch_size in (1, 3, 4):
        found = dict(
            greedy_answers(model, tokenizer, PROMPTS, grammars=chosen, max_new_tokens=40, batch_size=batch_size)
        )
        assert sorted(found) == [0, 1, 2, 3]
        for index, tokens in enumerate(expected):
            # With calls only, the forced beginning is read with the prompt, in the tokenizer's own tokens: a random
            # model goes on differently from there.
            assert found[index].startswith(tokenizer.decode(tokens)) or mode == "calls"
    if mode == "calls":
        assert found[1] == found[3] == call_text(("now", {}))


def test_an_answer_under_a_grammar_goes_through_the_checker(model, tokenizer, tiny_compiler):
    case = Case("x", "simple_python", [], [NOW], [{"now": {}}])
    forced = [call_grammar(tiny_compiler, [NOW], refusal=False, max_calls=1)]
    ((_, text),) = greedy_answers(model, tokenizer, ["What time is it?"], grammars=forced)
    assert check_calls(case, parse_calls(text)).correct


def test_padding_goes_to_the_left_and_is_not_seen():
    ids, seen = left_padded([[5], [6, 7]], 0)
    assert ids.tolist() == [[0, 5], [6, 7]]
    assert seen.tolist() == [[0, 1], [1, 1]]


def test_a_processor_refuses_another_batch_size(tokenizer, tiny_compiler):
    mask = logits_mask([call_grammar(tiny_compiler, [NOW])])
    with pytest.raises(ValueError, match="batch of 2 rows for 1 grammars"):
        mask(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, len(tokenizer)))
