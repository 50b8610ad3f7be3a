"""OpenAI's interface on the tiny model, asked by the `openai` client; what is wrong, and who leaves."""

import json
import random
import signal
import threading
import time

import httpx
import jsonschema
import psutil
import pytest

openai = pytest.importorskip("openai", reason="the tests ask with OpenAI's client: pip install -e '.[serve]'")

CALLS = 60  # each with its own schema; `make bench-serve` asks 1,000

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
        },
    },
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def drawn_schema(rng: random.Random) -> dict:
    kinds = [
        {"type": "string"}, {"type": "integer", "minimum": 0, "maximum": 99}, {"type": "boolean"},
        {"enum": ["red", "green", 3]}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False},
    ]  # fmt: skip
    names = rng.sample(["city", "count", "flag", "colour", "list", "inner"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: rng.choice(kinds) for name in names},
        "required": rng.sample(names, rng.randint(1, len(names))),
        "additionalProperties": False,
    }


def test_a_chat_has_text_usage_and_a_reason(client):
    made = client.chat.completions.create(model="tiny", messages=user("hello"), max_tokens=5)
    assert made.choices[0].finish_reason in ("stop", "length")
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert made.usage.completion_tokens <= 5


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = {"model": "tiny", "messages": user("tell me more"), "max_tokens": 12, "extra_body": {"cache": "off"}}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_every_forced_call_and_json_answer_is_valid_against_its_schema(client):
    rng, wrong = random.Random(0), []
    for number in range(CALLS):
        schema = drawn_schema(rng)
        asked = {"model": "tiny", "messages": user(f"case {number}"), "max_tokens": 180}
        if number % 2:
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
            made = client.chat.completions.create(**asked, response_format=form)
            values = [made.choices[0].message.content]
        else:
            tools = [{"type": "function", "function": {"name": "act", "parameters": schema}}]
            asked["messages"] = user("go")
            made = client.chat.completions.create(
                **asked, tools=tools, tool_choice="required", parallel_tool_calls=False
            )
            values = [call.function.arguments for call in made.choices[0].message.tool_calls or ()]
        try:
            assert values
            for value in values:
                jsonschema.validate(json.loads(value), schema)
        except (AssertionError, ValueError, jsonschema.ValidationError) as error:
            wrong.append((schema, values, made.choices[0].finish_reason, str(error)[:80]))
    assert not wrong, wrong[:3]


def test_a_call_in_a_stream_is_a_tool_call(client):
    chunks = client.chat.completions.create(
        model="tiny", messages=user("weather?"), tools=[WEATHER], max_tokens=160, stream=True,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )  # fmt: skip
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    called = [call for choice in deltas for call in choice.delta.tool_calls or ()]
    assert called[0].function.name == "get_weather"
    assert deltas[-1].finish_reason == "tool_calls"
    jsonschema.validate(json.loads(called[0].function.arguments), WEATHER["function"]["parameters"])


def test_results_of_tools_go_back_in_and_none_means_no_call(client):
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *user("weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    made = client.chat.completions.create(
        model="tiny", messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=8
    )
    assert made.choices[0].message.tool_calls is None


def test_log_probabilities_are_those_of_the_tokens_and_sum_to_less_than_one(client):
    made = client.chat.completions.create(
        model="tiny", messages=user("hello you"), max_tokens=4, logprobs=True, top_logprobs=3
    )
    rows = made.choices[0].logprobs.content
    assert len(rows) == made.usage.completion_tokens
    for row in rows:
        assert len(row.top_logprobs) == 3
        assert row.logprob == max(other.logprob for other in row.top_logprobs)  # greedy
        assert row.logprob <= 0


