"""A GGUF file as teacher answers in the form asked for, once a question, and what is known already opens no file."""

import json

import pytest
from transformers import AutoTokenizer  # noqa: F401  before the package, whose type checks would meet its warnings

from avalab.data import synthesize
from avalab.data.teachers import AnswerCache
from avalab.engines import gguf, llamacpp
from avalab.engines.calling.teacher import GgufTeacher
from avalab.lab.run import ROOT

pytest.importorskip("llguidance", reason="forced tokens need llguidance: pip install -e '.[calls]'")

QUESTION = [{"role": "user", "content": "Say it."}]
TOOL = {
    "name": "play",
    "description": "Play.",
    "parameters": {"type": "object", "properties": {"loud": {"type": "boolean"}}, "required": ["loud"]},
}
EXAMPLE = {
    "kind": "single_call",
    "tools": [TOOL],
    "messages": [{"role": "user", "content": "Play it loud."}, {"role": "assistant", "content": ""}],
    "calls": [{"name": "play", "arguments": {"loud": True}}],
}


@pytest.fixture
def file(tmp_path):
    try:
        llamacpp._library()
    except Exception as error:
        pytest.skip(f"no build of llama.cpp is here: {error}")
    tiny = ROOT / "data" / "tiny-llama"
    gguf.export(tiny, tmp_path / "tiny.gguf", "f16")
    gguf.copy_beside(tiny, tmp_path)
    return tmp_path / "tiny.gguf"


def test_a_call_is_one_of_the_tools_and_is_kept(file, tmp_path):
    teacher = GgufTeacher(file, "abc", AnswerCache(tmp_path / "answers.jsonl"), synthesize.REWORDING, threads=1)
    text = teacher.calls(EXAMPLE)
    assert text.startswith('<tool_call>[{"name": "play", "arguments": {"loud": ')
    gone = GgufTeacher(tmp_path / "none.gguf", "abc", AnswerCache(tmp_path / "answers.jsonl"), synthesize.REWORDING)
    assert gone.calls(EXAMPLE) == text


def test_answers_that_the_lab_holds_are_not_asked_for_again(tmp_path):
    teacher = GgufTeacher(tmp_path / "none.gguf", "abc", AnswerCache(tmp_path / "a"), synthesize.REWORDING)
    said = json.dumps({"request": "Please say it."})
    (tmp_path / "known.jsonl").write_text(
        json.dumps({"key": teacher._said_key(QUESTION), "text": said, "cost": 0.0}) + "\n"
    )
    informed = GgufTeacher(
        tmp_path / "none.gguf", "abc", AnswerCache(tmp_path / "a", tmp_path / "known.jsonl"), synthesize.REWORDING
    )
    assert informed(QUESTION) == said
    assert not (tmp_path / "a").exists()
