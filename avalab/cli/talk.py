"""The sub-commands that let models answer: chat with one that calls tools, an ensemble of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli import options
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.lab.run import Run


def chat(
    artifact: options.ArtifactFolder,
    tools: Annotated[
        Path | None,
        typer.Option(help="JSON list of tools: name, description, parameters, callable (module:function, pure)."),
    ] = None,
    mode: Annotated[str, typer.Option(help="free (any text) or grammar (a readable call, or a text).")] = "grammar",
) -> None:
    """Chat with an artefact that really calls its tools: each call is executed in a sandbox and shown."""
    options.one_of("mode", mode, options.CHAT_MODES)
    if tools:  # what it holds is checked where it is read
        try:
            json.loads(tools.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{tools} is not JSON: {error}") from None
    found = artifacts.load_artifact(artifact)
    from avalab.measure.answers import Respondent
    from avalab.serve import chat
    from avalab.serve.tools import built_in, read_tools

    offered = read_tools(tools) if tools else built_in()
    chat.converse(Respondent(found, Run("avalab_chat").device), offered, mode=mode)


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
    profile: options.Profile = "laptop",
    seed: options.Seed = 0,
) -> None:
    """Answer a prompt with several models of one tokenizer, token by token, or by a vote over whole answers."""
    run = Run("avalab_ensemble", profile, seed)
    pools, votes = options.POOLS, options.VOTES
    if method not in (*pools, *votes):
        raise InputError(f"unknown method {method!r}; distributions: {', '.join(pools)}; answers: {', '.join(votes)}")
    if method == "cascade":
        raise InputError("a cascade of distributions reads every token with both models; use --method answer-cascade")
    members = [artifacts.load_artifact(folder) for folder in [*models, *(more or [])]]
    if method == "self-consistency" and len(members) != 1:
        raise InputError(f"self-consistency draws from one model, got {len(members)}; use vote")
    if method == "answer-cascade" and len(members) != 2:
        raise InputError(f"a cascade has a small and a large model, got {len(members)}")
    from avalab.measure.answers import Respondent
    from avalab.serve import ensemble_scores

    if method in pools:
        given = [float(part) for part in weights.split(",")] if weights else []
        text, note = _by_distributions(run, members, method, given, prompt, max_new_tokens)
    elif method == "answer-cascade":
        pair = [Respondent(member, run.device) for member in members]
        text, note = _by_cascade(pair, threshold, prompt, max_new_tokens)
    else:
        voters = [Respondent(member, run.device) for member in members]
        if method == "self-consistency":
            voters = ensemble_scores.sampling_voters(
                members[0], samples, temperature=temperature, seed=run.seed, device=run.device
            )
        text, note = _by_vote(voters, prompt, max_new_tokens)
    print(text)
    total = sum({member.sha256: member.bytes for member in members}.values())
    print(f"{method} of {', '.join(member.name for member in members)}: {total / 1e6:.1f} MB; {note}")


def _answer(respondent, prompt: str, tokens: int) -> tuple[str, str]:
    """The prompt in the respondent's chat format, and its answer."""
    from avalab.data import chats, grammars

    text = chats.prompt_text(respondent.tokenizer, [{"role": "user", "content": prompt}])
    ((_, answer),) = grammars.greedy_answers(respondent.model, respondent.tokenizer, [text], max_new_tokens=tokens)
    return text, answer


def _by_distributions(
    run: Run, members: list[Artifact], method: str, weights: list[float], prompt: str, tokens: int
) -> tuple[str, str]:
    """The answer of the pooled distributions, and the weights that they had."""
    from avalab.serve import ensemble, ensemble_scores

    pooled = ensemble.assemble(members, method, weights=weights)
    if method == "weighted" and not weights:
        fitted = ensemble_scores.fitted_weights(run, pooled.members)
        pooled = ensemble.assemble(members, method, weights=fitted)
    shares = ", ".join(f"{weight:.3f}" for weight in pooled.weights)
    return _answer(ensemble.respondent(pooled, run.device), prompt, tokens)[1], f"weights {shares}"


def _by_cascade(pair: list, threshold: float, prompt: str, tokens: int) -> tuple[str, str]:
    """The answer of the first where it is sure enough, else of the second; which it was."""
    from avalab.serve import ensemble_scores

    first, second = (respondent.artifact.name for respondent in pair)
    text, answer = _answer(pair[0], prompt, tokens)
    sure = ensemble_scores.text_confidence(pair[0], text, answer)
    if sure >= threshold:
        return answer, f"{first} was sure enough: {sure:.3f}"
    return _answer(pair[1], prompt, tokens)[1], f"{first} was unsure ({sure:.3f}), so {second} answered"


def _by_vote(voters: list, prompt: str, tokens: int) -> tuple[str, str]:
    """The answer that most of the voters gave, and their share."""
    from avalab.serve import ensemble

    given = [_answer(voter, prompt, tokens)[1] for voter in voters]
    outcome = ensemble.elect(given, ensemble.text_key)
    return given[outcome.voter], f"{outcome.agreement:.0%} of {len(given)} answers agree"
