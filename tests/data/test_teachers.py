"""Teachers: an endpoint on loopback that is down, slow, busy or mad; the cache; the limits; a local model."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from avalab.data import gates, synthesize, teachers
from avalab.data.teachers import CostLimitReached, Limits, TeacherUnavailable

ASK = [{"role": "user", "content": "Say it otherwise."}]
QUICK = Limits(requests_per_minute=1e9, attempts=3, timeout_s=2, pause_s=0.001)


def completion(text: str) -> str:
    usage = {"prompt_tokens": 10, "completion_tokens": 20}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


@pytest.fixture
def server():
    """A chat-completions server that plays the (status, body, headers, delay) of `server.script`, the last repeated."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            web.seen.append((self.path, dict(self.headers), body))
            status, text, headers, delay = web.script.pop(0) if len(web.script) > 1 else web.script[0]
            time.sleep(delay)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(text.encode())}.items():
                self.send_header(name, str(value))
            self.end_headers()
            try:
                self.wfile.write(text.encode())
            except OSError:  # the client did not wait
                self.close_connection = True

        def log_message(self, *arguments):
            return None

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.seen, web.script = [], [(200, completion("Done."), {}, 0)]
    web.url = f"http://127.0.0.1:{web.server_address[1]}/v1"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield web
    web.shutdown()
    thread.join()
    web.server_close()


def ask(server, tmp_path, limits=QUICK, sleep=time.sleep):
    return teachers.endpoint_teacher(server.url, "m", cache=tmp_path / "answers.jsonl", limits=limits, sleep=sleep)


def test_an_answer_comes_once_over_the_wire_and_then_from_the_disk(server, tmp_path):
    assert ask(server, tmp_path)(ASK) == "Done."
    assert ask(server, tmp_path)(ASK) == "Done."  # a new process would read the same file
    assert len(server.seen) == 1
    path, _, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["messages"]) == ("m", ASK)


def test_the_key_comes_from_the_environment_and_is_stored_nowhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    ask(server, tmp_path)(ASK)
    assert server.seen[0][1]["Authorization"] == "Bearer a-secret"
    assert "a-secret" not in (tmp_path / "answers.jsonl").read_text()


@pytest.mark.parametrize(
    "trouble",
    [
        (500, "oops", {}, 0),
        (429, "slow down", {}, 0),
        (200, "<html>rubbish", {}, 0),
        (200, '{"choices": []}', {}, 0),
        (200, "[1, 2]", {}, 0),
        (200, '{"choices": [{"message": {"content": null}}]}', {}, 0),
        (200, completion("   "), {}, 0),
    ],
)
def test_a_server_in_passing_trouble_is_asked_again(server, tmp_path, trouble):
    server.script = [trouble, (200, completion("At last."), {}, 0)]
    assert ask(server, tmp_path)(ASK) == "At last."
    assert len(server.seen) == 2


def test_a_slow_server_is_given_up_after_the_time_limit_and_asked_again(server, tmp_path):
    server.script = [(200, completion("Late."), {}, 0.5), (200, completion("Quick."), {}, 0)]
    limits = Limits(requests_per_minute=1e9, attempts=2, timeout_s=0.15, pause_s=0.001)
    assert ask(server, tmp_path, limits)(ASK) == "Quick."


def test_the_server_says_how_long_to_wait(server, tmp_path):
    server.script = [(429, "busy", {"Retry-After": "7"}, 0), (200, completion("Now."), {}, 0)]
    pauses = []
    assert ask(server, tmp_path, sleep=pauses.append)(ASK) == "Now."
    assert 7.0 in pauses


def test_pauses_double(server, tmp_path):
    server.script, pauses = [(503, "", {}, 0)], []
    with pytest.raises(TeacherUnavailable, match=r"3 attempts.*status 503"):
        ask(server, tmp_path, sleep=pauses.append)(ASK)
    assert [p for p in pauses if p][-2:] == [0.001, 0.002]


def test_rubbish_without_end_is_reported_with_what_came(server, tmp_path):
    server.script = [(200, "<html>rubbish", {}, 0)]
    with pytest.raises(TeacherUnavailable, match=r"not a chat completion.*<html>"):
        ask(server, tmp_path)(ASK)


def test_a_refusal_is_not_repeated(server, tmp_path):
    server.script = [(401, "no such key", {}, 0)]
    with pytest.raises(TeacherUnavailable, match=r"1 attempts.*status 401: no such key"):
        ask(server, tmp_path)(ASK)
    assert len(server.seen) == 1


