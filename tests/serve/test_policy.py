"""Decisions of the server, without a model: order, batches, models in memory, windows, settings."""

import itertools
import json
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avalab.lab.errors import InputError, MissingFile
from avalab.serve.policy import batching, pressure, settings, windows
from avalab.serve.policy.models import ModelCache, NoRoom, Order, next_model, replay
from avalab.serve.policy.queue import Queue, QueueFull, Ticket, shared_prefix

MODULES = ("queue", "batching", "models", "answers", "windows", "settings", "pressure")


def ticket(key, *, model="m", priority=5, arrived=0.0, prompt="") -> Ticket:
    return Ticket(key, model, priority, arrived, prompt)


def filled(*tickets: Ticket, **more) -> Queue:
    queue = Queue(**more)
    for each in tickets:
        queue.push(each)
    return queue


@pytest.mark.parametrize("module", MODULES)
def test_a_policy_imports_no_torch(module):
    check = f"import avalab.serve.policy.{module}, sys; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


# --- the queue -------------------------------------------------------------------------------------------------------


def test_the_more_urgent_request_comes_first_and_of_equals_the_older():
    queue = filled(ticket("a", priority=5), ticket("b", priority=9), ticket("c", priority=5, arrived=-1.0))
    assert [t.key for t in queue.take(0.0, 3)] == ["b", "c", "a"]
    assert len(queue) == 0


def test_a_request_that_has_waited_passes_one_that_is_four_levels_more_urgent():
    """Ageing of 1,000 ms a level: after 5,000 ms priority 0 counts 5, and the new one of priority 4 counts 4."""
    queue = filled(ticket("old", priority=0), ticket("new", priority=4, arrived=5000.0), ageing_ms=1000)
    assert queue.take(5000.0, 1)[0].key == "old"


@given(st.integers(0, 2**32 - 1))
def test_nothing_starves_under_a_flood_of_urgent_requests(seed):
    rng, queue = random.Random(seed), Queue(ageing_ms=100)
    queue.push(ticket("low", priority=0))
    for step in range(1000):
        now = step * 10.0
        queue.push(ticket(step, priority=rng.choice([9, 10]), arrived=now))
        if "low" in [t.key for t in queue.take(now, 1)]:
            assert now <= queue.starvation_ms
            return
    raise AssertionError("it was never served")


def test_longest_shared_prefix_comes_first_inside_a_level_and_never_passes_one():
    long = "x" * 100
    queue = filled(
        ticket("other", prompt="y" * 100), ticket("same", prompt=long + "b", arrived=5.0),
        ticket("urgent", prompt="z", priority=6, arrived=9.0),
    )  # fmt: skip
    assert [t.key for t in queue.take(10.0, 3, cached=[long + "a"])] == ["urgent", "same", "other"]


def test_loaded_models_come_first_inside_a_level():
    queue = filled(ticket("b", model="B"), ticket("a", model="A", arrived=5.0))
    assert [t.key for t in queue.take(10.0, 2, loaded=["A"])] == ["a", "b"]


def test_a_batch_is_due_when_full_late_or_urgent():
    assert not Queue().is_due(0.0, 4)
    queue = filled(ticket("a"), max_wait_ms=10)
    assert not queue.is_due(5.0, 4)
    assert queue.is_due(10.0, 4)
    assert queue.is_due(5.0, 1)
    queue.push(ticket("b", priority=8))
    assert queue.is_due(5.0, 4)


def test_a_clock_that_jumps_back_makes_nobody_younger_than_new():
    queue = filled(ticket("a", arrived=1000.0))
    assert queue.level(queue.waiting[0], -5000.0) == 5


def test_a_full_queue_and_a_priority_that_is_none_are_refused():
    queue = filled(ticket("a"), limit=1)
    with pytest.raises(QueueFull, match="1 requests wait"):
        queue.push(ticket("b"))
    with pytest.raises(InputError, match="priority is 11"):
        Queue().push(ticket("c", priority=11))
    assert queue.remove("a")
    assert not queue.remove("a")