def test_completions_take_text_or_tokens_and_stop_where_they_are_told(client):
    free = client.completions.create(model="tiny", prompt="def add(a, b):", max_tokens=12)
    mark = free.choices[0].text[3:5]
    ended = client.completions.create(model="tiny", prompt="def add(a, b):", max_tokens=12, stop=[mark])
    assert mark not in ended.choices[0].text
    assert free.choices[0].text.startswith(ended.choices[0].text)
    assert client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=2).usage.prompt_tokens == 3


def test_a_seed_draws_the_same_answer_again(client):
    asked = {"model": "tiny", "messages": user("draw"), "max_tokens": 12, "temperature": 1.5}
    drawn = [client.chat.completions.create(**asked, seed=s).choices[0].message.content for s in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_embeddings_have_length_one_and_come_from_the_cache_the_second_time(client, server):
    made = client.embeddings.create(model="tiny", input=["hello", "good day"])
    assert len(made.data) == 2
    assert sum(x * x for x in made.data[0].embedding) == pytest.approx(1, abs=1e-3)
    client.embeddings.create(model="tiny", input="hello")
    assert server.client.get("/api/v1/cache/stats").json()["embeddings"]["hits"] >= 1


def test_the_same_request_is_answered_from_the_cache_and_a_restated_one_only_when_asked(server):
    first = server.ask("What is the capital of Spain?", cache="near")
    again, restated = server.ask("What is the capital of Spain?"), server.ask("what is  the capital of SPAIN?")
    near = server.ask("what is  the capital of SPAIN?", cache="near", max_tokens=8)
    assert [r.headers["x-avalab-cache"] for r in (first, again, restated)] == ["miss", "exact", "miss"]
    assert near.headers["x-avalab-cache"] in ("exact", "near")
    assert again.json()["choices"] == first.json()["choices"]


def test_identical_requests_in_flight_are_computed_once(server):
    before, found = server.metrics(), []

    def ask() -> None:
        found.append(server.ask("the same at once", max_tokens=60, cache="off").json()["choices"])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    after = server.metrics()
    assert all(choices == found[0] for choices in found)
    assert after["computed"] - before["computed"] + after["joined"] - before["joined"] == 6
    assert after["joined"] > before["joined"]


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ("{", 400, "JSON"), ("[]", 400, "object"), ("[" * 5000, 400, "deep"), ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"), ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "wizard"),
        ({"model": 3}, 400, "model"), ({"model": "gpt"}, 404, "gpt"), ({"temperature": 9}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "hot"), ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"), ({"n": 100}, 400, "n is"), ({"stop": [1]}, 400, "stop"),
        ({"tools": {"a": 1}}, 400, "tools"), ({"tools": [{"type": "x"}]}, 400, "x"),
        ({"tool_choice": "required"}, 400, "tool_choice"), ({"cache": "maybe"}, 400, "cache"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"), ({"priority": 11}, 400, "priority"),
        ({"stream": "yes"}, 400, "stream"), ({"logit_bias": {"1": 2}}, 400, "logit_bias"),
        ({"max_tokens": 5000}, 400, "context_length_exceeded"), ({"window": "none"}, 400, "window"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, ""),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}]}, 400, "f"),
    ],
)  # fmt: skip
def test_bad_input_has_a_status_and_says_what_was_wrong(server, body, status, named):
    if isinstance(body, dict):
        body = json.dumps({"model": "tiny", "messages": user("hi"), "max_tokens": 4} | body)
    found = server.client.post("/v1/chat/completions", content=body.encode(errors="surrogatepass"))
    assert found.status_code == status, found.text
    assert named in found.json()["error"]["message"]


def test_hundreds_of_broken_requests_leave_the_server_well(server):
    process, sizes, rng = psutil.Process(server.process.pid), [], random.Random(1)
    good = json.dumps({"model": "tiny", "messages": user("hi"), "max_tokens": 2})
    for _ in range(150):
        sizes.append(process.memory_info().rss)
        at = rng.randrange(len(good))
        broken = good[:at] + rng.choice(["", "{", '"', "9", "\x00", "null"]) + good[at + rng.randint(0, 9) :]
        assert server.client.post("/v1/chat/completions", content=broken).status_code in (200, 400, 404)
    assert server.ask("still there?").status_code == 200
    assert sizes[-1] - sizes[50] < 8 * 2**20


