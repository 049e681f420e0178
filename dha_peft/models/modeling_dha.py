"""The merged models of all families, made from the table in `families.py`.

`DhaLlamaModel`, `DhaLlamaForCausalLM`, `DhaLlamaForSequenceClassification`, ... are the family's own classes with
`DhaMixin` before them. This file and those that it imports are saved with every checkpoint (remote code).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel

from .attention import convert_attention
from .configuration_dha import CONFIGS, ClassTable
from .families import FAMILIES
from .family import SEQ2SEQ, TASKS, Family
from .fused import fuse_projections, unfuse_projections
from .maps import HeadMaps
from .norms import QueryTurn, SharedNorm
from .packing import HeadLinear


class DhaInit:
    """Initialises the modules that a merged model adds; also mixed into models inside of the trunk (OPT's decoder)."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (HeadMaps, HeadLinear)):
            module.reset_buffers()
        if isinstance(module, (QueryTurn, SharedNorm)):
            module.reset_parameters()


@cache
def _inner_class(base: type) -> type:
    return type(f"Dha{base.__name__}", (DhaInit, base), {"__module__": __name__})


CardWriter = Callable[[PreTrainedModel, str], None]
_write_card: CardWriter | None = None


def set_card_writer(writer: CardWriter | None) -> None:
    """Plug in what writes a model card: `writer(model, folder)`, after a model is saved and before one is uploaded.

    Without the package, in remote code, there is none.
    """
    global _write_card
    _write_card = writer


class DhaMixin(DhaInit):
    """Builds the family's model and turns its attention modules into merged ones."""

    dha_family: Family
    dha_trunk_class: type

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # The families' task heads ask AutoModel for their trunk. In remote code `type(config)` may be loaded from
        # another copy of the files than `config_class`, so the type at hand is the one to register.
        AutoModel.register(type(config), self.dha_trunk_class, exist_ok=True)
        super().__init__(config, *args, **kwargs)
        if self.base_model is self:
            self._convert_layers()
        elif type(self.base_model) is not self.dha_trunk_class:
            # Causal models build the family's plain trunk. On the meta device, where checkpoints are loaded, that is
            # free; elsewhere it goes before the merged one is built.
            plain = self.base_model
            pooler = {"add_pooling_layer": plain.pooler is not None} if hasattr(plain, "pooler") else {}
            setattr(self, self.base_model_prefix, None)
            setattr(self, self.base_model_prefix, self.dha_trunk_class(config, **pooler))
        self.post_init()

    def _convert_layers(self) -> None:
        for index, attention in enumerate(self.dha_family.attentions(self)):
            convert_attention(attention, self.dha_family, self.config, index)
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and not isinstance(module, DhaInit):
                module.__class__ = _inner_class(type(module))

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """transformers' own, and a model card beside the weights where there is none."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if _write_card and is_main_process:
            _write_card(self, save_directory)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """The last step of `push_to_hub`, when transformers has put an empty card into the folder."""
        if _write_card:
            _write_card(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def fuse_projections(self) -> int:
        """For decoding: multiply the projections of one input (q, k and v; gate and up) at once. In place, at no memory.

        State dicts and saved checkpoints stay as they were. Adapters want the separate projections: add and merge them
        before, or call `unfuse_projections` first.

        Returns:
            How many products each forward pass saves; 0 where the layout or wrapped projections do not allow it.
        """
        return fuse_projections(self.base_model, self.dha_family)

    def unfuse_projections(self) -> None:
        """Undo `fuse_projections`."""
        unfuse_projections(self.base_model)

    def _get_static_cache_init_shape(self) -> None:
        """Static caches are initialised at the first update: keys and values have different head counts."""


def _classes(family: Family) -> dict[str, type]:
    """Auto class name -> merged class, for every task of a family."""
    body = {
        "__module__": __name__, "dha_family": family, "config_class": CONFIGS[family.merged_type], "_auto_class": None
    }  # fmt: skip
    classes: dict[str, type] = {}
    for auto, ending in family.tasks().items():
        bases = (DhaMixin, family.base_class(ending)) + (
            (GenerationMixin,) if ending in ("ForCausalLM", SEQ2SEQ) else ()
        )
        cls = type(
            f"Dha{family.prefix}{ending}", bases, {**body, "__doc__": f"{family.prefix}{ending} with fused heads."}
        )
        if family.ships:
            cls.register_for_auto_class(auto)
        classes[auto] = cls
    trunk = classes["AutoModel"]
    for cls in classes.values():
        cls.dha_trunk_class = trunk
    if family.dispatch and any(a.kind is a.VAR_KEYWORD for a in inspect.signature(trunk.forward).parameters.values()):
        trunk.forward = _with_step(trunk.forward)
    return classes


def _with_step(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A trunk's forward that hands its layers a list for what follows from their common mask: found once, used by all."""

    @wraps(forward)
    def with_step(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if torch.is_grad_enabled() else forward(*args, dha_step=[], **kwargs)

    return with_step


MODELS = ClassTable(_classes)
"""Merged model type -> Auto class name -> merged class."""


def __getattr__(name: str) -> Any:
    """The classes by name, as `from ... import`, pickle and remote code ask for them."""
    for family in FAMILIES.values():
        if name in _names(family) and family.available():
            for cls in MODELS[family.merged_type].values():
                if cls.__name__ == name:
                    return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for family in FAMILIES.values() for name in _names(family))})


def _names(family: Family) -> set[str]:
    """What the classes of a family may be called, without a look at transformers' modelling file."""
    return {f"Dha{family.prefix}{ending}" for ending in (*TASKS.values(), SEQ2SEQ)}