def test_a_server_that_is_down_loses_nothing_and_work_resumes(server, tmp_path):
    ask(server, tmp_path)(ASK)
    down = teachers.endpoint_teacher("http://127.0.0.1:9/v1", "m", cache=tmp_path / "answers.jsonl", limits=QUICK)
    with pytest.raises(TeacherUnavailable, match=r"3 attempts.*ConnectError"):
        down(ASK)
    assert ask(server, tmp_path)(ASK) == "Done."
    assert len(server.seen) == 1


def test_a_generation_whose_server_dies_half_way_goes_on_without_asking_twice(server, tmp_path):
    reply = completion(json.dumps({"request": "Could you do this for me, please?"}))
    good, how = (200, reply, {}, 0), {"kinds": ("single_call",), "row": {}}
    server.script = [good, good, good, (503, "gone", {}, 0)]
    with pytest.raises(TeacherUnavailable, match="503"):
        list(synthesize.generate(5, 1, teacher=ask(server, tmp_path), **how))
    asked, server.script = len(server.seen), [good]
    made = list(synthesize.generate(5, 1, teacher=ask(server, tmp_path), **how))
    assert asked == 3 + QUICK.attempts
    assert len(server.seen) - asked == 2
    assert {example["messages"][-2]["content"] for example in made} == {"Could you do this for me, please?"}


def test_the_cost_limit_holds_across_restarts(server, tmp_path):
    """10 tokens in at 1,000 and 20 out at 2,000 a million: 0.05 an answer."""
    limits = Limits(requests_per_minute=1e9, price_in=1000, price_out=2000, cost=0.12, new_tokens=20)
    ask(server, tmp_path, limits)(ASK)
    assert teachers.AnswerCache(tmp_path / "answers.jsonl").spent == pytest.approx(0.05)
    ask(server, tmp_path, limits)([{"role": "user", "content": "Two"}])
    with pytest.raises(CostLimitReached, match=r"spent 0\.1000.*limit is 0\.1200"):
        ask(server, tmp_path, limits)([{"role": "user", "content": "Three"}])
    assert ask(server, tmp_path, limits)(ASK) == "Done."  # what is cached costs nothing
    assert len(server.seen) == 2


def test_requests_keep_their_distance(server, tmp_path):
    pauses = []
    teacher = ask(server, tmp_path, Limits(requests_per_minute=60), sleep=pauses.append)
    teacher(ASK)
    teacher([{"role": "user", "content": "Two"}])
    assert pauses[0] == 0
    assert 0.5 < pauses[1] <= 1


def test_a_line_cut_off_by_a_crash_is_dropped_and_the_rest_kept(server, tmp_path):
    ask(server, tmp_path)(ASK)
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert len(teachers.AnswerCache(path).texts) == 1
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_of_the_cache_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "text": "x", "cost": 0}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl:1: not an answer"):
        teachers.AnswerCache(path)


def test_a_base_url_needs_a_scheme(tmp_path):
    with pytest.raises(ValueError, match=r"must begin with http"):
        teachers.endpoint_teacher("api.example.org/v1", "m", cache=tmp_path / "a")


def test_a_local_model_answers_the_same_text_twice_and_from_the_cache(base, tmp_path):
    teacher = teachers.local_teacher(base, cache=tmp_path / "answers.jsonl", new_tokens=8)
    first = teacher(ASK)
    assert teacher(ASK) == first
    assert len(Path(tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_questions_asked_ahead_are_answered_once_and_then_known(base, tmp_path):
    questions = [[{"role": "user", "content": f"Say {word}."}] for word in ("one", "two", "one")]
    teacher = teachers.local_teacher(base, cache=tmp_path / "answers.jsonl", new_tokens=4)
    teacher.ahead(questions)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    again = teachers.local_teacher(base, cache=tmp_path / "answers.jsonl", new_tokens=4)
    assert [again(q) for q in questions] == [teacher(q) for q in questions]
    assert "_loaded" not in vars(again), "the model was loaded for answers that were known"


def test_an_answer_held_to_a_schema_begins_like_it_and_is_another_question_than_a_free_one(base, tmp_path):
    schema = {"type": "object", "properties": {"request": {"type": "string", "maxLength": 8}}, "required": ["request"]}
    held = teachers.local_teacher(base, cache=tmp_path / "answers.jsonl", new_tokens=32, schema=schema)
    answer = json.loads(held(ASK))
    assert list(answer) == ["request"]
    assert len(answer["request"]) <= 8
    assert held.__name__ == "tiny-llama (local)"
    teachers.local_teacher(base, cache=tmp_path / "answers.jsonl", new_tokens=32)(ASK)
    assert len(teachers.AnswerCache(tmp_path / "answers.jsonl").texts) == 2


def test_a_model_finds_noise_more_perplexing_than_words(base):
    score = gates.model_perplexity(base.path)
    assert score("Please book a table for four in Lisbon.") < score("qzx vkj wqp zzt kkv xqj bbn hhg")
