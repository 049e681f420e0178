"""`DHAConfig`: what a user chooses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from peft.config import PeftConfig

from ..search import SearchOptions

FUSIONS = ("aligned", "linear")
GROUPINGS = ("aligned", "cka", "contiguous", "learned")
ALLOCATIONS = ("adaptive", "uniform")


class DHAPeftType(str, Enum):
    """peft's own `PeftType` cannot be extended; what reads it needs `.value`."""

    DHA = "DHA"


@dataclass
class DHAConfig(PeftConfig):
    """
    Configuration of a [`DHAModel`], which turns multi-head attention into Decoupled-Head Attention
    (https://arxiv.org/abs/2406.06567).

    Args:
        head_budget (`float`):
            Share of all key heads and value heads to keep, in (0, 1]. Met exactly over the whole model.
        key_budget (`float`, *optional*):
            Share of key heads to keep. With it or `value_budget`, keys and values are budgeted apart; the one that is
            not given keeps `head_budget`.
        value_budget (`float`, *optional*):
            Share of value heads to keep.
        fusion (`str`):
            `"aligned"` (ours) fuses heads in their group's common frame; `"linear"` is the paper's scalar fusion (reconstruction).
        grouping (`str`):
            How groups are found: `"aligned"` (least alignment error), `"cka"` (similarity of head outputs), `"contiguous"` (GQA's
            neighbours) or `"learned"` (from the heads after the search steps of [`DHACallback`]; reconstruction of the paper's search).
        allocation (`str`):
            `"adaptive"` gives every layer its own counts of key and value heads, `"uniform"` gives all the same.
        damping (`float`):
            Exponent on a layer's sensitivity in the adaptive allocation; 1 follows it fully, 0 ignores it.
        key_weight (`float`):
            How much the error of a key head counts against that of a value head in the adaptive allocation; below 1, as training
            repairs more of it. Without effect where keys and values are budgeted apart.
        min_heads (`int`):
            Least number of key heads and of value heads per layer in the adaptive allocation.
        train_frames (`bool`):
            With `fusion="aligned"`, also train the maps into and out of the common frame.
        target_modules (`Union[list[str], str]`, *optional*):
            Names of the projections that hold keys and values; found from the model's family when not given.
        modules_to_save (`list[str]`, *optional*):
            Modules apart from the adapter to be trained and saved.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Not supported, as every layer is part of the budget; must stay empty.
        init_weights (`bool`):
            `True` starts as the base model exactly; `False` gives a random state whose groups are tied, for tests.
        plan (`dict`, *optional*):
            The groups of every layer (see `DHAPlan.to_dict`). Written by the search; give one to skip the search.
        slow_pairs (`int`, *optional*):
            How many rotary pairs of a key head the adapter mixes freely, as the base turns them slowly. Written when the adapter is made,
            and compared with the base that it is loaded onto.
    """

    head_budget: float = field(default=0.25, metadata={"help": "Share of key and value heads to keep, in (0, 1]."})
    key_budget: float | None = field(default=None, metadata={"help": "Share of key heads to keep."})
    value_budget: float | None = field(default=None, metadata={"help": "Share of value heads to keep."})
    fusion: str = field(default="aligned", metadata={"help": "'aligned' (ours) or 'linear' (the paper's)."})
    grouping: str = field(default="aligned", metadata={"help": "'aligned', 'cka', 'contiguous' or 'learned'."})
    allocation: str = field(default="adaptive", metadata={"help": "'adaptive' or 'uniform' counts per layer."})
    damping: float = field(default=0.7, metadata={"help": "Exponent on sensitivity in the adaptive allocation."})
    key_weight: float = field(default=0.8, metadata={"help": "What errors of keys count against those of values."})
    min_heads: int = field(default=1, metadata={"help": "Least key heads and value heads per layer."})
    train_frames: bool = field(default=True, metadata={"help": "Train the maps into and out of the common frame."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Projections that hold keys and values; found from the family by default."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Not supported; leave empty."})
    trainable_token_indices: Any = field(default=None, metadata={"help": "Not used; some trainers set it."})
    init_weights: bool = field(default=True, metadata={"help": "False gives a random state with tied groups."})
    plan: dict[str, Any] | None = field(default=None, metadata={"help": "Groups of every layer, as DHAPlan.to_dict."})
    slow_pairs: int | None = field(default=None, metadata={"help": "Rotary pairs mixed freely; set by the adapter."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DHAPeftType.DHA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        for name, allowed in (("fusion", FUSIONS), ("grouping", GROUPINGS), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {', '.join(map(repr, allowed))}.")
        for name in ("head_budget", "key_budget", "value_budget"):
            budget = getattr(self, name)
            if budget is None and name != "head_budget":
                continue
            if not isinstance(budget, int | float) or not 0 < budget <= 1:
                raise ValueError(
                    f"`{name}` is {budget!r}, but it is the share of heads to keep; choose a number in (0, 1]."
                )
        if not isinstance(self.min_heads, int) or self.min_heads < 1:
            raise ValueError(
                f"`min_heads` is {self.min_heads!r}, but every layer needs a head of each kind; choose 1 or more."
            )
        if not isinstance(self.damping, int | float) or not self.damping >= 0:
            raise ValueError(f"`damping` is {self.damping!r}, but it is an exponent; choose a number from 0 on.")
        if not isinstance(self.key_weight, int | float) or not 0 < self.key_weight < float("inf"):
            raise ValueError(
                f"`key_weight` is {self.key_weight!r}, but it says how much errors of keys count; choose a number above 0."
            )
        if self.exclude_modules:
            raise ValueError("`exclude_modules` is not supported: every layer is part of the budget; leave it empty.")

    def search_options(self) -> SearchOptions:
        """The part that the search reads."""
        return SearchOptions(**{option.name: getattr(self, option.name) for option in fields(SearchOptions)})
