"""A byte-level BPE tokenizer in a GGUF header: tokens, types, merges, special ids, and the chat template.

Readers do not interpret tokenizer.json: they know some ways of cutting text by name (`tokenizer.ggml.pre`). The name is
found from the pattern that the tokenizer splits by, and a pattern without a name here is refused, as the file would
tokenize otherwise than the artefact.

Source: the GGUF specification's tokenizer keys. What it does not do: SentencePiece and unigram vocabularies,
normalizers, or post-processors other than one beginning-of-sequence token.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from avalab import grammars

BYTE_LEVEL = "ByteLevel"
# The part of a splitting pattern that tells the families apart: how many digits make one piece.
PATTERNS = {r"\p{N}{1,3}": "llama-bpe", r"|\p{N}|": "qwen2"}
DIGITS = set("0123456789")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # of gguf's TokenType


def write(writer, tokenizer: PreTrainedTokenizerBase, *, rows: int) -> None:
    """Add the tokenizer to a `gguf.GGUFWriter`; `rows` of the embedding that no token has are filled as unused.

    Raises ValueError for a tokenizer that is not byte-level BPE, or has more tokens than rows.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = described["model"]["type"]
    if kind != "BPE" or BYTE_LEVEL not in json.dumps(described["pre_tokenizer"]):
        raise ValueError(f"the tokenizer is no byte-level BPE (model {kind}); only those are exported")
    tokens, types = vocabulary(tokenizer, rows)
    writer.add_tokenizer_model("gpt2")
    alone = not any(len(text) > 1 and set(text) & DIGITS for text in described["model"]["vocab"])
    writer.add_tokenizer_pre(split_name(described["pre_tokenizer"], digits_stand_alone=alone))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    writer.add_eos_token_id(grammars.stop_tokens(tokenizer)[0])
    ids = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id, "unk": tokenizer.unk_token_id}
    for name, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each of `rows` ids. Raises ValueError for more tokens than rows."""
    known = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(known) >= rows:
        raise ValueError(f"the tokenizer has ids up to {max(known)}, the embedding {rows} rows")
    tokens = [known.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [NORMAL if index in known else UNUSED for index in range(rows)]
    for index, added in tokenizer.added_tokens_decoder.items():
        types[index] = CONTROL if added.special else USER_DEFINED
    return tokens, types


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
    raise ValueError(f"text is cut by {' then '.join(kinds)}; known are {BYTE_LEVEL}, Digits, and Llama 3's and Qwen's")
