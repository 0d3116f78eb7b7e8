"""Register the model type `foreroute` with lm-eval's own command line.

    lm_eval --model foreroute --model_args pretrained=MODEL,memory=25% --tasks arc_easy

lm-eval (0.4.13) has a fixed table of model types and no plug-in point. torch has one: on import it calls every entry
point in the group `torch.backends`. Ours (pyproject.toml) does nothing unless lm-eval is importing torch. Where torch
was imported first, or TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns those calls off, run the same command line with the same
flags as

    python -m foreroute.evals.lm_eval --model foreroute ...

This module is imported with every torch: it must not import anything slow.
"""

import sys

NAME, _TARGET = "foreroute", "foreroute.evals.lm_eval_model:ForerouteLM"


def register() -> None:
    """Add the model type to lm-eval's table; its code is imported when first used."""
    # First, as lm-eval fills its table only while that is empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=_TARGET)


def register_when_lm_eval_runs() -> None:
    """The entry point that torch calls on import."""
    if "lm_eval" not in sys.modules:
        return
    try:
        register()
    except (ImportError, AttributeError):
        # An unknown version of lm-eval, which will say that it lacks the model: torch must still start.
        return


def main() -> None:
    """Run lm-eval's command line with the model type registered."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"{error}. Install lm-eval: pip install 'foreroute[eval]'")
    cli_evaluate()


if __name__ == "__main__":
    main()
