"""The sub-commands that let models answer: chat with one that calls tools, an ensemble of several."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli import options
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.lab.run import Run


def chat(
    artifact: options.ModelPath,
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
    run = Run("avalab_chat")
    found = options.in_torch(options.source_artifact(options.readable(artifact), run), "chat")
    from avalab.measure.answers import Respondent
    from avalab.serve import chat
    from avalab.serve.tools import built_in, read_tools

    offered = read_tools(tools) if tools else built_in()
    chat.converse(Respondent(found, run.device), offered, mode=mode)


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
    if not prompt.strip():
        raise InputError("the prompt is empty; say what is asked, as in --prompt 'The moon is'")
    given = _numbers(weights)
    paths = [options.readable(folder) for folder in [*models, *(more or [])]]
    if method == "self-consistency" and len(paths) != 1:
        raise InputError(f"self-consistency draws from one model, got {len(paths)}; use vote")
    if method == "answer-cascade" and len(paths) != 2:
        raise InputError(f"a cascade has a small and a large model, got {len(paths)}")
    members = [options.in_torch(options.source_artifact(path, run), "ensemble") for path in paths]
    from avalab.measure.answers import Respondent
    from avalab.serve import ensemble, ensemble_scores

    pooled = ensemble.assemble(members, method, weights=given) if method in pools else None
    asked = Asked(prompt, _room(members, prompt, max_new_tokens))
    if pooled:
        if method == "weighted" and not given:
            fitted = ensemble_scores.fitted_weights(run, pooled.members)
            pooled = ensemble.assemble(members, method, weights=fitted)
        told = _answer(ensemble.respondent(pooled, run.device), asked)
        note = "weights " + ", ".join(f"{weight:.3f}" for weight in pooled.weights)
    elif method == "answer-cascade":
        pair = [Respondent(member, run.device) for member in members]
        told, note = _by_cascade(pair, threshold, asked)
    else:
        voters = [Respondent(member, run.device) for member in members]
        if method == "self-consistency":
            voters = ensemble_scores.sampling_voters(
                members[0], samples, temperature=temperature, seed=run.seed, device=run.device
            )
        told, note = _by_vote(voters, asked)
    print(told.answer)
    if told.is_cut:
        why = "--max-new-tokens allows more" if asked.tokens == max_new_tokens else "the context is full"
        print(f"(cut off after {asked.tokens:,} tokens: {why})")
    total = sum({member.sha256: member.bytes for member in members}.values())
    print(f"{method} of {', '.join(member.name for member in members)}: {total / 1e6:.1f} MB; {note}")


@dataclass(frozen=True)
class Asked:
    """A prompt, and the most tokens of an answer to it."""

    prompt: str
    tokens: int


@dataclass(frozen=True)
class Told:
    """A prompt in a model's chat format, its answer, and whether that was cut off before its end."""

    text: str
    answer: str
    is_cut: bool


def _numbers(weights: str) -> list[float]:
    """`0.7,0.3` as numbers. Raises InputError for anything else."""
    try:
        return [float(part) for part in weights.split(",")] if weights else []
    except ValueError:
        raise InputError(f"weights are numbers with commas, such as 0.7,0.3; got {weights!r}") from None


def _room(members: list[Artifact], prompt: str, tokens: int) -> int:
    """Tokens that an answer of at most `tokens` may have in every member's context.

    Raises InputError, before a model is loaded, where the prompt leaves none.
    """
    from avalab import engines
    from avalab.data import chats
    from avalab.models import checkpoint

    for member in {member.sha256: member for member in members}.values():
        tokenizer, context = checkpoint.load_tokenizer(member), engines.facts(member.path).context
        text = chats.prompt_text(tokenizer, [{"role": "user", "content": prompt}])
        length = len(tokenizer(text, add_special_tokens=False).input_ids)
        if length >= context:
            raise InputError(
                f"the prompt takes {length:,} tokens and the context of {member.name} holds {context:,}, answer "
                "included; shorten the prompt"
            )
        tokens = min(tokens, context - length)
    return tokens


def _answer(respondent, asked: Asked) -> Told:
    """The prompt in the respondent's chat format, and its answer."""
    from avalab.data import chats, grammars

    cut: list[int] = []
    text = chats.prompt_text(respondent.tokenizer, [{"role": "user", "content": asked.prompt}])
    ((_, answer),) = grammars.greedy_answers(
        respondent.model, respondent.tokenizer, [text], max_new_tokens=asked.tokens, on_cut=cut.append
    )
    return Told(text, answer, bool(cut))


def _by_cascade(pair: list, threshold: float, asked: Asked) -> tuple[Told, str]:
    """The answer of the first where it is sure enough, else of the second; which it was."""
    from avalab.serve import ensemble_scores

    first, second = (respondent.artifact.name for respondent in pair)
    told = _answer(pair[0], asked)
    sure = ensemble_scores.text_confidence(pair[0], told.text, told.answer)
    if sure >= threshold:
        return told, f"{first} was sure enough: {sure:.3f}"
    return _answer(pair[1], asked), f"{first} was unsure ({sure:.3f}), so {second} answered"


def _by_vote(voters: list, asked: Asked) -> tuple[Told, str]:
    """The answer that most of the voters gave, and their share."""
    from avalab.serve import ensemble

    given = [_answer(voter, asked) for voter in voters]
    outcome = ensemble.elect([told.answer for told in given], ensemble.text_key)
    return given[outcome.voter], f"{outcome.agreement:.0%} of {len(given)} answers agree"
