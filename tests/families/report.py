"""docs/families.md, made of the installed transformers: `python -m tests.families.report > docs/families.md`."""

from tests.families.installed import adapted_modules, encoder_decoders, families, refused_modules, seam_modules
from tests.families.special import CANNOT, ONE_ROW, UNGUESSED, UNTESTED

_HEAD = """# Families

Model types of transformers {version} whose experts go through its shared experts interface, and those that have an
adapter (src/foreroute/model/adapters), as the note says. Each that works is proven by `pytest tests/families`: a tiny
random model, experts evicted, the tokens and fp32 logits of transformers' own, bit for bit, and experts prefetched
unless noted. Multimodal types run on text. *At once*: whether requests to `serve` share steps, each within 1e-4 of
what it is alone (fp32). This file is made by `python -m tests.families.report > docs/families.md`.
"""

_MENDED = (
    "its tokens go through the experts that its router chose, which they do not in transformers 5.24: compared with "
    "that, its blocks mended"
)


def report() -> str:
    """The file's text."""
    import transformers

    working = [family for family in families() if family.model_type not in CANNOT | UNTESTED]
    refused = [family for family in families() if family.model_type in CANNOT]
    seq2seq = encoder_decoders()
    num_families = len({family.module for family in working} | set(seq2seq.values()))
    num_known = len({*seam_modules(), *adapted_modules(), *refused_modules()})
    lines = [
        _HEAD.format(version=transformers.__version__),
        f"## Work: {num_families} of {num_known} families, {len(working) + len(seq2seq)} model types\n",
        "| model type | Auto class | at once | note |",
        "|---|---|---|---|",
    ]
    for family in working:
        auto_class = "CausalLM" if family.is_causal else "ImageTextToText"
        note = UNGUESSED.get(family.model_type)
        note = f"not guessed: {note}" if note else "by an adapter" if family.module in adapted_modules() else ""
        at_once = "one" if family.model_type in ONE_ROW else "several"
        lines.append(f"| {family.model_type} | {auto_class} | {at_once} | {note} |")
    for model_type in seq2seq:
        note = "by an adapter; an encoder-decoder (tests/seq2seq)"
        differs = f"; {_MENDED}" if model_type == "nllb-moe" else ""
        lines.append(f"| {model_type} | Seq2SeqLM | one | {note}{differs} |")
    lines += [
        "\n## Do not work\n",
        "| model type | why |",
        "|---|---|",
        *(f"| {family.model_type} | {CANNOT[family.model_type]} |" for family in refused),
        "\n## Not tested\n",
        "| model type | why |",
        "|---|---|",
        *(f"| {f.model_type} | {UNTESTED[f.model_type]} |" for f in families() if f.model_type in UNTESTED),
        "\nOf jetmoe the experts of its MLP are offloaded; those of its attention stay in memory with the dense part.",
        "bamba has an MLP in place of experts, and the experts of vitpose_backbone are of a vision model: neither is",
        "listed.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(report(), end="")
