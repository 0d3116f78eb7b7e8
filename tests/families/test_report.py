"""docs/families.md says what the gate proves."""

from pathlib import Path

from tests.families.installed import families
from tests.families.report import report

COMMITTED = (Path(__file__).parents[2] / "docs" / "families.md").read_text()


def test_the_file_is_that_of_the_installed_transformers() -> None:
    """Of an older one it lists every type; of the one that it names it is the report itself."""
    import transformers

    if f"transformers {transformers.__version__} " in COMMITTED:
        assert report() == COMMITTED
    absent = [family.model_type for family in families() if f"| {family.model_type} |" not in COMMITTED]
    assert not absent, "make it again: python -m tests.families.report > docs/families.md"
