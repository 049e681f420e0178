"""The teacher's answers on disk: the `k` largest next-token log-probabilities of every token, so that healing needs no second model.

`write_teacher_cache` goes once over the batches, `TeacherCache` gives them back in the same order, and `topk_kl` is the loss. All that lies
outside of the `k` tokens counts as one event with the remaining mass, so with `k` equal to the vocabulary the loss is the exact KL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

FORMAT = 1
INDEX = "teacher_cache.json"
"""Written last: a folder without it holds no whole cache."""
MOST_OPEN = 16
"""Shards that `CachedRows` keeps open."""
FIELDS = {"input_ids": torch.long, "attention_mask": torch.long, "indices": torch.long, "log_probs": torch.float32, "rest": torch.float32}  # fmt: skip
"""What a batch holds, and the types in which it is given back."""


def write_teacher_cache(
    teacher: nn.Module,
    batches: Iterable[dict[str, Any]],
    folder: str | Path,
    k: int = 64,
    dtype: torch.dtype = torch.float16,
    shard_tokens: int = 262_144,
    chunk: int = 8192,
) -> TeacherCache:
    """Run the teacher over `batches` and save its answers; shards that an interrupted run left in `folder` are written anew.

    Args:
        teacher: a model with `logits`; where it runs, and under which autocast, is the caller's choice.
        batches: dicts with `input_ids` `[B, T]` and, if padded, `attention_mask`.
        k: log-probabilities kept per token. A token takes `4 k` bytes with a vocabulary below 32,768, else `6 k`, and 9 more.
        dtype: of the log-probabilities on disk.
        shard_tokens: a shard is closed once it holds as many tokens.
        chunk: tokens whose logits exist at a time, though at least those of one row.

    Raises:
        ValueError: the folder holds a whole cache already, `k` is no number of tokens, or there is no batch.
    """
    folder = Path(folder)
    _make_room(folder, k)
    shards: list[dict[str, Any]] = []
    waiting: list[dict[str, Tensor]] = []
    for batch in batches:
        waiting.append(_answers(teacher, batch, k, dtype, chunk))
        if sum(part["input_ids"].numel() for part in waiting) >= shard_tokens:
            shards.append(_write_shard(folder, len(shards), waiting))
            waiting = []
    if waiting:
        shards.append(_write_shard(folder, len(shards), waiting))
    if not shards:
        raise ValueError("`batches` yields no batch, so there is nothing to cache; pass at least one.")
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps({"format": FORMAT, "k": k, "shards": shards}))
    partial.replace(folder / INDEX)
    return TeacherCache(folder)


class TeacherCache:
    """A whole cache as an iterable of batches: `input_ids` and `attention_mask` `[B, T]`, `indices` and `log_probs` `[B, T, k]`, and `rest`
    `[B, T]`, the mass of all other tokens. One batch is in memory at a time.

    Raises:
        ValueError: the folder holds no whole cache, or one of another format.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = Path(folder), str(device)
        if not (self.folder / INDEX).is_file():
            raise ValueError(
                f"`{self.folder}` holds no whole teacher cache: `{INDEX}`, which is written last, is missing; "
                "write it again with `write_teacher_cache`."
            )
        facts = json.loads((self.folder / INDEX).read_text())
        if facts["format"] != FORMAT:
            raise ValueError(
                f"`{self.folder}` has the format {facts['format']}, but this version reads {FORMAT}; write it again."
            )
        self.k, self.shards = facts["k"], facts["shards"]
        for number, shard in enumerate(self.shards):
            path = self.folder / _shard_name(number)
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise ValueError(f"`{path}` is missing or cut short; copy the whole folder, or write it again.")

    def __len__(self) -> int:
        """Number of batches."""
        return sum(shard["batches"] for shard in self.shards)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number, shard in enumerate(self.shards):
            with safe_open(self.folder / _shard_name(number), "pt", device=self.device) as file:
                for index in range(shard["batches"]):
                    yield {name: file.get_tensor(f"{index}.{name}").to(dtype) for name, dtype in FIELDS.items()}


