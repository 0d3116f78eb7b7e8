"""docs/families.md, made of the installed transformers: `python -m tests.families.report > docs/families.md`."""

from tests.families.installed import families, seam_modules
from tests.families.special import CANNOT, ONE_ROW, UNGUESSED, UNTESTED

_HEAD = """# Families

Model types of transformers {version} whose experts go through its shared experts interface. Each that works is proven
by `pytest tests/families`: a tiny random model, experts evicted, the tokens and fp32 logits of transformers' own, bit
for bit, and experts prefetched unless noted. Multimodal types run on text. *At once*: whether requests to
`serve` share steps, each within 1e-4 of what it is alone (fp32). This file is made by
`python -m tests.families.report > docs/families.md`.
"""


def report() -> str:
    """The file's text."""
    import transformers

    working = [family for family in families() if family.model_type not in CANNOT | UNTESTED]
    refused = [family for family in families() if family.model_type in CANNOT]
    num_families = len({family.module for family in working})
    lines = [
        _HEAD.format(version=transformers.__version__),
        f"## Work: {num_families} of {len(seam_modules())} families, {len(working)} model types\n",
        "| model type | Auto class | at once | note |",
        "|---|---|---|---|",
    ]
    for family in working:
        auto_class = "CausalLM" if family.is_causal else "ImageTextToText"
        note = UNGUESSED.get(family.model_type)
        at_once = "one" if family.model_type in ONE_ROW else "several"
        lines.append(f"| {family.model_type} | {auto_class} | {at_once} | {f'not guessed: {note}' if note else ''} |")
    lines += [
        "\n## Do not work\n",
        "| model type | why |",
        "|---|---|",
        *(f"| {family.model_type} | {CANNOT[family.model_type]} |" for family in refused),
        "\n## Not tested\n",
        "| model type | why |",
        "|---|---|",
        *(f"| {f.model_type} | {UNTESTED[f.model_type]} |" for f in families() if f.model_type in UNTESTED),
        "\nllama4 and dbrx keep their experts outside that interface: they are refused by name.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(report(), end="")
