"""The vLLM engine: artefacts in transformers' formats on a GPU, paged attention, batches of one here.

Logits are vLLM's log-probabilities of the prompt: equal to logits up to a constant a position, which no divergence or
choice depends on. A grammar is handed over as text in EBNF, which vLLM's own xgrammar compiles.

Written against vLLM 0.32's interface; never run by this project's tests, which have no GPU: they check the refusals.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from avalab.engines import engine
from avalab.engines.engine import Engine, Request
from avalab.lab.artifacts import Artifact

INSTALL = 'pip install -e ".[vllm]"'


def load(
    artifact: Artifact | Path,
    *,
    context: int = 2048,
    memory_fraction: float = 0.9,
    eager: bool = False,
    threads: int = 0,  # of a processor's engines; no meaning here
) -> Engine:
    """Open a dense, bitsandbytes or compressed-tensors artefact; `memory_fraction` of the GPU's memory is taken.

    Raises EngineUnavailable without vLLM or without a GPU.
    """
    folder = engine.folder_for("vllm", artifact)
    engine.require("vllm", "vllm", INSTALL, gpu=True)
    import vllm

    facts = engine.model_facts(folder, context=context)
    model = vllm.LLM(
        model=str(folder),
        max_model_len=facts.context,
        gpu_memory_utilization=memory_fraction,
        enforce_eager=eager,
        enable_prefix_caching=False,  # timing one prompt twice would time nothing
        max_logprobs=facts.vocabulary,
        trust_remote_code=False,
    )
    return Engine("vllm", folder, facts, {"model": model, "vocabulary": facts.vocabulary}, _new_tokens, _logits)


def _logits(state: dict, tokens: list[int]) -> Tensor:
    """vLLM tells what a prompt's tokens were expected to be from the second one on: one token more is asked for."""
    import vllm

    every = state["vocabulary"]
    parameters = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=every, logprobs=every)
    (answer,) = state["model"].generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    found = torch.full((len(rows), every), -torch.inf)
    for row, entries in zip(found, rows, strict=True):
        row[list(entries)] = torch.tensor([entry.logprob for entry in entries.values()])
    return found


def _new_tokens(state: dict, request: Request) -> list[int]:
    import vllm
    from vllm.sampling_params import StructuredOutputsParams

    options = {"stop_token_ids": list(request.stops), "ignore_eos": not request.stops}
    if request.grammar:
        options["structured_outputs"] = StructuredOutputsParams(grammar=str(request.grammar.compiled.grammar))
    parameters = vllm.SamplingParams(temperature=0, max_tokens=request.max_new_tokens, detokenize=False, **options)
    (answer,) = state["model"].generate([{"prompt_token_ids": request.prompt}], parameters, use_tqdm=False)
    tokens = [token for token in answer.outputs[0].token_ids if token not in request.stops]
    for token in tokens:  # known only together: a bench of this engine times whole generations
        request.on_token(token)
    return tokens
