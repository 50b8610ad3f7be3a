"""Workers on the tiny model: beginnings that are read once, urgent requests, grammars, other engines, bad files."""

import asyncio
import json
import threading
import time

import jsonschema
import pytest

from avalab.lab.errors import InputError, MissingFile
from avalab.serve.policy.settings import Settings
from avalab.serve.workers import llama
from avalab.serve.workers.dispatch import Dispatcher
from avalab.serve.workers.pool import Served, Worker, served

BEGIN = "You help people who ask about towns and rivers. " * 12


@pytest.fixture(scope="module")
def opened(tiny_gguf):
    """The tiny model in this process, for three requests at once."""
    model = llama.Llama(tiny_gguf, context=512, slots=4, threads=1, prefill_tokens=32)
    yield model
    model.close()


def job(text: str, **more) -> dict:
    messages = [{"role": "system", "content": BEGIN}, {"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": 6, **more}


def answer(model: llama.Llama, asked: dict) -> tuple[str, dict]:
    events: list[dict] = []
    end = model.generate(asked, events.append, lambda: False)
    return "".join(event["text"] for event in events), end


def test_a_shared_beginning_is_read_once_by_requests_that_come_at_once(opened):
    """Of three prompts the beginning is read by one; the others read what is their own, to a piece of 32 tokens."""
    found: dict[int, tuple[str, dict]] = {}
    before = opened.stats()["prefilled_tokens"]
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: answer(opened, job(f"town {n}"))})) for n in range(3)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    lengths = [end["prompt_tokens"] for _, end in found.values()]
    read = opened.stats()["prefilled_tokens"] - before
    assert min(lengths) > 150
    assert read <= max(lengths) + 2 * 64
    alone = llama.Llama(opened.file, context=512, slots=1, threads=1, prefill_tokens=32, prefix_bytes=0)
    assert {n: answer(alone, job(f"town {n}"))[0] for n in range(3)} == {n: text for n, (text, _) in found.items()}
    alone.close()


def test_a_cancelled_request_ends_and_leaves_its_slot(opened):
    with pytest.raises(llama.Cancelled):
        opened.generate(job("never", max_tokens=100), lambda event: None, lambda: True)
    assert not any(slot.is_busy for slot in opened.slots)
    assert answer(opened, job("still there"))[1]["completion_tokens"] >= 1


def test_what_is_too_long_is_refused_with_both_numbers(opened):
    with pytest.raises(InputError, match=r"context_length_exceeded: \d+ tokens of prompt and 500 .* room for 512"):
        answer(opened, job("x", max_tokens=500))


def test_a_free_answer_or_a_call_is_what_a_grammar_with_refusal_allows(opened):
    functions = [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "boolean"}}}}]
    wanted = {"kind": "calls", "functions": functions, "refusal": False, "max_calls": 1}
    text, end = answer(opened, job("call", grammar=wanted, max_tokens=80))
    assert end["finish_reason"] == "stop"
    assert text.startswith("<tool_call>[")
    assert text.endswith("]</tool_call>")
    free = answer(opened, job("call", grammar={**wanted, "refusal": True}, max_tokens=20))[0]
    assert "<tool_call>" in free or "<" not in free


def test_bounds_are_added_where_there_are_none_and_never_contradict():
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string"}, "b": {"type": "string", "minLength": 100}, "c": {"enum": ["x"]},
            "d": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 9}, "e": {"type": "object"},
        },
    }  # fmt: skip
    assert llama.bounded(schema)["additionalProperties"] is False
    made = llama.bounded(schema)["properties"]
    assert made["a"]["maxLength"] == llama.LONGEST_TEXT
    assert made["b"]["maxLength"] == 100
    assert made["c"] == {"enum": ["x"]}
    assert (made["d"]["maxItems"], made["d"]["items"]["maxLength"]) == (9, 5)
    jsonschema.validate({"e": {"k": 1}, "d": ["x"] * 9}, {**schema, "properties": made})


