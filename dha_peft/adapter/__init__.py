"""peft's grammar for DHA: configuration, layer, tuner, and their registration."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from ..models import FAMILIES, MERGED_TO_BASE
from .config import DHAConfig, DHAPeftType
from .layer import DHALayer
from .model import DHAModel
from .nesting import guard_layers


def register() -> None:
    """Make peft know the method, and LoRA the merged models; safe to call again."""
    PEFT_TYPE_TO_CONFIG_MAPPING[DHAPeftType.DHA] = DHAConfig
    PEFT_TYPE_TO_TUNER_MAPPING[DHAPeftType.DHA] = DHAModel
    PEFT_TYPE_TO_PREFIX_MAPPING[DHAPeftType.DHA] = DHAModel.prefix
    guard_layers()
    for merged, base in MERGED_TO_BASE.items():
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base)
        if targets is not None:
            TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(merged, _merged_targets(base, targets))


def _merged_targets(base: str, targets: list[str]) -> list[str]:
    """LoRA's targets in the merged model, where the stored heads of some families are one module further in."""
    family = FAMILIES[base]
    inner = {family.k, family.v} if family.gather else set()
    return [f"{name}.heads" if name in inner else name for name in targets]


__all__ = ["DHAConfig", "DHALayer", "DHAModel", "DHAPeftType", "register"]
