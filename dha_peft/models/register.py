"""Registration of the merged models with transformers' Auto classes, and of families that users add."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from . import configuration_dha
from .configuration_dha import CONFIGS
from .families import FAMILIES
from .family import TASKS, Family
from .modeling_dha import MODELS

MERGED_TO_BASE: dict[str, str] = {family.merged_type: name for name, family in FAMILIES.items()}
"""Merged model type -> base model type ("dha_llama" -> "llama")."""


class LazyConfig(type):
    """A stand-in for a merged type's config class, which is made when transformers first does anything with it.

    `AutoConfig` keeps it under the model type. Making the class registers it, and the family's models, in its place.
    """

    model_type: str

    def __getattr__(cls, name: str) -> Any:
        return getattr(CONFIGS[cls.model_type], name)

    def __call__(cls, *args: Any, **kwargs: Any) -> PretrainedConfig:
        return CONFIGS[cls.model_type](*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, CONFIGS[cls.model_type])

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, CONFIGS[cls.model_type])


# transformers' table of configs can be pickled, and so its entries must be.
copyreg.pickle(LazyConfig, lambda cls: (_config_class, (cls.model_type,)))


def _config_class(merged_type: str) -> type:
    return CONFIGS[merged_type]


def register() -> None:
    """Make `AutoConfig`, `AutoModel`, ... know the merged types; safe to call again."""
    CONFIGS.after = _register_classes
    for family in FAMILIES.values():
        # A family that the installed transformers lacks must not break the others.
        if family.model_type in transformers.CONFIG_MAPPING and family.merged_type not in CONFIGS:
            body = {"__module__": configuration_dha.__name__, "model_type": family.merged_type}
            stand_in = LazyConfig(f"Dha{family.prefix}Config", (), body)
            transformers.AutoConfig.register(family.merged_type, stand_in, exist_ok=True)


def register_family(classes: Mapping[str, type], **row: Any) -> Family:
    """Teach the package a model family that it does not know, such as a model of remote code.

    Args:
        classes: the base's classes by Auto class: `"AutoConfig"` and `"AutoModel"` (the trunk), and any of
            `"AutoModelForCausalLM"`, `"AutoModelForSequenceClassification"`, ... that should be convertible.
        row: where the attention lives and how it is laid out: `layers`, `attention`, `q`, `k`, `v`, `o`, `packing`,
            `position`, ... (see `Family`; the defaults fit a model laid out like Llama).

    Returns:
        The new row. Merged checkpoints of such a family load wherever this call was made before; they ship no remote code.

    Raises:
        ValueError: a class is missing or is none of transformers', an unknown field, or a model type that is taken.

    Example:

        ```py
        >>> config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        >>> model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        >>> classes = {"AutoConfig": type(config), "AutoModel": type(model.model), "AutoModelForCausalLM": type(model)}
        >>> register_family(classes, layers="layers", attention="self_attn", q="q_proj", k="k_proj", v="v_proj", o="o_proj")
        ```
    """
    by_ending = _checked_classes(classes)
    unknown = set(row) - (set(Family.__dataclass_fields__) - {"model_type", "prefix", "classes", "names", "folder"})
    if unknown:
        raise ValueError(f"`register_family` got {sorted(unknown)}, which are no fields of a family; see `Family`.")
    model_type = by_ending["Config"].model_type
    known = FAMILIES.get(model_type)
    if not model_type or (known and known.ships):
        raise ValueError(
            f'`classes["AutoConfig"]` has the model type {model_type!r}, which is '
            f"{'a family of the table already' if model_type else 'empty'}; give the config class a model type of its own."
        )
    prefix = by_ending["Config"].__name__.removesuffix("Config")
    family = FAMILIES[model_type] = Family(model_type, prefix, classes=by_ending, **row)
    MERGED_TO_BASE[family.merged_type] = model_type
    for table in (MODELS, CONFIGS):
        table.pop(family.merged_type, None)
    CONFIGS[family.merged_type]  # registers it and its models
    return family


def _checked_classes(classes: Mapping[str, type]) -> dict[str, type]:
    endings = {"AutoConfig": "Config", **TASKS}
    for auto in ("AutoConfig", "AutoModel"):
        if auto not in classes:
            raise ValueError(f"`classes` has no `{auto}`; give the base's config class and its trunk, the bare model.")
    for auto, cls in classes.items():
        parent = PretrainedConfig if auto == "AutoConfig" else PreTrainedModel
        if auto not in endings or not (isinstance(cls, type) and issubclass(cls, parent)):
            raise ValueError(
                f'`classes["{auto}"]` is {cls!r}; keys are {", ".join(endings)}, and values are subclasses of '
                f"`{parent.__name__}`."
            )
    return {endings[auto]: cls for auto, cls in classes.items()}


def _register_classes(merged_type: str) -> None:
    config = CONFIGS[merged_type]
    transformers.AutoConfig.register(merged_type, config, exist_ok=True)
    for auto, model in MODELS[merged_type].items():
        getattr(transformers, auto).register(config, model, exist_ok=True)