def test_a_damaged_file_is_refused_in_one_line_and_other_models_go_on(tiny_gguf, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(tiny_gguf.read_bytes()[:5000])

    async def ask() -> tuple[str, str]:
        models = served([tiny_gguf, tmp_path / "broken.gguf"])
        dispatcher = Dispatcher(models, Settings(context=256, threads=1, max_batch_size=2))
        await dispatcher.start()
        try:
            flights = [dispatcher.submit(name, {"prompt": "a", "max_tokens": 2}) for name in ("broken", "tiny")]
            with pytest.raises(InputError, match="broken cannot be served") as caught:
                [event async for event in dispatcher.listen(flights[0])]
            events = [event async for event in dispatcher.listen(flights[1])]
        finally:
            await dispatcher.stop(1.0)
        return str(caught.value), events[-1]["event"]

    message, last = asyncio.run(ask())
    assert last == "done"
    assert "\n" not in message


def test_models_leave_when_memory_is_reduced_and_come_back_when_asked(tiny_gguf):
    async def ask() -> tuple[int, int, dict]:
        dispatcher = Dispatcher(served([tiny_gguf]), Settings(context=256, threads=1, max_batch_size=2))
        await dispatcher.start()
        try:
            for _ in range(2):
                flight = dispatcher.submit("tiny", {"prompt": "a", "max_tokens": 2})
                [event async for event in dispatcher.listen(flight)]
                held = dispatcher.cache.bytes
                left = await dispatcher.reduce_memory(0)
            return held, left, dispatcher.stats()
        finally:
            await dispatcher.stop(1.0)

    held, left, stats = asyncio.run(ask())
    assert held > 0
    assert left == 0
    assert (stats["loads"], stats["evictions"]) == (2, 2)


def test_a_request_that_comes_while_a_workers_memory_is_measured_is_not_lost(tiny_gguf, monkeypatch):
    """It was: the worker stood in its group before its model was counted as loaded."""
    monkeypatch.setattr(Worker, "pss_bytes", property(lambda self: time.sleep(0.5) or 1000))

    async def ask() -> str:
        dispatcher = Dispatcher(served([tiny_gguf]), Settings(context=256, threads=1, max_batch_size=2))
        await dispatcher.start()
        try:
            async with asyncio.timeout(60):
                flight = dispatcher.submit("tiny", {"prompt": "a", "max_tokens": 2})
                return [event async for event in dispatcher.listen(flight)][-1]["event"]
        finally:
            await dispatcher.stop(1.0)

    assert asyncio.run(ask()) == "done"


def test_an_artefact_that_is_no_gguf_is_answered_by_the_labs_engine(base):
    from avalab.serve.workers.engine import EngineModel

    model = EngineModel(base.path, context=512, threads=1)
    schema = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}
    text, end = answer(model, job("go", grammar={"kind": "json", "schema": schema}, max_tokens=60))
    jsonschema.validate(json.loads(text), schema)
    rows: list[dict] = []
    model.generate(job("hello", logprobs=2, max_tokens=3), rows.append, lambda: False)
    told = rows[-1]["logprobs"]
    assert all(row["logprob"] <= row["top_logprobs"][0]["logprob"] <= 0 for row in told)
    free, _ = answer(model, job("hello", max_tokens=12))
    if len(free) > 4:
        assert answer(model, job("hello", max_tokens=12, stop=[free[2:4]]))[0] == free[: free.index(free[2:4])]
    with pytest.raises(InputError, match="temperature"):
        answer(model, job("x", temperature=0.5))
    with pytest.raises(InputError, match="GGUF"):
        model.embed(["x"])
    model.close()
    assert end["finish_reason"] == "stop"


def test_paths_that_hold_no_model_are_named(tmp_path, tiny_gguf):
    with pytest.raises(MissingFile, match="nowhere"):
        served([tmp_path / "nowhere"])
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(InputError, match=r"text\.txt is no model"):
        served([tmp_path / "text.txt"])
    with pytest.raises(InputError, match="no artefact"):
        served([tmp_path])
    with pytest.raises(InputError, match="two models"):
        served([tiny_gguf, tiny_gguf])
    assert Served("t", tiny_gguf).bytes == tiny_gguf.stat().st_size


def test_an_address_for_others_needs_a_key():
    from avalab.serve.web import listen

    listen.check_address("127.0.0.1", "")
    listen.check_address("0.0.0.0", "key")
    for host in ("0.0.0.0", "example.org", "::"):
        with pytest.raises(InputError, match="api_key"):
            listen.check_address(host, "")