def test_a_page_elsewhere_that_points_its_name_here_is_refused(server):
    assert server.client.get("/v1/models", headers={"Host": "evil.example:8000"}).status_code == 403
    assert server.client.get("/v1/models", headers={"Host": "localhost:8000"}).status_code == 200


def test_a_slow_reader_keeps_nobody_waiting(server):
    body = {"model": "tiny", "messages": user("slow"), "max_tokens": 200, "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body):  # and reads nothing
        assert all(server.ask(f"quick {n}").status_code == 200 for n in range(3))


def test_a_client_that_leaves_a_stream_has_no_more_tokens_computed(server):
    before = server.metrics()["cancelled"]
    long = {"type": "array", "items": {"type": "boolean"}, "minItems": 300, "maxItems": 300}
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": long}}
    body = {"model": "tiny", "prompt": "a long list", "max_tokens": 700, "stream": True, "response_format": form}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    end = time.monotonic() + 20
    while time.monotonic() < end and (server.metrics()["running"] or server.metrics()["cancelled"] == before):
        time.sleep(0.05)
    assert server.metrics()["running"] == 0
    assert server.metrics()["cancelled"] == before + 1


def test_figures_page_and_log_are_there_and_ask_nothing_of_other_machines(server):
    server.ask("for the log", agent="clerk")
    page = server.client.get("/").text
    assert "http://" not in page
    assert "https://" not in page
    metrics = server.client.get("/metrics").text
    assert "avalab_requests_total" in metrics
    assert "avalab_queue" in metrics
    line = [line for line in server.lines() if line.get("agent") == "clerk"][-1]
    assert (line["status"], line["model"]) == (200, "tiny")
    assert server.client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert {"answers", "embeddings", "prefixes"} <= server.client.get("/api/v1/cache/stats").json().keys()


def test_a_key_is_asked_for_and_a_large_body_refused(started, tiny_gguf):
    with started(tiny_gguf, api_key="secret", max_body_mb=0.01) as server:
        assert server.client.get("/v1/models").status_code == 401
        assert server.client.get("/health").status_code == 200
        server.client.headers["Authorization"] = "Bearer secret"
        assert server.client.get("/v1/models").status_code == 200
        assert server.client.post("/v1/chat/completions", content=b"x" * 20_000).status_code == 413


def test_sigterm_lets_an_answer_end_and_takes_no_other(started, tiny_gguf):
    with started(tiny_gguf) as server:
        server.ask("warm")
        found = []
        asking = threading.Thread(
            target=lambda: found.append(server.ask("count", max_tokens=200, temperature=1.9, seed=1))
        )
        asking.start()
        end = time.monotonic() + 20
        while not server.metrics()["running"] and time.monotonic() < end and not found:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert found[0].status_code == 200
        assert server.process.wait(60) is not None
        with pytest.raises(httpx.TransportError):
            server.ask("too late")


def test_killed_workers_fail_nobody(started, tiny_gguf):
    with started(tiny_gguf, workers=2) as server:
        server.ask("warm")
        found, rng = [], random.Random(0)

        def ask(number: int) -> None:
            found.append(server.ask(f"question {number}", max_tokens=40, cache="off").status_code)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        [thread.start() for thread in threads]
        for _ in range(3):
            time.sleep(rng.uniform(0.1, 0.5))
            children = [
                c for c in psutil.Process(server.process.pid).children() if "worker" in " ".join(c.cmdline()[:3])
            ]
            if children:
                rng.choice(children).kill()
        [thread.join(100) for thread in threads]
        assert len(found) == 12
        assert set(found) <= {200, 503}
        assert found.count(200) >= 8
        assert server.ask("and now?").status_code == 200
