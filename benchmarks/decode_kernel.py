"""Decode attention alone: ours beside what torch offers, on caches of equal bytes and on the MHA base's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from decode_measure import Result, time_calls
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dha_peft.kernels import dha_decode
from dha_peft.models.decode import grouped_attention
from dha_peft.models.maps import HeadMaps


@dataclass(frozen=True)
class Shape:
    batch: int
    context: int
    query_heads: int
    key_heads: int
    value_heads: int
    head_dim: int

    def bytes(self, key_heads: int, value_heads: int) -> int:
        return self.batch * self.context * (key_heads + value_heads) * self.head_dim * 2


def random_map(heads: int, queries: int) -> Tensor:
    """`[queries]`: every head is read by some query head, in random order."""
    reads = torch.cat([torch.arange(heads), torch.randint(heads, (queries - heads,))])
    return reads[torch.randperm(queries)]


def kernel_results(
    shape: Shape, device: torch.device, dtype: torch.dtype, copy: float, rivals: set[str]
) -> Iterator[Result]:
    """Measure one shape. Several caches take turns, so that none of them stays in the chip's own cache."""
    for name, key_heads, value_heads, make in _contestants(shape, device):
        if name.split()[0] not in rivals and not name.startswith("dha"):
            continue
        size = shape.bytes(key_heads, value_heads) * (2 if dtype == torch.float32 else 1)
        result = Result(
            "kernel", name, shape.batch, shape.context, shape.query_heads, key_heads, value_heads, shape.head_dim,
            str(dtype).removeprefix("torch."), _device_name(device),
        )  # fmt: skip
        try:
            result.ms = _measure(make, shape, key_heads, value_heads, size, device, dtype)
            result.gb_s = size / result.ms / 1e6
            result.share_of_copy = result.gb_s / copy
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            result.note = str(error).splitlines()[0][:120]
        yield result


def _measure(make, shape: Shape, key_heads: int, value_heads: int, size: int, device, dtype) -> float:
    turns = max(2, -(-3 * 2**28 // size)) if device.type == "cuda" else 2
    new = {"device": device, "dtype": dtype}
    q = torch.randn(shape.batch, shape.query_heads, 1, shape.head_dim, **new)
    rows = (shape.context, shape.head_dim)
    caches = [
        (torch.randn(shape.batch, key_heads, *rows, **new), torch.randn(shape.batch, value_heads, *rows, **new))
        for _ in range(turns)
    ]
    call = make(shape, device)
    # About 10 ms of work per run on a GPU; a few calls elsewhere.
    calls = max(turns, min(200, round(10 / (size / 4e9)))) if device.type == "cuda" else 3
    with torch.no_grad():
        return time_calls(lambda index: call(q, *caches[index % turns]), calls, device)


Make = Callable[[Shape, torch.device], Callable[[Tensor, Tensor, Tensor], Tensor]]


def _contestants(shape: Shape, device: torch.device) -> Iterator[tuple[str, int, int, Make]]:
    """(name, key heads, value heads, maker of the function). Equal bytes: GQA of the mean head count."""
    queries, keys, values = shape.query_heads, shape.key_heads, shape.value_heads
    group = (keys + values) // 2
    if device.type == "cuda":
        yield "dha kernel", keys, values, _dha
    yield "dha grouped torch", keys, values, _grouped
    if device.type != "cuda":
        yield "sdpa mha", queries, queries, _sdpa(None)
    if queries % group == 0:
        for name, backend in _backends(device):
            yield f"{name} gqa", group, group, _sdpa(backend)
    if device.type == "cuda":
        if queries % group == 0:
            yield "flex gqa", group, group, _flex
            yield "flashinfer gqa", group, group, _flashinfer
        for name, backend in _backends(device):
            yield f"{name} mha", queries, queries, _sdpa(backend)
    yield "expand then sdpa", keys, values, _expand


def _backends(device: torch.device) -> list[tuple[str, SDPBackend | None]]:
    if device.type != "cuda":
        return [("sdpa", None)]
    return [("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)]


def _dha(shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    maps = [random_map(n, shape.query_heads).to(device) for n in (shape.key_heads, shape.value_heads)]
    length = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
    return lambda q, k, v: dha_decode(q, k, v, *maps, length=length, backend="triton")


def _grouped(shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    maps = HeadMaps(*(random_map(n, shape.query_heads).tolist() for n in (shape.key_heads, shape.value_heads))).to(
        device
    )
    return lambda q, k, v: grouped_attention(q, k, v, maps, shape.head_dim**-0.5)[0]


def _expand(shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    keys, values = (random_map(n, shape.query_heads).to(device) for n in (shape.key_heads, shape.value_heads))
    return lambda q, k, v: F.scaled_dot_product_attention(q, k.index_select(1, keys), v.index_select(1, values))


def _sdpa(backend: SDPBackend | None) -> Make:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = k.shape[1] != q.shape[1]
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    return lambda shape, device: call


def _flex(shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, enable_gqa=True)


def _flashinfer(shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Needs the package and CUDA's compiler. The caches are taken for pages of 16 tokens, for as much work."""
    import flashinfer

    page, pages = 16, shape.batch * shape.context // 16
    workspace = torch.empty(2**28, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    index = torch.arange(pages + 1, dtype=torch.int32, device=device)
    last = torch.full((shape.batch,), page, dtype=torch.int32, device=device)
    heads, per_sequence = (shape.key_heads + shape.value_heads) // 2, pages // shape.batch
    new = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(
        index[::per_sequence].contiguous(), index[:-1], last, shape.query_heads, heads, shape.head_dim, page, **new
    )
    paged = lambda x: x.view(pages, heads, page, shape.head_dim)  # noqa: E731
    return lambda q, k, v: wrapper.run(q[:, :, 0].contiguous(), (paged(k), paged(v))).unsqueeze(2)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
