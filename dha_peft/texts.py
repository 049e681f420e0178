"""Text files to batches of tokens, and the loss of a model on them."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


def read_texts(paths: Iterable[str | Path]) -> Iterator[str]:
    """Texts of `.txt` files (one text each) and `.jsonl` files (key `text`), plain or compressed (`.gz`, `.xz`).

    Raises:
        ValueError: a file that does not exist or is not UTF-8, or a line that is no JSON object with `text`.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"the text file `{path}` does not exist; give a .txt or .jsonl file.")
        try:
            with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
                if ".jsonl" in path.suffixes:
                    yield from (_row(path, number, line) for number, line in enumerate(file, 1))
                else:
                    yield file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"`{path}` is no text in UTF-8 ({error.reason}); convert it first.") from error


def _row(path: Path, number: int, line: str) -> str:
    try:
        return json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        what = "is no JSON with a key `text`" if isinstance(error, json.JSONDecodeError) else "has no key `text`"
        raise ValueError(f"line {number} of `{path}` {what}; every line is to be an object with that key.") from error


def text_tokens(tokenizer: Any, paths: Iterable[str | Path], tokens: int) -> Tensor:
    """The first `tokens` tokens of the texts, `[N]`; each text is preceded by the tokenizer's BOS (or EOS) token if it has one."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = []
    for text in read_texts(paths):
        ids += [start] if start is not None else []
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            break
    return torch.tensor(ids[:tokens])


def token_batches(
    tokenizer: Any, paths: Iterable[str | Path], tokens: int, length: int = 512, batch_size: int = 8
) -> list[dict[str, Tensor]]:
    """About `tokens` tokens of the texts as batches of `input_ids` `[batch_size, length]`, for calibration or training.

    Raises:
        ValueError: the texts hold less than one row of `length` tokens.
    """
    ids = text_tokens(tokenizer, paths, tokens)
    rows = ids[: len(ids) // length * length].view(-1, length)
    if not len(rows):
        raise ValueError(f"the text files hold {len(ids)} tokens, less than one row of {length}; give more text.")
    return [{"input_ids": batch} for batch in rows.split(batch_size)]


@torch.no_grad()
def evaluate_loss(
    model: nn.Module, ids: Tensor, length: int = 512, windows: int | None = None, batch_size: int = 8
) -> float:
    """Mean next-token loss in nats over consecutive windows of `length` predicted tokens; neighbours overlap by the one
    target token. bfloat16 autocast."""
    count = (len(ids) - 1) // length if windows is None else min(windows, (len(ids) - 1) // length)
    rows = torch.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)])
    device, total, training = next(model.parameters()).device, 0.0, model.training
    model.eval()
    for batch in tqdm(rows.split(batch_size), desc="evaluating", unit="batch", disable=None, leave=False):
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        total += float(
            nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        )
    model.train(training)
    return total / (count * length)
