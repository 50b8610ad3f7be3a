"""Texts: the same for everyone, disjoint, and cut into windows without losing or repeating a token."""

import ast
import bz2
import hashlib
import json
import re
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avalab.data import corpora, toolbox
from avalab.data.corpora import Text, shingles, windows
from avalab.lab import assets
from avalab.lab.assets import CACHE
from avalab.lab.run import Run


@pytest.fixture(scope="module")
def evaluation(tokenizer):
    return corpora.evaluation_texts(Run("test", "smoke"), tokenizer)


@pytest.fixture(scope="module")
def calibration(tokenizer, evaluation):
    return corpora.calibration_text(tokenizer, evaluation=evaluation)


def shared(first: Text, second: Text) -> set:
    return shingles(first.content) & shingles(second.content)


def test_a_texts_identity_is_the_hash_of_its_bytes():
    """SHA-256 of "abc" as in FIPS 180-4's example."""
    assert Text("t", "abc").sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_nine_words_have_two_shingles_of_eight():
    found = shingles("One two, three four: five six seven eight NINE.")
    assert found == {
        ("one", "two", "three", "four", "five", "six", "seven", "eight"),
        ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    }


def test_a_text_shorter_than_a_shingle_is_one_and_an_empty_one_none():
    assert shingles("One two.") == {("one", "two")}
    assert shingles("...") == set()


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 9))
def test_shingles_are_the_runs_of_consecutive_words(words, length):
    runs = {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    assert shingles(" ".join(words), length) == (runs or ({tuple(words)} if words else set()))


def test_the_evaluation_topics_are_a_fixed_quarter_of_the_reference():
    """Divisible by four is a last hexadecimal digit of 0, 4, 8 or c; `printf if | sha256sum` ends in e: not chosen."""
    chosen = {name for name in topics if corpora.is_evaluation_topic(name)}
    assert len(chosen) / len(topics) == pytest.approx(0.25, abs=0.12)
    for name in topics:
        assert (name in chosen) == (hashlib.sha256(name.encode()).hexdigest()[-1] in "048c")
    assert "if" not in chosen


def test_the_evaluation_texts_are_the_same_every_time(tokenizer, evaluation):
    again = corpora.evaluation_texts(Run("test", "smoke", seed=7), tokenizer)
    assert [t.name for t in evaluation] == ["python_docs", "toolbox_calls"]
    assert [t.sha256 for t in again] == [t.sha256 for t in evaluation]


def test_evaluation_and_calibration_share_no_eight_consecutive_words(evaluation, calibration):
    for text in evaluation:
        assert shared(text, calibration) == set(), text.name


def test_function_calls_and_calibration_share_no_eight_consecutive_words(tokenizer):
    if not (CACHE / "bfcl-v4").is_dir():
        pytest.skip("the leaderboard's questions were not fetched (data/cache/bfcl-v4)")
    texts = [corpora.evaluation_text("function_calls", tokenizer)]
    assert shared(texts[0], corpora.calibration_text(tokenizer, evaluation=texts)) == set()


def test_function_calls_are_the_cases_of_two_categories_in_turn_with_their_tools(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "possible_answer").mkdir()
    for category in corpora.BFCL_CATEGORIES:
        cases = [
            {"id": f"{category}_{i}", "question": [[{"role": "user", "content": f"{category} {i}?"}]], "function": [{}]}
            for i in range(2)
        ]
        rows = [json.dumps({**case, "ground_truth": []}) for case in cases]
        for folder in (tmp_path, tmp_path / "possible_answer"):
            (folder / f"BFCL_v4_{category}.json").write_text("\n".join(rows))
    monkeypatch.setattr(assets, "fetch_asset", lambda name: tmp_path)
    said = corpora.evaluation_text("function_calls", tokenizer).content
    asked = [line for line in said.splitlines() if line.rstrip("<|im_end>").endswith("?")]
    assert [line.split("?")[0] for line in asked] == ["simple_python 0", "multiple 0", "simple_python 1", "multiple 1"]
    assert said.count(toolbox.TOOL_PROMPT[0]) == 4


def test_a_docstring_that_quotes_an_evaluation_text_is_left_out(tokenizer, calibration):
    quoted = calibration.content.split("\n\n")[0]
    smaller = corpora.calibration_text(tokenizer, evaluation=[Text("leak", quoted)])
    assert quoted in calibration.content
    assert shared(smaller, Text("leak", quoted)) == set()


def test_the_docstrings_are_those_that_a_walk_over_all_nodes_finds(tmp_path):
    """Oracle: `ast.walk`; nested definitions, handlers, cases and lambdas included, in its order."""
    body = '"""{} ' + "word " * 20 + '"""'
    source = f"""{body.format("module")}
try:
    def a(): {body.format("a")}
except* OSError:
    class B:
        {body.format("B")}
        def c(self): {body.format("c")}
else:
    f = lambda: (lambda: 0)
finally:
    while f:
        def d(): "short"
match f:
    case 1:
        async def e():
            def g(): {body.format("g")}
"""
    (tmp_path / "m.py").write_text(source)
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    expected = [docstring for docstring in found if docstring and len(docstring) >= 80]
    assert [d.split()[0] for d in expected] == ["module", "a", "B", "c", "g"]
    assert list(corpora._docstrings(tmp_path / "m.py")) == expected


def test_a_file_that_is_not_python_has_no_docstrings(tmp_path):
    (tmp_path / "template.py").write_text("class {{ name }}:")
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    assert [list(corpora._docstrings(path)) for path in tmp_path.iterdir()] == [[], []]


def test_windows_are_the_tokens_of_the_text_in_order(tokenizer):
    source = Text("python_docs", corpora.python_docs()[:4000])
    ids = tokenizer(source.content).input_ids
    cut = windows(source, tokenizer, count=3, tokens=16)
    assert cut.shape == (3, 16)
    assert cut.flatten().tolist() == ids[:48]
    assert windows(source, tokenizer, count=2, tokens=16, offset=1).equal(cut[1:])


@given(tokens=st.integers(1, 50), offset=st.integers(0, 3))
def test_every_whole_window_is_given_when_more_are_asked_for(tokenizer, tokens, offset):
    source = Text("t", "one two three four five. " * 40)
    length = len(tokenizer(source.content).input_ids)
    assert len(windows(source, tokenizer, count=10**6, tokens=tokens, offset=offset)) == length // tokens - offset


def test_a_text_shorter_than_one_window_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"text 'short' has \d+ tokens left, shorter than one window of 64"):
        windows(Text("short", "one two three"), tokenizer, count=1, tokens=64)
    with pytest.raises(ValueError, match="has 0 tokens left"):
        windows(Text("short", "one two three"), tokenizer, count=1, tokens=64, offset=5)


