"""Configs of the merged models: the base family's config plus, per layer, which heads each query head reads."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any

from .families import FAMILIES
from .family import Family

HeadMap = list[list[int]]


class DhaConfigMixin:
    """Fields that a merged model adds to its family's config.

    Args:
        key_head_map: `[layers][query heads]`, the key head that each query head reads.
        value_head_map: `[layers][query heads]`, the value head that each query head reads.
        num_key_heads: key heads of each layer; follows from `key_head_map` if not given.
        num_value_heads: value heads of each layer; follows from `value_head_map` if not given.
        dha_plan: the plan that the model was collapsed by (`DHAPlan.to_dict()`), kept as a record.
        dha_base: name of the base model (the last part of a local path), for the model card.

    Without maps the config describes its family's own layout (`num_key_value_heads` heads of each kind).
    `num_key_value_heads` is the largest count in any layer (what a cache with one count for all has to hold); where
    keys and values have equal counts in every layer, `per_layer_config[i].num_key_value_heads` carries them for
    readers that know that standard field.

    Raises:
        ValueError: a map does not fit the number of layers or query heads, or skips a head.
    """

    dha_family: Family

    def __post_init__(
        self,
        key_head_map: HeadMap | None = None,
        value_head_map: HeadMap | None = None,
        num_key_heads: list[int] | None = None,
        num_value_heads: list[int] | None = None,
        dha_plan: dict[str, Any] | None = None,
        dha_base: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__post_init__(**kwargs)
        self.key_head_map = self._checked("key_head_map", key_head_map)
        self.value_head_map = self._checked("value_head_map", value_head_map)
        self.num_key_heads = _counts("num_key_heads", num_key_heads, self.key_head_map)
        self.num_value_heads = _counts("num_value_heads", num_value_heads, self.value_head_map)
        if "num_key_value_heads" not in self.attribute_map:
            self.num_key_value_heads = max(self.num_key_heads + self.num_value_heads)
        self.dha_plan, self.dha_base = dha_plan, dha_base
        if self.dha_family.ships:
            self.auto_map = auto_map(self.dha_family)
        self.base_model_tp_plan = _replicated_attention(self.dha_family, self.base_model_tp_plan)
        self._set_per_layer_config()

    def _checked(self, name: str, head_map: HeadMap | None) -> HeadMap:
        heads = self.dha_family.query_heads(self)
        if head_map is None:
            return [[query * (base_kv_heads(self) or count) // count for query in range(count)] for count in heads]
        if len(head_map) != len(heads):
            raise ValueError(
                f"`{name}` has {len(head_map)} layers, but the config has {len(heads)} of them; give one list each."
            )
        for index, row in enumerate(head_map):
            if len(row) != heads[index] or set(row) != set(range(max(row) + 1)):
                raise ValueError(
                    f"`{name}[{index}]` is {row}; it needs {heads[index]} entries, one per query head, "
                    "and every head from 0 to the largest must be read by some query head."
                )
        return [[int(head) for head in row] for row in head_map]

    def _set_per_layer_config(self) -> None:
        standard = "num_key_value_heads" in type(self).__dataclass_fields__ and not self.dha_family.gather
        if self.num_key_heads != self.num_value_heads or not standard:
            return
        if len(set(self.num_key_heads)) > 1:
            self.allow_global_per_layer_attribute_access = True
            self.per_layer_config = {i: {"num_key_value_heads": n} for i, n in enumerate(self.num_key_heads)}


def base_kv_heads(config: Any) -> int | None:
    """`num_key_value_heads` of a config whose layers may differ; None if it has no such field of its own."""
    if "num_key_value_heads" in config.attribute_map:  # Whisper's is another name for its encoder's query heads
        return None
    read = getattr(config, "_getattr_without_heterogeneous_validation", None)
    try:
        return read("num_key_value_heads") if read else config.num_key_value_heads
    except AttributeError:
        return None


def auto_map(family: Family) -> dict[str, str]:
    """Auto class -> "file.class" for every class of a family; goes into config.json for `trust_remote_code`."""
    entries = {auto: f"modeling_dha.Dha{family.prefix}{ending}" for auto, ending in family.tasks().items()}
    return {"AutoConfig": f"configuration_dha.Dha{family.prefix}Config", **entries}


def _counts(name: str, counts: list[int] | None, head_map: HeadMap) -> list[int]:
    derived = [max(row) + 1 for row in head_map]
    if counts is not None and list(counts) != derived:
        raise ValueError(f"`{name}` is {list(counts)}, but the head map has {derived} heads; leave `{name}` out.")
    return derived


def _replicated_attention(family: Family, plan: dict[str, str] | None) -> dict[str, str] | None:
    """Head maps reach across ranks, so tensor parallelism gathers the attention's projections."""
    if plan is None:
        return None
    paths = [path for stack in family.parts() for path in stack.attention]
    if family.gather:
        return {key: style for key, style in plan.items() if not any(f".{path}." in key for path in paths)}
    inputs = tuple(f".{path}.{name}" for path in paths for name in (family.q, family.k, family.v))
    output = tuple(f".{path}.{family.o}" for path in paths)
    styles = {key: "colwise_gather_output" if key.endswith(inputs) else style for key, style in plan.items()}
    return {key: "rowwise_split_input" if key.endswith(output) else style for key, style in styles.items()}


class ClassTable(dict[str, Any]):
    """Merged model type -> what is made for its family, when it is first asked for: importing the package makes nothing."""

    def __init__(self, make: Callable[[Family], Any]) -> None:
        super().__init__()
        self._make = make
        self.after: Callable[[str], None] = lambda merged_type: None
        """Gets the merged type of a new entry. The installed package sets it, to register what was made; for remote
        code transformers does so itself."""

    def __missing__(self, merged_type: str) -> Any:
        family = FAMILIES.get(merged_type.removeprefix("dha_"))
        if family is None or family.merged_type != merged_type or not family.available():
            raise KeyError(merged_type)
        with _LOCK:
            if merged_type not in self:
                made = self._make(family)
                # Making models makes their config, and registering that asks for the models.
                if merged_type not in self:
                    self[merged_type] = made
                    self.after(merged_type)
            return self[merged_type]


_LOCK = RLock()


def _config_class(family: Family) -> type:
    body = {
        "__module__": __name__,
        "__doc__": DhaConfigMixin.__doc__,
        "model_type": family.merged_type,
        "dha_family": family,
        "_auto_class": None,  # a base of remote code has one, and would have its checkpoints carry these files
    }
    base = family.base_class("Config")
    cls = type(
        f"Dha{family.prefix}Config", (DhaConfigMixin, base), body | ({} if family.ships else _own_defaults(base))
    )
    if family.ships:
        cls.register_for_auto_class("AutoConfig")
    return cls


def _own_defaults(base: type) -> dict[str, Any]:
    """Defaults that a config of remote code sets in its `__init__`: configs are data classes, so a subclass does not run it."""
    try:
        fields = vars(base())
    except (AttributeError, TypeError, ValueError):  # its fields have no defaults
        return {}
    return {name: value for name, value in fields.items() if not (name.startswith("_") or hasattr(base, name))}


CONFIGS = ClassTable(_config_class)
"""Merged model type -> config class."""


def __getattr__(name: str) -> Any:
    """The config classes by name, as `from ... import`, pickle and remote code ask for them."""
    for family in FAMILIES.values():
        if name == f"Dha{family.prefix}Config" and family.available():
            return CONFIGS[family.merged_type]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(f"Dha{family.prefix}Config" for family in FAMILIES.values())})
