"""`avalab distill`: students and teachers of every kind, and one line for what is wrong."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.lab import artifacts
from avalab.lab import run as lab_run
from avalab.models import checkpoint

TINY = lab_run.ROOT / "data" / "tiny-llama"
SMALL = ["--profile", "smoke", "--rank", "2", "--tokens", "300", "--row-tokens", "128"]

pytestmark = pytest.mark.usefixtures("few_docstrings")  # all of them take seconds to compare


@pytest.fixture
def run(monkeypatch, avalab, tmp_path):
    """Exit code, standard output and standard error of `avalab distill ARGUMENTS`."""
    monkeypatch.setattr(lab_run.Run, "artifacts_dir", tmp_path)
    monkeypatch.setattr(lab_run, "ROOT", tmp_path)
    return lambda *arguments, command="distill": avalab(command, *arguments)


@pytest.fixture
def chats(tmp_path):
    line = {"kind": "instruction", "tools": [], "calls": []}
    told = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}] for n in range(12)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line | {"messages": chat}) + "\n" for chat in told))
    return path


def test_a_pruned_artefact_is_taught_by_a_model_and_merged(run, tmp_path):
    out = tmp_path / "pruned"
    arguments = ["--method", "magnitude", "--pattern", "mlp_channels", "--profile", "smoke", "--out", out]
    code, _, error = run(*arguments, "--model", TINY, command="prune")
    assert code == 0, error
    taught = ["--teacher", TINY, "--student", out, "--out", tmp_path / "taught", "--temperature", "2.0", *SMALL]
    code, text, error = run(*taught, "--epochs", "2")
    assert code == 0, error
    assert "training" in text
    found = artifacts.load_artifact(tmp_path / "taught")
    assert (found.format, found.card["recipe"][-2]["temperature"]) == ("bf16", 2.0)


def test_an_adapter_and_a_four_bit_artefact_can_be_trained_and_a_packed_one_says_what_can(run, chats, tmp_path):
    """The adapter is merged first; nothing is left where nothing was trained."""
    how = ["--data", chats, "--profile", "smoke", "--rehearsal", "0", "--rank", "2"]
    code, text, error = run(*how, "--model", TINY, "--out", tmp_path / "tuned", command="finetune")
    assert code == 0, error
    assert re.search(rf"{tmp_path}/tuned: \d\.\d MB, held-out loss \d+\.\d+ -> \d+\.\d+ nats/token$", text.strip())
    adapter = tmp_path / "tiny-llama+lora-tuned"
    code, text, error = run(*how, "--model", adapter, "--out", tmp_path / "again", command="finetune")
    assert code == 0, error
    steps = [step["step"] for step in artifacts.load_artifact(tmp_path / "again").card["recipe"]]
    assert steps[-4:] == ["finetune", "merge", "finetune", "merge"]
    for method in ("nf4", "rtn"):
        small = ["--method", method, "--profile", "smoke", "--model", TINY, "--out", tmp_path / method]
        assert run(*small, command="quantize")[0] == 0
    qlora = [*how, "--model", tmp_path / "nf4", "--method", "qlora", "--out", tmp_path / "q"]
    assert run(*qlora, command="finetune")[0] == 0
    for model, says in (("nf4", "or --method qlora for NF4 ones"), ("rtn", "train its base tiny-llama and compress")):
        code, _, error = run(*how, "--model", tmp_path / model, "--out", tmp_path / "x", command="finetune")
        assert (code, says in error, error.strip().count("\n")) == (2, True, 0), error
    assert not (tmp_path / "x").exists()


def test_examples_that_do_not_fit_and_too_few_of_them_are_said(run, chats, tmp_path):
    how = ["--data", chats, "--profile", "smoke", "--rehearsal", "0", "--model", TINY, "--out", tmp_path / "x"]
    code, _, error = run(*how, "--row-tokens", "8", command="finetune")
    assert code == 2
    assert re.search(r"no example fits into a row of 8 tokens: the shortest of 12 has \d+ tokens; raise --row-t", error)
    code, text, error = run(*how, "--limit", "500", "--rank", "1", command="finetune")
    assert code == 0, error
    assert "asked for 500 examples to learn from; 11 are there" in text


def test_recover_finds_the_base_wherever_a_run_keeps_it(run, tmp_path, monkeypatch):
    monkeypatch.setenv("AVALAB_ARTIFACTS", str(tmp_path.parent))  # whose folders are those of runs
    small, elsewhere = tmp_path / "art" / "small", tmp_path / "elsewhere" / "better"
    how = ["--method", "rtn", "--profile", "smoke", "--model", TINY, "--out", small]
    assert run(*how, command="quantize")[0] == 0
    code, text, error = run(
        small, "--profile", "smoke", "--tokens", "128", "--steps", "1", "--out", elsewhere, command="recover"
    )
    assert code == 0, error
    assert "MB, as before" in text
    assert run(tmp_path / "art" / "small", "--out", small, command="recover")[0] == 2


def test_a_four_bit_artefact_gets_an_adapter_beside_it(run, tmp_path):
    out = tmp_path / "small"
    assert run("--method", "nf4", "--profile", "smoke", "--model", TINY, "--out", out, command="quantize")[0] == 0
    code, text, error = run("--teacher", TINY, "--student", out, "--out", tmp_path / "better", *SMALL)
    assert code == 0, error
    assert str(tmp_path / "better") in text
    assert artifacts.load_artifact(tmp_path / "better").format == "peft"
    code, _, error = run("--teacher", TINY, "--student", out, "--out", tmp_path / "far" / "away", *SMALL)
    assert (code, "belongs beside it" in error) == (2, True)


def test_a_student_learns_on_policy_from_stored_targets(run, chats, tmp_path):
    how = ["--data", chats, "--own-answers", "--targets", "sampled", *SMALL]
    pruned = ["--method", "magnitude", "--profile", "smoke", "--out", tmp_path / "pruned", "--model", TINY]
    assert run(*pruned, command="prune")[0] == 0
    code, text, error = run("--teacher", TINY, "--student", tmp_path / "pruned", "--out", tmp_path / "own", *how)
    assert code == 0, error
    assert re.search(r"target bytes per token +\d", text)


class Endpoint(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"content": "forty two"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Tests are quiet."""


