"""Well-formed function calls, or plain text, by constrained decoding.

1. The functions on offer become a grammar: `<tool_call>[{"name": ..., "arguments": {...}}, ...]</tool_call>` with the
   arguments of each call in its function's JSON Schema, or (with `refusal`) any text that does not contain
   `<tool_call>`, up to REFUSAL_TOKENS tokens long, so that "no function fits" can still be said.
2. xgrammar compiles it against the tokenizer's vocabulary, once for each set of functions.
3. During decoding, the logits of every token that cannot continue the text are set to minus infinity, row by row of
   the batch.

A grammar makes a call readable, not right; it follows the order of the schema. `schemas.Rewriting` puts a schema into
words that xgrammar enforces; what has none is left out: the function is then named in `CallGrammar.loosened`, and the
caller can count it.

Source: Dong et al., "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models" (2024).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xgrammar
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from xgrammar import Grammar

from avalab.lab import schemas
from avalab.lab.errors import InputError
from avalab.models.stops import padding_token, stop_tokens

BEGIN, END = "<tool_call>", "</tool_call>"

MAX_CALLS = 8

REFUSAL_TOKENS = 48  # a text without a call ends here: enough to say why, and no time is spent on more

FLOAT = (  # beside xgrammar's own rules: a number with a decimal point
    "basic_float ::= ((basic_number_1 basic_number_2 basic_float_1 basic_number_5))\n"
    'basic_float_1 ::= (("." basic_number_digits{1, -1}))\n'
)


@dataclass(frozen=True)
class CallGrammar:
    """A compiled grammar, and the functions whose schema had to be loosened to get it."""

    compiled: xgrammar.CompiledGrammar
    loosened: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiler:
    """xgrammar's compiler for one tokenizer, with the grammars it has made."""

    engine: xgrammar.GrammarCompiler
    made: dict[str, CallGrammar] = field(default_factory=dict)


def grammar_compiler(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, stops: Sequence[int] | None = None
) -> Compiler:
    """A compiler for models with this tokenizer and `vocabulary` logits (the model's rows, padding included).

    `stops` are the tokens that end the model's answers (`models.stops`), else those that the tokenizer knows of.
    """
    stops = list(stop_tokens(tokenizer) if stops is None else stops)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=stops)
    return Compiler(xgrammar.GrammarCompiler(info, max_threads=1))


def call_grammar(
    compiler: Compiler, functions: list[dict[str, Any]], *, refusal: bool = True, max_calls: int = MAX_CALLS
) -> CallGrammar:
    """The grammar of 1 to `max_calls` calls to `functions`, or with `refusal` of a text without a call.

    `functions` have `name` and `parameters` (BFCL's dialect or JSON Schema). Raises ValueError when nothing is allowed.
    """
    if not functions and not refusal:
        raise InputError("no functions and no refusal: nothing could be answered; pass one or allow the other")
    key = json.dumps([functions, refusal, max_calls], sort_keys=True)
    if key not in compiler.made:
        compiler.made[key] = _compile(compiler.engine, functions, refusal=refusal, max_calls=max_calls)
    return compiler.made[key]