class CachedRows(Dataset):
    """The rows of a cache as a map-style dataset, for a Trainer that draws its own batches: `input_ids` and `attention_mask` `[T]`,
    `indices` and `log_probs` `[T, k]`, `rest` `[T]`. Only the row that is asked for is read. Rows of several lengths need a collator of yours."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self._files: dict[int, Any] = {}
        self._places = [
            (number, index, row)
            for number, shard in enumerate(cache.shards)
            for index, count in enumerate(shard["rows"])
            for row in range(count)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        number, index, row = self._places[place]
        file = self._file(number)
        return {name: file.get_slice(f"{index}.{name}")[row].to(dtype) for name, dtype in FIELDS.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Workers of a DataLoader open the files themselves."""
        return {**self.__dict__, "_files": {}}

    def _file(self, number: int) -> Any:
        """An open shard; the one that was opened first makes room."""
        if number not in self._files:
            if len(self._files) == MOST_OPEN:
                self._files.pop(next(iter(self._files))).__exit__(None, None, None)
            self._files[number] = safe_open(self.cache.folder / _shard_name(number), "pt").__enter__()
        return self._files[number]


def topk_kl(student_logits: Tensor, indices: Tensor, log_probs: Tensor, rest: Tensor | None = None) -> Tensor:
    """`KL(teacher || student)` of every token, `[...]`, with all tokens outside of the top `k` as one event.

    `student_logits` `[..., V]`, `indices` and `log_probs` `[..., k]`, `rest` `[...]` the teacher's remaining mass; None takes
    `1 - sum exp(log_probs)`, which rounded log-probabilities give less exactly. Grouping tokens can only lower a KL: this is a lower bound of
    the exact one, and the exact one for `k = V`.
    """
    log_probs = log_probs.float()
    student = torch.log_softmax(student_logits.float(), dim=-1)
    loss = (log_probs.exp() * (log_probs - student.gather(-1, indices))).sum(-1)
    if indices.shape[-1] == student.shape[-1]:
        return loss
    mass = (1 - log_probs.exp().sum(-1) if rest is None else rest).clamp_min(0)
    others = student.scatter(-1, indices, float("-inf")).logsumexp(-1)
    return loss + torch.special.xlogy(mass, mass) - mass * others


@torch.no_grad()
def _answers(teacher: nn.Module, batch: dict[str, Any], k: int, dtype: torch.dtype, chunk: int) -> dict[str, Tensor]:
    """One batch as it is stored, on the CPU."""
    device, ids = next(teacher.parameters()).device, batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    rows, parts, training = max(chunk // ids.shape[1], 1), [], teacher.training
    teacher.eval()
    for part, part_mask in zip(ids.split(rows), mask.split(rows), strict=True):
        logits = teacher(input_ids=part.to(device), attention_mask=part_mask.to(device), use_cache=False).logits
        top = torch.log_softmax(logits.float(), dim=-1).topk(min(k, logits.shape[-1]), dim=-1)
        rest = (1 - top.values.double().exp().sum(-1)).clamp_min(0).float()
        small = torch.int16 if logits.shape[-1] <= 2**15 else torch.int32
        parts.append((top.indices.to(small), top.values.to(dtype), rest))
    teacher.train(training)
    indices, log_probs, rest = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    stored = {"input_ids": ids.to(torch.int32), "attention_mask": mask.to(torch.bool)}
    return {name: t.cpu() for name, t in stored.items()} | {"indices": indices, "log_probs": log_probs, "rest": rest}


def _make_room(folder: Path, k: int) -> None:
    if (folder / INDEX).exists():
        raise ValueError(
            f"`{folder}` holds a whole teacher cache; read it with `TeacherCache`, or give another folder."
        )
    if k < 1:
        raise ValueError(f"`k` is {k}, but it is the number of log-probabilities kept per token; choose at least 1.")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("shard-*.safetensors"):
        stale.unlink()


def _write_shard(folder: Path, number: int, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Save the batches of one shard, and say what it holds."""
    path = folder / _shard_name(number)
    save_file({f"{i}.{name}": t.contiguous() for i, batch in enumerate(batches) for name, t in batch.items()}, path)
    rows = [len(batch["input_ids"]) for batch in batches]
    return {"batches": len(batches), "rows": rows, "bytes": path.stat().st_size}


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