def test_shared_prefix_counts_characters():
    assert shared_prefix("abcd", "abxd") == 2
    assert shared_prefix("", "a") == 0


# --- batches ---------------------------------------------------------------------------------------------------------


def test_the_batch_shrinks_by_a_third_above_the_target_and_grows_by_one_below_it():
    batch = batching.BatchSize(most=12, target_ms=100)
    sizes = [batch.observe(200, waiting=5) for _ in range(3)]
    assert sizes == [12, 12, 8]
    assert [batch.observe(10, waiting=5) for _ in range(4)] == [8, 8, 9, 10]
    assert [batch.observe(10, waiting=0) for _ in range(2)] == [10, 10]


def test_a_batch_that_is_not_dynamic_keeps_its_size():
    batch = batching.BatchSize(most=4, target_ms=1, dynamic=False)
    assert {batch.observe(500, waiting=9) for _ in range(9)} == {4}


def test_a_prompt_is_cut_at_multiples_and_where_others_share_it():
    assert batching.pieces(0, 300, 128) == [128, 256, 300]
    assert batching.pieces(100, 300, 128, cuts=[50, 150, 400]) == [150, 228, 300]
    assert batching.pieces(5, 5, 10) == []


@given(st.integers(0, 50), st.integers(0, 500), st.integers(1, 99), st.lists(st.integers(0, 600)))
def test_pieces_end_at_the_end_and_are_no_longer_than_asked(start, length, size, cuts):
    found = [start, *batching.pieces(start, start + length, size, cuts)]
    assert found[-1] == start + length
    assert all(0 < b - a <= size for a, b in itertools.pairwise(found))


def test_the_longest_match_is_found():
    assert batching.longest_match([1, 2, 3], [[9], [1, 2], [1, 2, 4, 5], []]) == (1, 2)
    assert batching.longest_match([1], []) == (-1, 0)


def test_workers_get_processors_of_their_own_where_there_are_enough():
    assert batching.share_processors([0, 1, 2, 3, 4], 2) == [(0, 1, 2), (3, 4)]
    assert batching.share_processors([0, 1], 4) == [(0, 1)] * 4


# --- models ----------------------------------------------------------------------------------------------------------


def test_the_model_that_saves_least_loading_a_byte_leaves_first():
    cache = ModelCache(100)
    cache.add("large", 60, load_ms=100, now_ms=0)
    cache.add("small", 20, load_ms=100, now_ms=0)
    for name in ("large", "small"):
        cache.use(name, 0)
    assert cache.room_for("new", 40, now_ms=1) == ["large"]  # 100/60 of a millisecond a byte against 100/20
    assert cache.evictions == 1


def test_a_use_counts_half_after_the_half_life():
    cache = ModelCache(100, half_life_ms=1000)
    cache.add("a", 10, load_ms=10, now_ms=0)
    cache.use("a", 0)
    assert cache.worth(cache.resident["a"], 1000) == pytest.approx(0.5)


def test_pinned_and_busy_models_stay_and_too_large_ones_are_refused():
    cache = ModelCache(100)
    cache.add("pinned", 50, 1, 0, pinned=True)
    cache.add("busy", 40, 1, 0)
    cache.resident["busy"].busy = 1
    with pytest.raises(NoRoom):
        cache.room_for("new", 30, 0)
    with pytest.raises(InputError, match="max_memory_mb"):
        cache.room_for("huge", 60, 0)
    assert cache.shrink(0, 0) == []
    cache.resident["busy"].busy = 0
    assert cache.shrink(60, 0) == ["busy"]


