"""Tokenizers as they are published, of small vocabularies, and GGUF files of them as llama.cpp's converter writes them.

What a published tokenizer.json says of splitting and composing is written out here once more, from those files, and not
taken from what is tested. Of the converter the gguf package has a part (SpecialVocab: merges, tokens with a role, chat
templates); the rest, tokens and their kinds, is a few lines (get_vocab_base of convert_hf_to_gguf.py).
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

SPACE = "\u2581"
START, END, TURN = "<|begin|>", "<|endoftext|>", "<|im_end|>"
SPECIAL = (END, START, TURN, "<|im_start|>")
USER = ("<think>", "</think>", "      ")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_WORDS = (
    "The quick brown fox jumps over the lazy dog while they'll say it's fine HelloWorld camelCaseWords "
    "HTTPServer iPhone don't I'VE we'Re you'd he'S o'clock naïve café cafe\u0301 Ångstro\u0308m straße ĲSSEL "
    "ǅungla Привет мир ПРИВЕТ Ελληνικά ἀρχή \u1f7d מים שלום مرحبا بالعالم हिन्दी भाषा বাংলা ภาษาไทย ລາວ "
    "ខ្មែរ မြန်မာ 漢字 汉字测试 文章です カタカナ ひらがな 한국어 안녕하세요 \u1112\u1161\u11ab "
    "ＦＵＬＬ\u3000ｗｉｄｔｈ \uf900 ℂ ﬁne ¿qué? «oui» “so” ‘no’ … — x+y==z a|b ^~` $5 €9 #tag @me def "
    "f(x):\n    return x ** 2  # comment\n\tif a[0] != {'k': 1}:\r\n\r\n        pass; // "
    "path/to/file.py?x=1&y=2 </s> <div/> 0 7 42 365 1024 31415 271828 1000000 12345678901 3.14 1,000 ½ ² ٣٤٥ "
    "४२ Ⅷ 😀 👍🏽 🇺🇸 ❤️ 👩\u200d👩\u200d👧 ✅ [PAD3] \u200d \u00a0 \u3000 _under_score __init__ ALLCAPS "
    "MiXeD 'tis 'LL '' ''' !!! ???\n /// \\n -> <= >= && || :: ... --- ___ %d %s "
    "he'Sgone we'REhere I'LLama you'Dare !\n//x ?\r\n/ )\n/y 文章abc汉字测试です中文カナ漢字한국 it'Mhere 'Tis"
)


@dataclass(frozen=True)
class Published:
    """What a tokenizer.json says.

    names: llama.cpp's, of tokenizers that do the same. splits: its pre-tokenizers before the bytes. has_gpt2: the one
    that makes bytes splits as GPT-2's does. composes: NFC.
    """

    names: tuple[str, ...]
    splits: tuple[Any, ...] = ()
    has_gpt2: bool = False
    composes: bool = False
    ignore_merges: bool = False
    starts: bool = False


def _split(*patterns: str) -> tuple[Any, ...]:
    return tuple(pre.Split(Regex(pattern), "isolated") for pattern in patterns)


_DIGITS = pre.Digits(individual_digits=True)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KIMI = "|".join((
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))  # fmt: skip
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)

PUBLISHED = (
    Published(("gpt-2", "phi-2", "exaone4", "granite-docling"), has_gpt2=True),
    Published(("olmo",), has_gpt2=True, composes=True),
    Published(("starcoder", "refact", "smollm", "exaone", "mellum2"), (_DIGITS,), has_gpt2=True),
    Published(("command-r",), (_DIGITS,), has_gpt2=True, composes=True),
    Published(("llama-bpe", "llama3", "llama-v3", "lfm2"), _split(_LLAMA3), ignore_merges=True, starts=True),
    # These are published as the pieces that a pattern finds, the rest left out.
    Published(("dbrx", "smaug-bpe", "chatglm-bpe"), (pre.Split(Regex(_LLAMA3), "removed", invert=True),)),
    Published(("glm4", "glm5"), _split(_LLAMA3), ignore_merges=True),
    Published(("qwen2",), _split(_QWEN2), composes=True),
    Published(("hunyuan", "solar-open", "grok-2"), _split(_QWEN2)),
    Published(
        ("qwen35",),
        _split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        composes=True,
    ),
    Published(("gpt-4o", "llama4"), _split(_O200K), ignore_merges=True),
    Published(("minimax-m2",), (pre.Split(Regex(_O200K), "removed", invert=True),), composes=True),
    Published(
        ("tekken",),
        _split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        ignore_merges=True,
        starts=True,
    ),
    Published(("kimi-k2",), _split(_KIMI), ignore_merges=True),
    Published(
        ("deepseek-llm",),
        (
            *_split(
                "[\r\n]", rf"\s?[{_LETTERS}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                r"\s+$", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
            ),
            _DIGITS,
        ),
    ),
    Published(
        ("deepseek-coder",),
        (*_split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"), _DIGITS),
    ),
    Published(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
        _split(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3),
    ),
    Published(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        _split(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        ),
    ),
    Published(
        ("seed-coder",),
        _split(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+"
            "|\\s+(?!\\S)|\\s+"
        ),
    ),
    Published(
        ("exaone-moe",),
        _split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
        ),
        composes=True,
    ),
    # No files of these two: what llama.cpp does. Of the second one digits in threes from the right, in its code.
    Published(
        ("default",),
        _split(
            r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+", "[0-9][0-9][0-9]",
        ),
    ),
    Published(("afmoe",), _split(r"\p{N}{1,2}(?=(?:\p{N}{3})+(?!\p{N}))|\p{N}{3}|\p{N}+", _SCRIPTS, _DEEPSEEK_V3)),
)  # fmt: skip


def texts(count: int = 1000) -> list[str]:
    """Words of many scripts, digits, runs of spaces, signs, code and special tokens, put together by chance."""
    chance = random.Random(20)
    words = [*_WORDS.split(" "), *SPECIAL, *USER, "  ", "   ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "12", "345"]
    made = [_WORDS, "", " ", "\n", "  a", "a  ", *USER]
    while len(made) < count:
        some = chance.choices(words, k=chance.randint(1, 12))
        made.append("".join(word + chance.choice(("", " ", " ", " ", "  ")) for word in some))
    return made


@cache
def _learnt(num_tokens: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges of a text that nothing splits, so that every split shows.

    Some merges are left out: the tokens they make are found by `ignore_merges` alone.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet(), max_token_length=12
    )
    learner.train_from_iterator([text for text in texts(2000)[1000:] if len(text) < 400], trainer)
    learnt = json.loads(learner.to_str())["model"]
    return learnt["vocab"], [tuple(merge) for at, merge in enumerate(learnt["merges"]) if at < 500 or at % 9]


def byte_level_source(published: Published, num_tokens: int = 2500) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits as published, of as many tokens, and those that are added."""
    tokenizer = Tokenizer(models.BPE(*_learnt(num_tokens), ignore_merges=published.ignore_merges))
    if published.composes:
        tokenizer.normalizer = normalizers.NFC()
    in_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=published.has_gpt2)
    tokenizer.pre_tokenizer = pre.Sequence([*published.splits, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    _add(tokenizer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if published.starts:
        number = tokenizer.token_to_id(START)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", pair=f"{START} $A {START} $B:1", special_tokens=[(START, number)]
        )
    return wrapped(tokenizer, bos_token=START, eos_token=END, chat_template=TEMPLATE)


def sentencepiece_source(
    architecture: str = "llama", *, prefixed: bool = True
) -> tuple[PreTrainedTokenizerFast, list[float]]:
    """A tokenizer as transformers makes it of a sentencepiece model (Llama 2, Mixtral), and each token's score.

    Of `phimoe` added tokens take the spaces behind them. prefixed: a text gets a space before it.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre.Metaspace(SPACE, prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, min_frequency=1)
    learner.train_from_iterator([_WORDS[:800], _WORDS.replace("\n", " ")[:800]], trainer)
    learnt = sorted((one for one in learner.get_vocab() if not {*"\r\n"} & {*one}), key=learner.token_to_id)
    # As sentencepiece orders them: by merges, then characters.
    pieces = [one for one in learnt if len(one) > 1] + [one for one in learnt if len(one) == 1]
    pieces += [one for one in (SPACE * 2, SPACE * 4) if one not in pieces]
    given = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {token: number for number, token in enumerate(given)}
    scores = [0.0 if number < 259 else float(259 - number) for number in range(len(given))]
    merges = generate_merges(vocabulary, dict(zip(given, scores, strict=True)))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend(SPACE)] if prefixed else []
    after = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after
    ])  # fmt: skip
    strips = architecture == "phimoe"
    tokenizer.add_special_tokens([
        AddedToken("<unk>", normalized=False), AddedToken("<s>", normalized=False),
        AddedToken("</s>", normalized=False, rstrip=strips),
    ])  # fmt: skip
    _add(tokenizer, strips=strips)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    scores += [-1000.0] * (tokenizer.get_vocab_size() - len(scores))
    return wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE), scores


def word_piece_source(*, lowercase: bool) -> PreTrainedTokenizerFast:
    """BERT's tokenizer of a small vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=700, show_progress=False, special_tokens=names)
    tokenizer.train_from_iterator([_WORDS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True))
    return wrapped(tokenizer, **roles)


def wrapped(tokenizer: Tokenizer, **roles: Any) -> PreTrainedTokenizerFast:
    """It as transformers has it."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)


def _add(tokenizer: Tokenizer, *, strips: bool = False) -> None:
    tokenizer.add_special_tokens([
        AddedToken(token, normalized=False, rstrip=strips and token != END) for token in SPECIAL
    ])  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, normalized=False, rstrip=strips) for token in USER])


def write_vocabulary(
    source: PreTrainedTokenizerFast, path: Path, kind: str, pre_name: str, *, architecture: str = "llama",
    scores: Sequence[float] | None = None, flags: Mapping[str, bool] | None = None,
    said: Mapping[str, Any] | None = None, more: int = 3,
) -> Path:  # fmt: skip
    """Write a GGUF file of the tokenizer alone.

    flags, said: metadata, more or others, None for none; of flags the name behind the tokenizer's prefix. more: ids
    behind the last one.
    """
    source.save_pretrained(path.parent / "source")
    writer = gguf.GGUFWriter(path, architecture)
    tokens, types = zip(*_tokens(source, more, is_words=kind == "bert"), strict=True)
    writer.add_tokenizer_model(kind)
    if pre_name:
        writer.add_tokenizer_pre(pre_name)
    writer.add_token_list(list(tokens))
    if scores is not None:
        writer.add_token_scores([*scores, *([-10000.0] * more)])
    writer.add_token_types(list(types))
    gguf.SpecialVocab(path.parent / "source", load_merges=kind == "gpt2").add_to_gguf(writer, quiet=True)
    for name, value in {
        **{f"tokenizer.ggml.{name}": flag for name, flag in (flags or {}).items()},
        **(said or {}),
    }.items():
        writer.kv_data[0].pop(name, None)
        if value is None:
            continue
        {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)](
            name, value
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokens(source: PreTrainedTokenizerFast, more: int, *, is_words: bool) -> Iterator[tuple[str, int]]:
    """Each token and its kind, as get_vocab_base has them."""
    by_id = {number: token for token, number in source.get_vocab().items()}
    kinds = gguf.TokenType
    for number in range(len(by_id) + more):
        token, added = by_id.get(number), source.added_tokens_decoder.get(number)
        if token is None:
            yield f"[PAD{number}]", kinds.UNUSED
        elif added is not None:
            yield token, kinds.CONTROL if added.special else kinds.USER_DEFINED
        elif len(token) == 6 and token.startswith("<0x"):
            yield token, kinds.BYTE
        else:
            spelled = token if not is_words else token[2:] if token.startswith("##") else SPACE + token
            yield spelled, kinds.NORMAL
