"""The cache: what is known is read, what is damaged is made again, and a killed run goes on where it was."""

import json
from collections.abc import Iterator

import pytest
import torch

from avalab.lab import cache


def test_hashes_in_a_name_are_cut_and_other_parts_kept(tmp_path):
    path = cache.cache_path(tmp_path, "scores", "ab" * 32, "torch", suffix=".json")
    assert path == tmp_path / "scores-abababababababab-torch.json"


@pytest.mark.parametrize("damage", [lambda content: content[:-10], lambda content: b"", lambda content: b"?" * 99])
def test_tensors_and_documents_are_computed_once_and_again_when_damaged(tmp_path, damage):
    made = []

    def compute():
        made.append(1)
        return {"a": torch.arange(3)}

    for kept, path, found in (
        (cache.cached_tensors, tmp_path / "c" / "a.safetensors", compute),
        (cache.cached_document, tmp_path / "c" / "a.json", lambda: {"a": compute()["a"].tolist()}),
    ):
        made.clear()
        first, again = kept(path, found), kept(path, found)
        assert list(first["a"]) == list(again["a"]) == [0, 1, 2]
        assert len(made) == 1
        path.write_bytes(damage(path.read_bytes()))
        assert list(kept(path, found)["a"]) == [0, 1, 2]
        assert len(made) == 2
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"a.safetensors", "a.json"}


def numbered(wanted: list[int]) -> Iterator[tuple[int, str]]:
    return ((position, f"text {index}") for position, index in enumerate(wanted))


def killed_after_two(wanted: list[int]) -> Iterator[tuple[int, str]]:
    yield 1, f"text {wanted[1]}"  # batches come in the order of length, not of the cases
    yield 0, f"text {wanted[0]}"
    raise KeyboardInterrupt


def test_a_killed_run_asks_only_what_it_has_not_written_down(tmp_path):
    path, asked = tmp_path / "cache" / "answers.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        cache.cached_lines(path, list("abcd"), killed_after_two)

    def rest(wanted: list[int]) -> Iterator[tuple[int, str]]:
        asked.extend(wanted)
        return numbered(wanted)

    assert cache.cached_lines(path, list("abcd"), rest) == ["text 0", "text 1", "text 2", "text 3"]
    assert asked == [2, 3]


def test_a_line_that_was_cut_off_is_asked_again_and_the_file_stays_readable(tmp_path):
    path, asked = tmp_path / "answers.jsonl", []
    cache.cached_lines(path, list("abc"), numbered)
    path.write_bytes(path.read_bytes()[:-9])

    def rest(wanted: list[int]) -> Iterator[tuple[int, str]]:
        asked.extend(wanted)
        return numbered(wanted)

    for _ in range(2):  # the second time, nothing is missing
        assert cache.cached_lines(path, list("abc"), rest) == ["text 0", "text 1", "text 2"]
    assert asked == [2]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines() if line.endswith("}")] == list("abc")


def test_the_time_of_answers_is_kept_with_them_and_unknown_for_lines_without_one(tmp_path, monkeypatch):
    """Clock readings 0, 2, 2 and 5: a batch of two took 2 s, the next answer 3 s."""
    clock = iter([0.0, 2.0, 2.0, 5.0])
    monkeypatch.setattr(cache.time, "perf_counter", lambda: next(clock))
    path = tmp_path / "answers.jsonl"
    cache.cached_lines(path, list("abc"), numbered)
    assert cache.seconds_of_lines(path, list("abc")) == 5
    assert cache.seconds_of_lines(path, list("ab")) == 2
    assert cache.seconds_of_lines(path, list("abd")) is None
    path.write_text(json.dumps({"key": "a", "text": "of an older version"}) + "\n")
    assert cache.seconds_of_lines(path, ["a"]) is None


def test_what_was_computed_is_read_back_and_a_damaged_file_computed_anew(tmp_path):
    counted = iter(range(9))
    path = tmp_path / "kept.json"

    def count() -> dict:
        return {"n": next(counted)}

    assert [cache.cached_document(path, count), cache.cached_document(path, count)] == [{"n": 0}, {"n": 0}]
    path.write_text('{"n": ')
    assert cache.cached_document(path, count) == {"n": 1}
