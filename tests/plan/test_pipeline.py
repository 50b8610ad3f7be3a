"""The whole way on the tiny model: planned, made in processes, raced, deployed, shown; and what is refused."""

import json

import pytest
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.lab.errors import InputError, MissingFile, Unavailable
from avalab.lab.run import Run
from avalab.plan import pipeline, rollout, work
from avalab.plan.policy.racing import Race
from avalab.plan.rollout import Outcome

AGENTS = """
agents = [
  { name = "a", size = "small", calls_per_minute = 1, context = 64, prompt_tokens = 8, new_tokens = 4 },
  { name = "b", size = "small", quality_floor = 0.9, critical = true, context = 64, prompt_tokens = 8, new_tokens = 4 },
]
[models]
small = "anything"
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("agents") / "agents.toml"
    path.write_text(AGENTS)
    return path


@pytest.fixture(scope="module")
def done(run, file, tmp_path_factory):
    """The pipeline, run once for this file."""
    site, said = tmp_path_factory.mktemp("site") / "site", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "results_dir", property(lambda self: tmp_path_factory.getbasetemp() / "results"))
        patch.setattr(pipeline, "SMOKE_RECIPES", ["bf16", "gguf-q8_0", "nf4"])
        of = Run("plan", "smoke")
        found = pipeline.whole(of, file, memory_bytes=2 * 2**30, site=site, say=said.append)
    return found, site, said, of


def test_every_agent_is_served_what_the_plan_gave_it_and_the_page_says_so(done):
    found, site, said, _ = done
    assert found.outcome.deployed
    page = found.page.read_text()
    for agent in found.plan.agents:
        assert rollout.artifact_of(site, agent.name).is_dir()
        assert agent.name in page
        assert found.plan.reasons[agent.name] in page
    assert [line[:2] for line in said if line[:1].isdigit()] == ["1.", "2.", "3.", "4.", "5."]
    document = json.loads((site / "plan.json").read_text())
    assert pipeline.watched(site) == (0, [])
    assert {row["quality"]["how"] for row in document["agents"]} <= {"measured", "predicted"}


def test_what_was_raced_is_evidence_and_bytes_are_those_that_were_predicted(done):
    _, _, _, of = done
    sizes = {record.subject: record.value for record in of.records if record.metric == "artifact_bytes"}
    assert sizes
    kl = [record for record in of.records if record.metric.startswith("kl_divergence")]
    assert {record.subject for record in kl} == set(sizes)


def test_a_second_chain_is_read_from_the_ledger(run, done):
    book = work.Ledger(pipeline.ledger_file(run))
    chain = book.chains()[0]
    model, _, recipe = chain.rpartition("/")
    before = [entry.finished for entry in book.chain(chain)]
    made = work.make_chain(work.Chain(model, recipe, windows=1), run, book)
    assert [entry.finished for entry in made] == before


def test_divergence_on_a_logged_prompt_is_measured_against_the_unshrunk_model(run, base, quantised):
    nf4, _ = quantised
    far, none = (work.prompt_divergences(a, base, ["What is a list?", ""], run, "torch") for a in (nf4, base))
    assert len(far) == len(none) == 1
    assert far[0] > none[0]
    assert none[0] == pytest.approx(0, abs=1e-6)


def test_what_was_never_deployed_is_not_watched_and_an_observed_load_takes_the_place_of_the_file(run, file, tmp_path):
    with pytest.raises(MissingFile, match="no plan was deployed to"):
        pipeline.watched(tmp_path)
    question = pipeline.ask(run, file, memory_bytes=2**31, observed={"a": 7.5})
    assert [agent.calls_per_minute for agent in question.agents] == [7.5, 1.0]


def test_names_in_a_page_cannot_become_markup(done, tmp_path):
    found, *_ = done
    outcome = Outcome("<script>", False, ("<b>said</b>",))
    page = pipeline.write_page(tmp_path / "p.html", found.plan, {"<i>": Race({"r": [0.1]})}, outcome).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_an_unknown_backend_and_a_missing_ray_are_refused(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="1 workers of 'threads'"):
        work.make_chains([], run, tmp_path / "l.sqlite", backend="threads")
    monkeypatch.setattr(work, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="Ray is not installed: pip install ray"):
        work.make_chains([work.Chain("m", "r")], run, tmp_path / "l.sqlite", backend="ray")


def test_a_chain_that_cannot_be_made_says_why_and_the_others_go_on(run, tmp_path):
    found = work.make_chains([work.Chain(run.model, "none-such")], run, tmp_path / "l.sqlite")
    assert found[f"{run.model}/none-such"].startswith("unknown recipe 'none-such'; choose of bf16")


def test_the_five_words_of_a_quantisation_mean_a_method_or_are_refused():
    assert work.QuantizationConfig().method == ("torchao-int8", {})
    four = work.QuantizationConfig("int", 4, calibration_samples=8, per_channel=False, symmetric=False)
    assert four.method == ("gptq", {"bits": 4, "group_size": 64, "symmetric": False})
    for words, said in [(("fp3", 3), "unknown type 'fp3'"), (("nf4", 8), "has no 8 bits"), (("int", 4, -1), "is -1")]:
        with pytest.raises(InputError, match=said):
            work.QuantizationConfig(*words)
    with pytest.raises(InputError, match="unknown strategy 'huge'; choose of small, medium, large"):
        work.optimize_for_cpu("data/tiny-llama", "huge", profile="smoke")
    with pytest.raises(InputError, match="calibration_samples is 99; profile smoke has 8"):
        work.optimize_for_cpu("data/tiny-llama", work.QuantizationConfig("int", 4, 99), profile="smoke")


def test_a_quantisation_in_five_words_makes_an_artefact(run):
    made = work.optimize_for_cpu(run.model, work.QuantizationConfig("nf4", 4), profile="smoke")
    assert made.card["recipe"][-1]["step"] == "nf4"
