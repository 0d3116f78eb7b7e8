"""How lm-eval's own command line comes to know the model type `foreroute`.

    lm_eval --model foreroute --model_args pretrained=MODEL,memory=25% --tasks arc_easy

lm-eval (0.4.13) has a fixed table of model types and no plug-in point. torch has one: it calls whatever is installed
under the entry point group `torch.backends` whenever it is imported. Ours (pyproject.toml) does nothing, unless it is
lm-eval that imports torch. Where torch came first, or TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns those calls off, the same
command line with the same flags is

    python -m foreroute.evals.lm_eval --model foreroute ...

This module is imported with every torch: it may import nothing that takes time.
"""

import sys

NAME, _TARGET = "foreroute", "foreroute.evals.lm_eval_model:ForerouteLM"


def register() -> None:
    """Tell lm-eval where the model type is; its code is imported once it is asked for."""
    # First, as lm-eval fills its table only when it finds it empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=_TARGET)


def register_when_lm_eval_runs() -> None:
    """What torch calls when it is imported."""
    if "lm_eval" not in sys.modules:
        return
    try:
        register()
    except (ImportError, AttributeError):
        # Another lm-eval, which will say that it has no such model: no reason for torch not to start.
        return


def main() -> None:
    """lm-eval's command line, with the model type in its table."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"{error}. Install lm-eval: pip install 'foreroute[eval]'")
    cli_evaluate()


if __name__ == "__main__":
    main()