def test_the_profile_sizes_its_evaluation_windows(tokenizer, evaluation):
    run = Run("test", "smoke")
    for text in evaluation:
        assert corpora.profile_windows(run, text, tokenizer).shape == (8, 64)


def test_equal_seeds_give_equal_calibration_windows_and_other_seeds_others(tokenizer, calibration, monkeypatch):
    beginning = Text("calibration", calibration.content[:100_000])  # enough for an order; the rest takes seconds
    monkeypatch.setattr(corpora, "calibration_text", lambda *_, **__: beginning)
    first, same, other = (corpora.calibration_windows(Run("test", "smoke", seed), tokenizer) for seed in (1, 1, 2))
    assert first.shape == (8, 64)
    assert first.equal(same)
    assert not first.equal(other)


def test_calibration_windows_are_distinct_windows_of_the_calibration_text(tokenizer, calibration):
    everything = {tuple(w) for w in windows(calibration, tokenizer, count=10**6, tokens=64).tolist()}
    chosen = {tuple(w) for w in corpora.calibration_windows(Run("test", "smoke"), tokenizer).tolist()}
    assert len(chosen) == 8
    assert chosen <= everything


def test_too_short_a_calibration_text_is_refused_with_both_counts(tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "calibration_text", lambda *_, **__: Text("calibration", "word " * 200))
    with pytest.raises(ValueError, match=r"calibration text has \d windows of \d+ tokens, asked for 8"):
        corpora.calibration_windows(Run("test", "smoke"), tokenizer)