def test_requests_are_collated_by_model_until_one_has_waited_too_long():
    waiting = [ticket("a", model="A"), ticket("b", model="B", arrived=10.0)]
    assert next_model(waiting, ["A"], 50.0, max_swap_wait_ms=100) is None
    assert next_model(waiting, ["A"], 110.0, max_swap_wait_ms=100) == "B"
    assert next_model(waiting, [], 50.0, max_swap_wait_ms=100) == "A"
    urgent = [waiting[0], ticket("u", model="B", priority=9, arrived=10.0)]
    assert next_model(urgent, ["A"], 20.0, max_swap_wait_ms=100, urgent=7) == "B"


def test_a_thrashing_trace_costs_at_most_half_the_loads_of_lru_and_the_wait_is_bounded():
    """Five models in memory for two, asked in turns: LRU loads at every request."""
    rng = random.Random(0)
    trace = [(40.0 * at, f"m{rng.randrange(5)}") for at in range(300)]
    sizes = {f"m{at}": 50 for at in range(5)}
    shared = {"max_bytes": 100, "load_ms": 100.0, "serve_ms": 20.0}
    lru = replay(trace, sizes, max_swap_wait_ms=None, **shared)
    ours = replay(trace, sizes, max_swap_wait_ms=2000.0, **shared)
    assert ours.loads <= 0.5 * lru.loads, (ours.loads, lru.loads)
    assert max(ours.waits_ms) <= 2000 + 5 * (100 + 20) + 1000
    assert max(ours.waits_ms) < max(lru.waits_ms)
    assert len(ours.waits_ms) == len(lru.waits_ms) == 300


def test_the_order_of_an_agent_is_learnt_and_given_up_when_it_does_not_pay():
    order = Order()
    for _ in range(4):
        for model in ("plan", "code"):
            order.asked("agent", model)
    assert order.propose("agent", ["code"], {"plan": 500.0}) == "plan"
    order.asked("agent", "plan")
    assert (order.saved_ms, order.wasted_ms) == (500.0, 0)
    assert order.propose("agent", ["plan"], {"code": 900.0}) == "code"
    order.evicted("code")
    assert order.wasted_ms == 900
    assert order.propose("agent", ["plan"], {"code": 900.0}) is None  # it has cost more than it saved
    assert order.propose("stranger", [], {}) is None


def test_pressure_is_read_from_what_the_kernel_says(tmp_path):
    text = "some avg10=12.50 avg60=1.00 avg300=0.00 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    assert pressure.stalled_percent(text) == 12.5
    assert pressure.used_share("900", "1000", "inactive_file 400\n") == 0.5
    assert pressure.used_share("900", "max\n") == 0
    (tmp_path / "psi").write_text(text)
    assert pressure.is_under_pressure(tmp_path / "psi", tmp_path)
    assert not pressure.is_under_pressure(tmp_path / "none", tmp_path)


# --- windows ---------------------------------------------------------------------------------------------------------


def words(text: str) -> int:
    return len(text.split())


