"""Other adapters on the projections that DHA replaces: refused, as the collapse could not merge them."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..attention import KINDS, AttentionSite
from .layer import DHALayer

REMEDY = "which the collapse could not merge; put it on the query, output and MLP projections instead."


def refuse_nested_adapters(sites: list[AttentionSite]) -> None:
    """Raise ValueError if a key or value projection carries an adapter of another method."""
    for site in sites:
        for kind in KINDS:
            module = site.outer(kind)
            if isinstance(module, BaseTunerLayer) and not isinstance(module, DHALayer):
                name = f"{site.name}.{site.projection_name(kind)}"
                raise ValueError(f"`{name}` already carries a {_method(module)} adapter, {REMEDY}")


def refuse_adapted_model(model: nn.Module) -> None:
    """Raise ValueError if a model that is to be converted carries any adapter: its weights would be lost."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"`{name}` already carries a {_method(module)} adapter, which the conversion would drop; merge it first "
                "with `merge_and_unload()`."
            )


def refuse_peft_model(model: nn.Module) -> None:
    """Raise ValueError if a model that is to get its first DHA adapter is wrapped by peft, or has one."""
    if isinstance(model, PeftModel) or any(isinstance(module, DHALayer) for module in model.modules()):
        raise ValueError(
            f"`{type(model).__name__}` carries adapters already; call `add_adapter` of the `PeftModel` for one more, or pass the "
            "plain base, from `unload()` or `merge_and_unload()`."
        )


def guard_layers() -> None:
    """From now on, wrapping a `DHALayer` in another method's layer is an error (peft offers no check of its own here)."""
    global _guard
    if _guard is None:
        _guard = register_module_module_registration_hook(_refuse_wrapping)


_guard: Any = None


def _refuse_wrapping(parent: nn.Module, _name: str, child: Any) -> None:
    if isinstance(child, DHALayer) and isinstance(parent, BaseTunerLayer):
        raise ValueError(f"`{child.key}` carries a DHA adapter, and {_method(parent)} would wrap it, {REMEDY}")


def _method(module: nn.Module) -> str:
    """`LoRA` of `peft.tuners.lora.layer.Linear`."""
    parts = type(module).__module__.split(".")
    name = parts[parts.index("tuners") + 1] if "tuners" in parts else "dha" if isinstance(module, DHALayer) else ""
    return {"lora": "LoRA", "dha": "DHA", "": type(module).__name__}.get(name, name)
