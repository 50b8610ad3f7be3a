"""What a GGUF file says of a tokenizer: its vocabulary, how text is cut, what ends an answer, and chat templates.

1. Byte-level BPE is GGUF's `gpt2`: tokens, merges, and a name for the way in which text is cut into pieces
   (`tokenizer.ggml.pre`), which readers know by heart; it is found from the pattern.
2. BPE whose unknown characters fall back to bytes is SentencePiece's, GGUF's `llama`: readers merge the neighbours
   whose joined token has the highest score, so that the rank of the merge that makes a token, negative, is its score.
3. Rows of the embedding that no token has are filled as unused. A list of chat templates goes in by name.

Source: the GGUF specification and gguf 0.19. Unigram and WordPiece tokenizers are refused by name.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from avalab.lab.errors import InputError
from avalab.models.stops import padding_token

BYTE_LEVEL = "ByteLevel"

# The part of a splitting pattern that tells the families apart: how many digits make one piece.
PATTERNS = {r"\p{N}{1,3}": "llama-bpe", r"|\p{N}|": "qwen2"}

DIGITS = set("0123456789")

SPACE = "\u2581"  # SentencePiece's

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # of gguf's TokenType


def write_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, *, rows: int, stops: tuple[int, ...]) -> None:
    """Add the tokenizer to a `gguf.GGUFWriter`; `rows` of the embedding that no token has are filled as unused.

    Raises ValueError for a tokenizer that GGUF's readers do not have, or with more tokens than rows.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"a {type(tokenizer).__name__} has no tokenizer.json, which the GGUF file is written from")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = vocabulary(tokenizer, rows)
    kind = described["model"]["type"]
    if kind == "BPE" and BYTE_LEVEL in json.dumps(described["pre_tokenizer"]):
        _write_byte_level(writer, described)
    elif kind == "BPE" and described["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores(tokens, described["model"]))
        writer.add_add_space_prefix(begins_with_space(described))
        types = [
            BYTE if kind == NORMAL and _is_byte(token) else kind for token, kind in zip(tokens, types, strict=True)
        ]
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = UNKNOWN
    else:
        raise InputError(
            f"the tokenizer is neither byte-level BPE nor SentencePiece's BPE (model {kind}), and GGUF is written for "
            "those; what remains: the engine torch and the exports aot and onnx"
        )
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _write_special(writer, tokenizer, stops)


def _write_byte_level(writer, described: dict[str, Any]) -> None:
    writer.add_tokenizer_model("gpt2")
    alone = not any(len(text) > 1 and set(text) & DIGITS for text in described["model"]["vocab"])
    writer.add_tokenizer_pre(split_name(described["pre_tokenizer"], digits_stand_alone=alone))
    writer.add_token_merges([" ".join(pair) for pair in merges(described["model"])])
    writer.add_add_space_prefix(False)


def _write_special(writer, tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...]) -> None:
    """Tokens with a part to play, and chat templates."""
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    # Readers end an answer at each of the three; without any, llama.cpp would take an id of its own, a piece of text.
    for kind, stop in zip(("eos", "eot", "eom"), stops or (padding_token(stops, tokenizer),), strict=False):
        getattr(writer, f"add_{kind}_token_id")(stop)
    ids = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id, "unk": tokenizer.unk_token_id}
    for name, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if templates := chat_templates(tokenizer):
        writer.add_chat_template([{"name": name, "template": text} for name, text in sorted(templates.items())])


def chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Chat templates by name; where none is called `default`, the first one is that, too."""
    found = tokenizer.chat_template or {}
    named = {"default": found} if isinstance(found, str) else dict(found)
    return {"default": next(iter(named.values()))} | named if named else {}


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each of `rows` ids. Raises ValueError for more tokens than rows."""
    known = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(known) >= rows:
        raise InputError(f"the tokenizer has ids up to {max(known)}, the embedding {rows} rows")
    tokens = [known.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [NORMAL if index in known else UNUSED for index in range(rows)]
    for index, added in tokenizer.added_tokens_decoder.items():
        types[index] = CONTROL if added.special else USER_DEFINED
    return tokens, types


def merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs that BPE joins, the first one first; older files write a pair as one text."""
    return [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]


def scores(tokens: list[str], model: dict[str, Any]) -> list[float]:
    """SentencePiece's score of each token: minus the rank of the first merge that makes it, 0 for what none makes."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges(model), start=1):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def begins_with_space(described: dict[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    written = json.dumps([described["normalizer"], described["pre_tokenizer"]], ensure_ascii=False)
    return f'"prepend": "{SPACE}"' in written or any(
        f'"prepend_scheme": "{how}"' in written for how in ("first", "always")
    )


def _is_byte(token: str) -> bool:
    return len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")


def split_name(pre_tokenizer: dict[str, Any], *, digits_stand_alone: bool = False) -> str:
    """The name that readers know a way of cutting text by. Raises ValueError for one that has none here.

    Where no token joins a digit to anything, GPT-2's cut and SmolLM's give the same tokens; the latter is preferred, as
    OpenVINO GenAI 2026.4 cuts apostrophes and operators otherwise than GPT-2 does.
    """
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    if kinds == [BYTE_LEVEL]:
        return "smollm" if digits_stand_alone else "gpt-2"
    if kinds == ["Digits", BYTE_LEVEL] and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", BYTE_LEVEL]:
        pattern = parts[0]["pattern"].get("Regex", "")
        for telling, name in PATTERNS.items():
            if telling in pattern:
                return name
    raise InputError(f"text is cut by {' then '.join(kinds)}; known are {BYTE_LEVEL}, Digits, and Llama 3's and Qwen's")
