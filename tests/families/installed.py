"""Which model types of the installed transformers have experts that can be found: behind the seam, or by an adapter."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from foreroute.model.adapters.registry import ADAPTERS, REFUSED

_SEAM = "@use_experts_implementation"


@dataclass(frozen=True)
class Family:
    """A model type. module: its modeling module. is_causal, is_multimodal: the Auto classes that know it."""

    model_type: str
    module: str
    is_causal: bool
    is_multimodal: bool

    @property
    def can_generate_text(self) -> bool:
        """Some Auto class makes a model of it that continues text."""
        return self.is_causal or self.is_multimodal


@cache
def seam_modules() -> tuple[str, ...]:
    """Modeling modules whose source decorates an experts class; reading it is faster than importing them all."""
    import transformers

    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    return tuple(sorted({file.parent.name for file in files if _SEAM in file.read_text()}))


@cache
def adapted_modules() -> tuple[str, ...]:
    """Modeling modules with an adapter, of those that this transformers has."""
    return _present({one.MODULE for one in ADAPTERS})


@cache
def refused_modules() -> tuple[str, ...]:
    """Modeling modules whose experts are named as those that no adapter can serve."""
    return _present(set(REFUSED))


def _present(modules: set[str]) -> tuple[str, ...]:
    import transformers

    models = Path(transformers.__file__).parent / "models"
    return tuple(sorted(one for one in modules if (models / one).is_dir()))


@cache
def families() -> tuple[Family, ...]:
    """Every model type of these modules that is a checkpoint's own, in order of name."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    multimodal = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found = [
        Family(model_type, model_type_to_module_name(model_type), model_type in causal, model_type in multimodal)
        for model_type in CONFIG_MAPPING_NAMES
        if model_type_to_module_name(model_type) in {*seam_modules(), *adapted_modules(), *refused_modules()}
    ]
    found = [family for family in found if family.model_type not in encoder_decoders()]
    usable = {family.module for family in found if family.can_generate_text}
    return tuple(f for f in found if f.can_generate_text or (f.module not in usable and f.model_type == f.module))


@cache
def encoder_decoders() -> dict[str, str]:
    """Those of the adapted modules that encode a prompt, and write in a decoder, by model type (tests/seq2seq)."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    found = {one: model_type_to_module_name(one) for one in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    return {one: module for one, module in sorted(found.items()) if module in adapted_modules()}
