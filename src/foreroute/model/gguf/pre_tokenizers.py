"""How BPE tokenizers split a text before they merge: the rules by llama.cpp's names of them.

The names are those of llama.cpp's converter (get_vocab_base_pre), which tells tokenizers apart by what they do to one
text; the patterns those of the tokenizer.json that each name stands for, of which src/llama-vocab.cpp quotes most. A
name that is not here is refused: with another pattern tokens would be wrong, and nothing would show it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PreTokenizer:
    """One rule.

    patterns: regular expressions (oniguruma's), each of which splits what the ones before it left.
    nfc: a text is composed first (Unicode's NFC), as its tokenizer.json says; no GGUF file does.
    ignore_merges: a piece that is a token is that token, whatever its merges make.
    adds_bos: what a file means that does not say whether a text begins with the start token.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def make(self) -> Any:
        """The tokenizers library's pre-tokenizer, with bytes as characters behind it."""
        from tokenizers import Regex, pre_tokenizers

        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _CL100K.replace("{1,3}", "")
_QWEN35 = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(suffix: str, digits: str, behind: str, but: str = "") -> str:
    """Words that begin anew where a capital follows a small letter. but: letters that are none."""
    upper, lower = f"[{_UPPER}{but}]", f"[{_LOWER}{but}]"
    words = "|".join(
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}{first}{lower}{then}{suffix}" for first, then in (("*", "+"), ("+", "*"))
    )
    return rf"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{behind}]*|{_SPACES}"


_O200K = _cased(f"{_SUFFIXES}?", "{1,3}", "/")
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
# The letters of the scripts that have capitals.
_CASED_LETTERS = (
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
_DEEPSEEK_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)

_LLAMA3 = PreTokenizer((_CL100K,), ignore_merges=True, adds_bos=True)
_GPT2_RULE = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK_WORDS))
_GLM4 = PreTokenizer((_CL100K,), ignore_merges=True)
_BAILING = PreTokenizer((
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
))  # fmt: skip

# The source of each is the tokenizer.json (or the code) of the model that is named beside it.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    # llama.cpp's own, where a converter named none.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    # openai-community/gpt2; microsoft/phi-2; LGAI-EXAONE/EXAONE-4.0; ibm-granite/granite-docling.
    "gpt-2": _GPT2_RULE,
    "phi-2": _GPT2_RULE,
    "exaone4": _GPT2_RULE,
    "granite-docling": _GPT2_RULE,
    # allenai/OLMo-1.7, OLMoE: GPT-NeoX's, which composes.
    "olmo": PreTokenizer((_GPT2,), nfc=True),
    # bigcode/starcoder2; smallcloudai/Refact, Granite 3; HuggingFaceTB/SmolLM; EXAONE 3; JetBrains/Mellum2.
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "smollm": _DIGITS,
    "exaone": _DIGITS,
    "mellum2": _DIGITS,
    # CohereForAI/c4ai-command-r-v01.
    "command-r": PreTokenizer((r"\p{N}", _GPT2), nfc=True),
    # meta-llama/Meta-Llama-3-8B; LiquidAI/LFM2.
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "lfm2": _LLAMA3,
    # databricks/dbrx-base, which Granite 4 and OLMo 2 have too; abacusai/Smaug-Llama-3.
    "dbrx": PreTokenizer((_CL100K,)),
    "smaug-bpe": PreTokenizer((_CL100K,)),
    # THUDM/glm-4-9b-chat and its -hf; GLM-4.5 to 5.
    "chatglm-bpe": PreTokenizer((_CL100K,)),
    "glm4": _GLM4,
    "glm5": _GLM4,
    # Qwen/Qwen1.5 to Qwen3, dots1; Qwen/Qwen3.5; tencent/Hunyuan-A13B; upstage/Solar-Open; Grok 2.
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    "hunyuan": PreTokenizer((_QWEN2,)),
    "solar-open": PreTokenizer((_QWEN2,)),
    "grok-2": PreTokenizer((_QWEN2,)),
    # openai/gpt-oss (o200k); meta-llama/Llama-4; MiniMaxAI/MiniMax-M2, which composes.
    "gpt-4o": PreTokenizer((_O200K,), ignore_merges=True),
    "llama4": PreTokenizer((_O200K,), ignore_merges=True),
    "minimax-m2": PreTokenizer((_O200K,), nfc=True),
    # mistralai/Mistral-Nemo-Base-2407.
    "tekken": PreTokenizer((_cased("", "", "/"),), ignore_merges=True, adds_bos=True),
    # moonshotai/Kimi-K2: tokenization_kimi.py.
    "kimi-k2": PreTokenizer(
        (r"[\p{Han}]+|" + _cased(f"{_SUFFIXES}?", "{1,3}", "", r"&&[^\p{Han}]"),), ignore_merges=True
    ),
    # deepseek-ai/deepseek-llm, DeepSeek-V2; deepseek-coder; DeepSeek-V3; tencent/Hunyuan-4B.
    "deepseek-llm": PreTokenizer((
        "[\r\n]", rf"\s?[{_CASED_LETTERS}]+", _DEEPSEEK_SIGNS, r"\s+$", _EAST_ASIAN, r"\p{N}",
    )),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    "deepseek-v3": _DEEPSEEK3,
    "hunyuan-dense": _DEEPSEEK3,
    "joyai-llm": _DEEPSEEK3,
    # inclusionAI/Ling-lite, Ling-mini-base-2.0; GSAI-ML/LLaDA.
    "bailingmoe": _BAILING,
    "bailingmoe2": _BAILING,
    "llada-moe": _BAILING,
    # ByteDance-Seed/Seed-Coder-8B-Base.
    "seed-coder": PreTokenizer((
        rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
    )),
    # LGAI-EXAONE/K-EXAONE-236B-A23B: a word may have spaces in it. It composes (its report, on the tokenizer).
    "exaone-moe": PreTokenizer((
        rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ), nfc=True),
    # arcee-ai/Trinity: digits in threes from the right (llama.cpp does it in code, src/unicode.cpp).
    "afmoe": PreTokenizer((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _AFMOE_SCRIPTS, _DEEPSEEK_WORDS)),
}  # fmt: skip