def test_the_encyclopedia_is_whole_paragraphs_of_leads_without_markup(tmp_path, monkeypatch):
    sentence = "The '''rook''' is a [[Chess piece|piece]] that moves along ranks and files.<ref>A book.</ref> "
    lead = "[[File:a.png|thumb|" + 200 * "x" + ".]]\n" + 4 * sentence + "\n\nToo short.\n"
    page = "<page><title>{}</title>{}<revision><text>{}</text></revision></page>"
    text = (lead + "\n== History ==\n" + 5 * sentence).replace("<", "&lt;")
    pages = page.format("Rook", "", text) + page.format("R", '<redirect title="Rook"/>', 9 * sentence.split("<")[0])
    path = tmp_path / "articles.xml.bz2"
    path.write_bytes(bz2.compress(f'<mediawiki xmlns="urn:export">{pages}</mediawiki>'.encode()))
    monkeypatch.setattr(assets, "fetch_asset", lambda name: path)
    corpora.encyclopedia.cache_clear()
    plain = "The rook is a piece that moves along ranks and files."
    assert corpora.encyclopedia() == " ".join(4 * [plain])
    corpora.encyclopedia.cache_clear()


def test_the_dialogue_asks_each_question_once_in_the_chat_format(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.yml").write_text("conversations:\n- - Hello\n  - Hi\n  - How are you?\n  - Fine.\n- - Alone\n")
    (tmp_path / "b.yml").write_text("conversations:\n- - Hello\n  - Good day\n- - What is 1?\n  - 1\n")
    monkeypatch.setattr(assets, "fetch_asset", lambda name: tmp_path)
    said = corpora.evaluation_text("dialogue", tokenizer).content
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", said)
    assert sorted(turns[i : i + 2] for i in range(0, len(turns), 2)) == [
        [("user", "Hello"), ("assistant", "Hi")],
        [("user", "How are you?"), ("assistant", "Fine.")],
        [("user", "What is 1?"), ("assistant", "1")],
    ]


def test_an_unknown_text_lists_the_known_ones(tokenizer):
    with pytest.raises(ValueError, match=r"unknown text 'novel'; choose one of python_docs, function_calls"):
        corpora.evaluation_text("novel", tokenizer)


def test_a_text_that_needs_the_hub_says_so_without_one(tokenizer, monkeypatch):
    def unreachable(*_arguments, **_options):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(assets.AssetUnavailable, match="wikitext2 needs the Hugging Face hub: offline"):
        corpora.evaluation_text("wikitext2", tokenizer)


def test_the_text_of_the_hub_is_asked_for_at_one_commit(tokenizer, monkeypatch):
    asked = {}

    def rows(*_arguments, **options):
        asked.update(options)
        return {"text": ["= Title =", "A line."]}

    monkeypatch.setattr("datasets.load_dataset", rows)
    assert corpora.evaluation_text("wikitext2", tokenizer).content == "= Title =\n\nA line."
    assert asked == {"split": "test", "revision": corpora.WIKITEXT_COMMIT}
    assert len(corpora.WIKITEXT_COMMIT) == 40


def test_windows_hold_no_token_outside_the_vocabulary(tokenizer, calibration):
    ids = windows(calibration, tokenizer, count=100, tokens=64)
    assert ids.dtype == torch.int64
    assert 0 <= ids.min() <= ids.max() < len(tokenizer)
