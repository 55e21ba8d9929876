"""The tokenizer in a GGUF file: byte-level pairs ("gpt2") or SentencePiece pairs ("llama")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from vesalius.errors import FileFormatError, UnknownNameError
from vesalius.model.gguf.file import GgufFile, special_ids, vocabulary

PRE_TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}
"""How text is divided before byte-pair merging, by the name in the file."""

# GGUF's types of tokens.
_CONTROL, _USER_DEFINED = 3, 4
_HINT = "Load the safetensors version of the model instead."
SPACE = "▁"
"""The character that stands for a space in SentencePiece's tokens."""


def read_tokenizer(file: GgufFile) -> transformers.PreTrainedTokenizerFast | None:
    """The tokenizer in the metadata, or None when the file holds none.

    Control tokens become special tokens; a bos or eos token is added to a text only if the file says so.
    Raises UnknownNameError for a kind of tokenizer or a pre-tokenizer that is not known, FileFormatError when corrupt.
    """
    fields = file.fields
    kind = fields.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in _KINDS:
        raise UnknownNameError(f"tokenizer model in {file.path}:", kind, _KINDS, _HINT)
    tokens, types = _vocabulary(file)
    core = _KINDS[kind](file, tokens)
    special = special_ids(file, len(tokens))
    core.post_processor = _frame(special, tokens, fields)
    typed = list(zip(tokens, types, strict=True))
    core.add_special_tokens([_added(token, special=True) for token, kind in typed if kind == _CONTROL])
    core.add_tokens([_added(token, special=False) for token, kind in typed if kind == _USER_DEFINED])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        model_max_length=file.whole(f"{fields['general.architecture']}.context_length"),
        chat_template=fields.get("tokenizer.chat_template"),
        **{f"{role}_token": tokens[index] for role, index in special.items()},
    )


def _vocabulary(file: GgufFile) -> tuple[list[str], list[int]]:
    """Tokens and their types."""
    tokens, types = file.fields.get("tokenizer.ggml.tokens", []), file.fields.get("tokenizer.ggml.token_type", [])
    if not isinstance(tokens, list) or not isinstance(types, list):
        raise FileFormatError(f"{file.path}: its tokenizer's tokens or token types are not lists.")
    types = types or [1] * len(tokens)
    if not 0 < len(tokens) <= vocabulary(file) or len(types) != len(tokens):
        raise FileFormatError(
            f"{file.path}: {len(tokens)} tokens with {len(types)} token types do not fit an embedding of "
            f"{vocabulary(file)} rows."
        )
    if len(set(tokens)) != len(tokens):
        raise FileFormatError(f"{file.path}: its tokenizer lists a token twice.")
    return tokens, types


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    pre = file.fields.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UnknownNameError(f"pre-tokenizer in {file.path}:", pre, PRE_TOKENIZERS, _HINT)
    if file.fields.get("tokenizer.ggml.add_space_prefix", False):
        raise FileFormatError(f"{file.path}: add_space_prefix is not known for a byte-pair tokenizer. {_HINT}")
    merges = [tuple(merge.split(" ")) for merge in file.fields.get("tokenizer.ggml.merges", [])]
    core = tokenizers.Tokenizer(_pairs(file, tokens, merges, fuse_unk=False))
    core.pre_tokenizer = PRE_TOKENIZERS[pre]()
    core.decoder = decoders.ByteLevel()
    return core


def _sentence_pieces(file: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Pairs are merged in the order of the scores; a letter that is no token becomes its bytes."""
    scores = file.fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise FileFormatError(f"{file.path}: its SentencePiece tokenizer has no score for each of its tokens.")
    if file.fields.get("tokenizer.ggml.add_space_prefix", True):
        raise FileFormatError(f"{file.path}: a SentencePiece tokenizer that puts a space first is not known. {_HINT}")
    unknown = special_ids(file, len(tokens)).get("unk")
    unk = None if unknown is None else tokens[unknown]
    merges = merges_of(tokens, scores)
    core = tokenizers.Tokenizer(_pairs(file, tokens, merges, fuse_unk=True, byte_fallback=True, unk_token=unk))
    core.normalizer = normalizers.Replace(" ", SPACE)
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


def merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Merges that are equivalent to SentencePiece's scores: it merges the adjacent pair with the best score first.

    A pair of tokens is merged into the token they make, higher scores first; pairs that make the same token come in
    the order of their own scores.
    """
    rank = {token: score for token, score in zip(tokens, scores, strict=True)}

    def pairs() -> Iterator[tuple[float, float, str, str]]:
        for token, score in rank.items():
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in rank and right in rank:
                    yield score, rank[left] + rank[right], left, right

    ordered = sorted(pairs(), key=lambda pair: (-pair[0], -pair[1]))
    return [(left, right) for _, _, left, right in ordered]


_KINDS: Mapping[str, Callable[[GgufFile, Sequence[str]], tokenizers.Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentence_pieces,
}


def _pairs(file: GgufFile, tokens: Sequence[str], merges: Sequence[Any], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges), **options)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise FileFormatError(f"{file.path}: its tokenizer's merges do not fit its tokens: {error}") from error


def _added(token: str, *, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=special, normalized=False)


def _frame(special: Mapping[str, int], tokens: Sequence[str], fields: Mapping[str, Any]) -> Any:
    """The template that puts the bos and eos token around a text, where the file says so."""
    used = [role for role in ("bos", "eos") if fields.get(f"tokenizer.ggml.add_{role}_token", False)]
    around = {role: (tokens[special[role]], special[role]) for role in used if role in special}
    first, last = ([around[role][0]] if role in around else [] for role in ("bos", "eos"))
    one, two = ([*first, text, *last] for text in ("$A", "$B"))
    return processors.TemplateProcessing(single=one, pair=one + two, special_tokens=list(around.values()))
