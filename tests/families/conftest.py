"""How many families passed, said at the end of the run."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line: families, model types, and those that are listed with reasons."""
    passed = [
        value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "family"
    ]
    if passed:
        import transformers

        from tests.families.special import CANNOT, UNTESTED

        terminalreporter.write_line(
            f"transformers {transformers.__version__}: {len(set(passed))} families pass ({len(passed)} model types); "
            f"{len(CANNOT | UNTESTED)} listed with reasons"
        )