def test_an_endpoint_teaches_by_text_alone(run, chats, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        how = ["--teacher-model", "oracle", "--data", chats, *SMALL[:4], "--tokens", "40", "--row-tokens", "128"]
        code, _, error = run("--teacher", url, "--student", TINY, "--out", tmp_path / "told", *how)
    finally:
        server.shutdown()
        server.server_close()
    assert code == 0, error
    step = artifacts.load_artifact(tmp_path / "told").card["recipe"][-2]
    assert (step["kl"], step["cross_entropy"], step["teacher_name"]) == (0.0, 1.0, "")
    assert checkpoint.load_tokenizer(tmp_path / "told")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--teacher", "nosuch", "--student", TINY], "unknown model"),
        (["--teacher", TINY, "--student", TINY, "--targets", "oracle"], "choose one of online, sampled, topk"),
        (["--teacher", TINY, "--student", TINY, "--temperature", "0"], "temperature is 0"),
        (["--teacher", TINY, "--student", TINY, "--own-answers"], "answers need prompts"),
        (["--teacher", TINY, "--student", TINY, "--rank", "0", "--out", "/nothing/here"], "belongs beside it"),
        (["--teacher", "http://127.0.0.1:9/v1", "--student", TINY], "needs --teacher-model"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, run, tmp_path):
    code, _, error = run("--out", tmp_path / "x", *SMALL, *arguments)
    assert (code, says in error, error.strip().count("\n")) == (2, True, 0), error
