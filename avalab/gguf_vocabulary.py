"""The tokenizer of a GGUF file whose vocabulary is SentencePiece's, where transformers makes another one of it.

transformers 5.17 turns Gemma's vocabulary into a model that leaves the merges out: "Hello world" becomes `Hello`, ` w`,
`or`, `ld`, and no start token is added, so that the model scores as if damaged. llama.cpp's rule, followed here:

1. User-defined tokens (runs of newlines and spaces, tags) are cut out first, the longest one that fits.
2. Elsewhere a space is written U+2581, and the pair of neighbours whose joined token scores highest is merged, over
   and over. As byte-pair encoding: all splits of each token into two tokens, the highest score first.
3. A character without a token falls back to its bytes. The start token comes first if the file says so.

What it does not do: other vocabularies; transformers reads those right.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types of the GGUF specification
SPACE = "\u2581"
KEYS = "model tokens scores token_type add_bos_token padding_token_id bos_token_id eos_token_id unknown_token_id"
MODEL_TYPES = ("gemma3_text",)  # transformers' names of the families whose files need this


def tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a file of one of the families in `MODEL_TYPES`.

    Raises ValueError for a vocabulary that is not SentencePiece's, or one without scores.
    """
    model, tokens, scores, types, starts, padding, *ids = _fields(gguf)
    if model != "llama" or not scores:
        raise ValueError(f"{gguf.name} has a vocabulary of kind {model!r}; expected 'llama' with scores")
    bos, eos, unknown = (tokens[index] for index in ids)
    made = encoder(tokens, scores, types, unknown=unknown)
    if starts:
        first = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B", "special_tokens": [(bos, ids[0])]}
        made.post_processor = processors.TemplateProcessing(**first)
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unknown}
    special |= {} if padding is None else {"pad_token": tokens[padding]}
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)


def encoder(tokens: list[str], scores: list[float], types: list[int], *, unknown: str) -> Tokenizer:
    """Byte-pair encoding that merges as SentencePiece's scores ask."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges([t for t, kind in zip(tokens, types, strict=True) if kind == NORMAL], vocabulary, scores)
    made = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    of_kind = {kind: [t for t, k in zip(tokens, types, strict=True) if k == kind] for kind in (CONTROL, USER_DEFINED)}
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in of_kind[CONTROL]])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in of_kind[USER_DEFINED]])
    return made


def _merges(normal: list[str], vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of a token into two, by falling score of the token, then by the parts' own."""
    known = set(normal)
    splits = [
        (-scores[vocabulary[token]], vocabulary[token[:at]], vocabulary[token[at:]])
        for token in normal
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]
    tokens = list(vocabulary)
    return [(tokens[left], tokens[right]) for _score, left, right in sorted(splits)]


def _fields(gguf: Path) -> list:
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields  # reading takes seconds: once
    found = [fields.get(f"tokenizer.ggml.{key}") for key in KEYS.split()]
    return [field and field.contents() for field in found]
