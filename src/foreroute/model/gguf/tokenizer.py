"""Make transformers' tokenizer of the vocabulary in a GGUF file."""

from collections.abc import Callable, Mapping
from typing import Any

from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.errors import CorruptCheckpointError, named
from foreroute.model.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from foreroute.model.gguf.vocabulary import ADVICE, CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

# A word's first piece begins with it, in place of a space.
_SPACE = "\u2581"
# Sentencepiece's have 16 characters, if nothing else is said when it learns.
_LONGEST_PIECE = 1024
# Architectures whose added tokens take the spaces behind them, but for these: microsoft/Phi-3.5-MoE-instruct.
_TAKE_SPACES: Mapping[str, frozenset[str]] = {"phimoe": frozenset({"<unk>", "<s>", "<|endoftext|>"})}


def gguf_tokenizer(index: GgufIndex) -> Any:
    """Make the tokenizer of a GGUF file, as the model's own tokenizer.json would.

    Cost: a second for 150,000 tokens and their merges.

    Raises:
        CheckpointError: the file has none. UnsupportedModelError: one of a kind that is not read; named.
        CorruptCheckpointError: its metadata contradict themselves.
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = Vocabulary.read(index)
    if vocabulary.kind not in _KINDS:
        raise vocabulary.refused(
            f"vocabularies of the kind {vocabulary.kind!r:.40} are not read; {', '.join(_KINDS)} are"
        )
    with named(f"{index.folder}: its vocabulary makes no tokenizer", advice=ADVICE):
        tokenizer = _KINDS[vocabulary.kind](vocabulary)
        _add_tokens(tokenizer, vocabulary)
        templates = vocabulary.templates()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            name_or_path=str(index.folder),
            clean_up_tokenization_spaces=False,
            chat_template=templates["default"] if templates.keys() == {"default"} else templates or None,
            **vocabulary.roles,
        )


def _byte_level(vocabulary: Vocabulary) -> Any:
    """BPE over bytes that are written as characters (GPT-2's)."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    rule = _rule(vocabulary)
    # Of one that is listed twice the first counts, as in llama.cpp.
    merges = [_pair(merge) for merge in dict.fromkeys(vocabulary.array("merges") or [])]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids(), merges, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = rule.make(), decoders.ByteLevel()
    _frame(tokenizer, vocabulary, starts=vocabulary.adds("add_bos_token", default=rule.adds_bos))
    return tokenizer


def _rule(vocabulary: Vocabulary) -> PreTokenizer:
    name = vocabulary.get("pre")
    if name is None:
        raise vocabulary.refused(
            "it does not say how a text is split (tokenizer.ggml.pre), as files of before May 2024"
        )
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise vocabulary.refused(
            f"it splits texts as {name!r:.40} does (tokenizer.ggml.pre), which is not known here; "
            f"{', '.join(PRE_TOKENIZERS)} are"
        )
    return PRE_TOKENIZERS[name]


def _pair(merge: str) -> tuple[str, str]:
    first, space, second = merge.partition(" ")
    if not space:
        raise ValueError(f"{merge!r:.40} is no merge")
    return first, second


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    """BPE over characters, those that are no token as bytes (sentencepiece's, as transformers runs it)."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    prefixed = vocabulary.adds("add_space_prefix", default=True)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary.ids(), _merges_of(vocabulary), unk_token=vocabulary.roles.get("unk_token"), fuse_unk=True,
            byte_fallback=True,
        )
    )  # fmt: skip
    to_pieces = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*to_pieces, normalizers.Replace(" ", _SPACE)])
    to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*to_text, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    _frame(tokenizer, vocabulary, starts=vocabulary.adds("add_bos_token", default=True))
    return tokenizer


def _merges_of(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token: of the greatest score first, of one token the longest first part first.

    As transformers does when it converts a sentencepiece model (generate_merges). Some converters say one score for all
    tokens: then their order, which is that of the scores in sentencepiece's models.
    """
    scores = vocabulary.scores()
    apart = {CONTROL, UNKNOWN, USER_DEFINED}
    ids = {token: at for token, at in vocabulary.ids().items() if vocabulary.types[at] not in apart}
    longest = max(ids, key=len, default="")
    if len(longest) > _LONGEST_PIECE:
        raise ValueError(f"a token has {len(longest):,} characters ({longest:.20}...)")
    found = [
        (-scores[at], at, -cut, token)
        for token, at in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(token[:-minus_cut], token[-minus_cut:]) for _, _, minus_cut, token in sorted(found)]


def _word_piece(vocabulary: Vocabulary) -> Any:
    """Words in pieces, the longest first (BERT's). llama.cpp marks pieces that begin a word, not the others."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    added = {token for token, _, _ in vocabulary.added()}
    pieces = {
        token if token in added else token[1:] if token.startswith(_SPACE) else f"##{token}": at
        for token, at in vocabulary.ids().items()
    }
    lowered = vocabulary.adds("normalizer.lowercase", default=True)
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token=vocabulary.roles["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowered, strip_accents=vocabulary.adds("normalizer.strip_accents", default=lowered)
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    _frame(tokenizer, vocabulary, starts=True)
    return tokenizer


def _frame(tokenizer: Any, vocabulary: Vocabulary, *, starts: bool) -> None:
    """Have the start and end tokens put around a text, as the file says; a text in words always has both."""
    from tokenizers import processors

    is_words = vocabulary.kind == "bert"
    ends = is_words or vocabulary.adds("add_eos_token", default=False)
    first = vocabulary.marks.get("bos_token") if starts else None
    last = vocabulary.marks.get("sep_token" if is_words else "eos_token") if ends else None
    before, behind = ([token] if token else [] for token in (first, last))
    second = [] if is_words else [f"{token}:1" for token in before]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *second, "$B:1", *(f"{token}:1" for token in behind)],
        special_tokens=[(token, vocabulary.tokens.index(token)) for token in dict.fromkeys((*before, *behind))],
    )


def _add_tokens(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Have the tokens found in a text that stand for themselves, before it is split."""
    from tokenizers import AddedToken

    but = _TAKE_SPACES.get(vocabulary.index.architecture)
    for is_special in (True, False):
        tokens = [
            AddedToken(token, normalized=False, special=is_special, rstrip=but is not None and token not in but)
            for token, _, special in vocabulary.added()
            if special == is_special
        ]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(tokens)
    wrong = next((token for token, at, _ in vocabulary.added() if tokenizer.token_to_id(token) != at), None)
    if wrong is not None:
        raise CorruptCheckpointError(f"{vocabulary.index.folder}: {wrong!r:.40} is not the token that it says.")


_KINDS: Mapping[str, Callable[[Vocabulary], Any]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "bert": _word_piece,
}