def _compile(engine: xgrammar.GrammarCompiler, functions: list[dict], *, refusal: bool, max_calls: int) -> CallGrammar:
    described: dict[str, dict] = {}
    loosened, defs = set(), {}
    for index, function in enumerate(functions):
        rewriting = schemas.Rewriting(schemas.to_json_schema(function), prefix=f"{index}_")
        try:
            schema = rewriting.whole()
            _from_schema({**schema, "$defs": rewriting.defs})
            defs |= rewriting.defs
        except (RuntimeError, InputError):  # a pattern or reference that cannot be translated
            schema, rewriting.exact = {"type": "object"}, False
        described[function["name"]] = schema
        loosened |= set() if rewriting.exact else {function["name"]}
    grammars = []
    if functions:
        one_of = [
            {
                "type": "object",
                "properties": {"name": schemas.exactly(name), "arguments": schema},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, schema in described.items()
        ]
        listed = {"type": "array", "items": {"anyOf": one_of}, "minItems": 1, "maxItems": max_calls, "$defs": defs}
        begin, end = (Grammar.from_ebnf(f'root ::= "{text}"') for text in (BEGIN, END))
        calls = Grammar.concat(begin, _from_schema(listed), end)
        only_floats = _declared(functions) & {"float", "number"} == {"float"}
        grammars.append(with_fractions(calls) if only_floats else calls)
    if refusal:
        text = {"type": "any_text", "excludes": [BEGIN], "max_tokens": REFUSAL_TOKENS}
        grammars.append(Grammar.from_structural_tag({"type": "structural_tag", "format": text}))
    whole = Grammar.union(*grammars) if len(grammars) > 1 else grammars[0]
    return CallGrammar(engine.compile_grammar(whole), tuple(sorted(loosened)))


def with_fractions(grammar: Grammar) -> Grammar:
    """The grammar with a decimal point in every number of a list: [12.0] where [12] was allowed, too.

    Python's type float, which JSON Schema does not have, is written so. A checker of types takes a whole number for a
    float argument, but not inside a list.
    """
    rules = re.sub(r'("\[" |::= \(\(", " )basic_number\b', r"\1basic_float", str(grammar))
    return Grammar.from_ebnf(rules + FLOAT)


def _declared(schema: Any) -> set[str]:
    """The names of types that stand anywhere in these functions."""
    if isinstance(schema, list):
        return set().union(*map(_declared, schema))
    if not isinstance(schema, dict):
        return set()
    own = {schema["type"]} if isinstance(schema.get("type"), str) else set()
    return own.union(*map(_declared, schema.values()))


def _from_schema(schema: dict) -> Grammar:
    """Fixed spaces keep answers short; strict mode would forbid the items of a list that declares none."""
    return Grammar.from_json_schema(schema, any_whitespace=False, strict_mode=False)


def logits_mask(grammars: list[CallGrammar]) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor for one `generate` call: row i of the batch follows `grammars[i]`.

    Returns a function of (token ids so far, logits `batch vocab`) for `generate(logits_processor=[...])`. It keeps
    the state of the rows, so every `generate` call needs its own.
    """
    matchers = [xgrammar.GrammarMatcher(grammar.compiled) for grammar in grammars]
    started = False

    def mask(tokens: Tensor, logits: Tensor) -> Tensor:
        nonlocal started
        if len(tokens) != len(matchers):
            raise InputError(f"a batch of {len(tokens)} rows for {len(matchers)} grammars; give one grammar a row")
        if started:
            _advance(matchers, tokens[:, -1].tolist())
        started = True
        return _mask(matchers, logits)

    return mask


def _advance(matchers: list[xgrammar.GrammarMatcher], tokens: list[int]) -> None:
    for matcher, token in zip(matchers, tokens, strict=True):
        if not matcher.is_terminated():  # what follows the end is padding
            accepted = matcher.accept_token(token)
            assert accepted, "the sampler chose a token that was masked"


def _mask(matchers: list[xgrammar.GrammarMatcher], logits: Tensor) -> Tensor:
    """Minus infinity, in place, for the tokens that no row's grammar allows next."""
    if not matchers:
        return logits
    allowed = xgrammar.allocate_token_bitmask(len(matchers), logits.shape[-1])
    for row, matcher in enumerate(matchers):
        if not matcher.is_terminated():
            matcher.fill_next_token_bitmask(allowed, row)
    xgrammar.apply_token_bitmask_inplace(logits, allowed.to(logits.device))
    return logits


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    grammars: list[CallGrammar] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    on_cut: Callable[[int], object] = lambda index: None,
) -> Iterator[tuple[int, str]]:
    """Greedy answers, batch after batch, as (index of the prompt, text): write each down and a stop costs one batch.

    Prompts are finished chat texts. They are batched by length, shortest first; a row that has ended leaves its batch,
    and a beginning that the grammar leaves no choice about is read with the prompt instead of decoded. `on_cut` hears
    the index of each prompt whose answer has not come to its end.
    """
    matchers = [xgrammar.GrammarMatcher(grammar.compiled) for grammar in grammars or ()]
    forced = [_forced_beginning(matcher, tokenizer) for matcher in matchers] or [[]] * len(prompts)
    rows = [tokenizer(p, add_special_tokens=False).input_ids + f for p, f in zip(prompts, forced, strict=True)]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    stops = stop_tokens(model, tokenizer)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        of_batch = [matchers[index] for index in batch] if matchers else []
        ids, seen = left_padded([rows[index] for index in batch], padding_token(stops, tokenizer))
        new, cut = _decode(model, ids, seen, matchers=of_batch, stops=stops, max_new_tokens=max_new_tokens)
        for row in cut:
            on_cut(batch[row])
        whole = [[*forced[i], *tokens] for i, tokens in zip(batch, new, strict=True)]
        texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
        yield from zip(batch, texts, strict=True)


def _forced_beginning(matcher: xgrammar.GrammarMatcher, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of the text every answer begins with; the last one is left to the model, as it may go on beyond it."""
    tokens = tokenizer(matcher.find_jump_forward_string(), add_special_tokens=False).input_ids[:-1]
    _advance([matcher] * len(tokens), tokens)
    return tokens


def left_padded(rows: list[list[int]], padding: int) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Token ids padded on the left to the longest row, and 1 where a token is not padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@torch.inference_mode()
def _decode(
    model: PreTrainedModel, ids: Tensor, seen: Tensor, *, matchers: list, stops: tuple[int, ...], max_new_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Greedy continuations of left-padded rows, without their end token; and the rows that have not come to it."""
    cache = DynamicCache(config=model.config)
    ids, seen = ids.to(model.device), seen.to(model.device)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    alive, new = list(range(len(ids))), [[] for _ in ids]
    for _ in range(max_new_tokens):
        output = model(ids, attention_mask=seen, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        chosen = _mask(matchers, output.logits[:, -1].float()).argmax(-1).tolist()
        _advance(matchers, chosen if matchers else [])
        kept = [row for row, token in enumerate(chosen) if token not in stops]
        for row in kept:
            new[alive[row]].append(chosen[row])
        if not kept:
            return new, []
        if len(kept) < len(alive):
            alive, matchers = [alive[row] for row in kept], [matchers[row] for row in kept if matchers]
            cache.batch_select_indices(torch.tensor(kept, device=model.device))
        ids = torch.tensor([[chosen[row]] for row in kept], device=model.device)
        seen = torch.cat([seen[kept], torch.ones_like(ids)], 1)
        positions = positions[kept, -1:] + 1
    return new, alive
