"""The sub-commands that let models answer: chat with one that calls tools, an ensemble of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli.options import CHAT_MODES, POOLS, VOTES, ArtifactFolder, Profile, Seed, one_of
from avalab.lab import artifacts
from avalab.lab.run import Run
from avalab.measure import answers


def chat(
    artifact: ArtifactFolder,
    tools: Annotated[
        Path | None,
        typer.Option(help="JSON list of tools: name, description, parameters, callable (module:function, pure)."),
    ] = None,
    mode: Annotated[str, typer.Option(help="free (any text) or grammar (a readable call, or a text).")] = "grammar",
) -> None:
    """Chat with an artefact that really calls its tools: each call is executed in a sandbox and shown."""
    one_of("mode", mode, CHAT_MODES)
    if tools:
        _is_json(tools)
    found = artifacts.load_artifact(artifact)
    from avalab.serve import chat
    from avalab.serve import tools as tools_

    offered = tools_.read_tools(tools) if tools else tools_.built_in()
    respondent = answers.Respondent(found, Run("avalab_chat").device)
    chat.converse(respondent, offered, mode=mode)


def _is_json(file: Path) -> None:
    """Raise ValueError for a file of tools that is not even JSON; what it holds is checked where it is read."""
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def ensemble(
    models: Annotated[list[Path], typer.Option(help="Artefact folders, as in --models A B C; the first decides ties.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    more: Annotated[list[Path] | None, typer.Argument(help="Further artefact folders.", metavar="[MODEL]...")] = None,
    method: Annotated[
        str, typer.Option(help="mean, logits, weighted, vote, self-consistency or answer-cascade.")
    ] = "mean",
    weights: Annotated[str, typer.Option(help="Of `weighted`, such as 0.7,0.3; fitted on held-out text without.")] = "",
    threshold: Annotated[float, typer.Option(help="Below this confidence `answer-cascade` asks the second.")] = 0.5,
    samples: Annotated[int, typer.Option(min=1, help="Draws of `self-consistency`.")] = 5,
    temperature: Annotated[float, typer.Option(help="Of these draws.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 128,
    profile: Profile = "laptop",
    seed: Seed = 0,
) -> None:
    """Answer a prompt with several models of one tokenizer, token by token, or by a vote over whole answers."""
    run = Run("avalab_ensemble", profile, seed)
    if method not in (*POOLS, *VOTES):
        raise ValueError(f"unknown method {method!r}; distributions: {', '.join(POOLS)}; answers: {', '.join(VOTES)}")
    members = [artifacts.load_artifact(folder) for folder in [*models, *(more or [])]]
    ask = _asker(prompt, max_new_tokens)
    if method in VOTES:
        text, note = _by_answers(run, members, method, ask, (samples, temperature, threshold))
    else:
        text, note = _by_distributions(run, members, method, ask, weights)
    print(text)
    total = sum({member.sha256: member.bytes for member in members}.values())
    print(f"{method} of {', '.join(member.name for member in members)}: {total / 1e6:.1f} MB; {note}")


def _asker(prompt: str, tokens: int):
    """A function from a respondent to its chat prompt and its answer."""
    from avalab.data import grammars

    def ask(respondent) -> tuple[str, str]:
        messages = [{"role": "user", "content": prompt}]
        text = respondent.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ((_, answer),) = grammars.answers(respondent.model, respondent.tokenizer, [text], max_new_tokens=tokens)
        return text, answer

    return ask


def _by_distributions(run, members: list, method: str, ask, weights: str) -> tuple[str, str]:
    if method == "cascade":
        raise ValueError("a cascade of distributions reads every token with both models; use --method answer-cascade")
    from avalab.serve import ensemble, ensemble_scores

    if weights:
        about = ensemble.assemble(members, method, weights=[float(part) for part in weights.split(",")])
    else:
        about = ensemble.assemble(members, method)
    if method == "weighted" and not weights:
        about = ensemble.assemble(members, method, weights=ensemble_scores.fitted_weights(run, about.members))
    shares = ", ".join(f"{weight:.3f}" for weight in about.weights)
    return ask(ensemble.respondent(about, run.device))[1], f"weights {shares}"


def _by_answers(run, members: list, method: str, ask, settings: tuple[int, float, float]) -> tuple[str, str]:
    from avalab.measure.answers import Respondent
    from avalab.serve import ensemble, ensemble_scores

    samples, temperature, threshold = settings
    if method == "self-consistency":
        if len(members) != 1:
            raise ValueError(f"self-consistency draws from one model, got {len(members)}; use vote")
        voters = ensemble_scores.draws(members[0], samples, temperature=temperature, seed=run.seed, device=run.device)
    else:
        voters = [Respondent(member, run.device) for member in members]
    if method == "answer-cascade":
        return _cascade(voters, ask, threshold)
    answers = [ask(voter)[1] for voter in voters]
    outcome = ensemble.elect(answers, ensemble.text_key)
    return answers[outcome.voter], f"{outcome.agreement:.0%} of {len(answers)} answers agree"


def _cascade(pair: list, ask, threshold: float) -> tuple[str, str]:
    from avalab.serve import ensemble_scores

    if len(pair) != 2:
        raise ValueError(f"a cascade has a small and a large model, got {len(pair)}")
    text, answer = ask(pair[0])
    sure = ensemble_scores.text_confidence(pair[0], text, answer)
    if sure >= threshold:
        return answer, f"{pair[0].artifact.name} was sure enough: {sure:.3f}"
    return ask(pair[1])[1], f"{pair[0].artifact.name} was unsure ({sure:.3f}), so {pair[1].artifact.name} answered"