def chat(*texts: str) -> list[dict]:
    roles = ["system", *["user", "assistant"] * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def test_windows_cover_everything_and_overlap():
    assert windows.sliding_windows(10, 4, 1) == [(0, 4), (3, 7), (6, 10)]
    assert windows.sliding_windows(3, 4, 1) == [(0, 3)]
    assert windows.sliding_windows(0, 4, 1) == []
    with pytest.raises(InputError, match="overlap"):
        windows.sliding_windows(10, 4, 4)


@given(st.integers(1, 300), st.integers(2, 40), st.data())
def test_neighbours_within_the_overlap_stand_in_one_window(length, size, data):
    overlap = data.draw(st.integers(1, size - 1))
    found = windows.sliding_windows(length, size, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(any(a <= at and at + 1 < b for a, b in found) for at in range(length - 1))


def test_a_short_chat_is_left_as_it_is():
    given = chat("be brief", "hi", "hello", "bye")
    assert windows.fitted(given, 100, count=words) == given


@pytest.mark.parametrize("mode", ["sliding_window", "compress"])
def test_system_message_and_last_request_are_never_dropped(mode):
    given = chat("TOOLS " * 10, *["old text. " * 30, "answer " * 30] * 4, "the last request")
    kept = windows.fitted(given, 60, count=words, mode=mode, overlap=8)
    assert kept[0] == given[0]
    assert kept[-1] == given[-1]
    assert windows.total(kept, words) <= 60


def test_a_sliding_window_keeps_the_newest_turns_and_the_end_of_the_one_before():
    given = chat("s", "one two three four", "five six", "seven")
    kept = windows.fitted(given, 1 + 4 + 1 + 4 + 2 + 4 + 2 + 4, count=words, mode="sliding_window", overlap=6)
    assert [m["content"] for m in kept] == ["s", "three four", "five six", "seven"]


def test_what_is_repeated_is_said_once_the_last_time():
    given = chat("s", "The sky is blue. I like it.", "ok", "The sky is  BLUE!")[1:]
    assert [m["content"] for m in windows.said_once(given)] == ["I like it.", "ok", "The sky is  BLUE!"]


def test_compression_keeps_the_sentence_that_the_request_asks_for():
    needle = "The code of the safe is 4711."
    hay = " ".join(f"Sentence {n} speaks of weather and of boats." for n in range(60))
    given = chat("s", f"{hay[:1200]} {needle} {hay[1200:]}", "I see", "What is the code of the safe?")
    kept = windows.fitted(given, 80, count=words, mode="compress")
    assert needle in "\n".join(m["content"] for m in kept)
    assert windows.total(kept, words) <= 80


def test_what_cannot_fit_is_refused_with_both_numbers():
    with pytest.raises(windows.TooLong, match=r"take 39 tokens and 20 fit"):
        windows.fitted(chat("s " * 20, "one two", "three", "x " * 11), 20, count=words)
    with pytest.raises(windows.TooLong):
        windows.fitted(chat("s", "x " * 100, "y"), 20, count=words, mode="none")


def test_a_result_never_stands_without_its_call():
    given = [*chat("s", "q", "call " * 30), {"role": "tool", "content": "r"}, {"role": "user", "content": "go"}]
    kept = windows.fitted(given, 25, count=words, mode="sliding_window")
    assert [m["role"] for m in kept] == ["system", "user"]


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_seeds_keys_are_read_from_toml_and_json_alike(tmp_path):
    rows = {
        "max_batch_size": 4, "max_wait_time_ms": 20, "dynamic_batching": False, "priority_threshold": 8,
        "max_memory_mb": 512, "cache_dir": "kept",
    }  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(rows))
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in rows.items())
    (tmp_path / "s.toml").write_text(f"[serve]\n{text}\n")
    read = [settings.read_settings(tmp_path / name) for name in ("s.json", "s.toml")]
    assert read[0] == read[1]
    assert (read[0].max_batch_size, read[0].max_bytes, read[0].dynamic_batching) == (4, 512 * 2**20, False)
    assert settings.read_settings(tmp_path / "s.json", workers=3, max_memory_mb=None).workers == 3


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ({"max_batchsize": 4}, "did you mean max_batch_size"), ({"workers": 0}, "workers is 0"),
        ({"workers": "two"}, "'two'"), ({"dynamic_batching": 1}, "bool"), ({"pinned": "a"}, "tuple"),
        ({"priority_threshold": 12.0}, "priority_threshold"), ({"max_memory_mb": "lots"}, "no size"),
    ],
)  # fmt: skip
def test_a_setting_that_is_wrong_is_named(tmp_path, rows, named):
    (tmp_path / "s.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=named):
        settings.read_settings(tmp_path / "s.json")


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(MissingFile, match=r"none\.toml"):
        settings.read_settings(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(InputError, match=r"bad\.toml"):
        settings.read_settings(tmp_path / "bad.toml")


def test_sizes_are_read_as_people_write_them():
    assert settings.size_bytes("4GiB") == 4 * 2**30
    assert settings.size_bytes("1.5 kb") == 1500
    assert settings.size_bytes("77") == 77
    with pytest.raises(InputError, match="no size"):
        settings.size_bytes("4 apples")
