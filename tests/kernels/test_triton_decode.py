"""The Triton kernel against the reference, on ragged random shapes. Needs a CUDA device; skips without one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dha_peft.kernels import HAS_TRITON, dha_decode, naive_decode

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and HAS_TRITON), reason="the Triton kernel needs a CUDA device and Triton"
)
# One rounding of the probabilities and one of the output to 8 (bf16) or 11 (fp16) bits of mantissa.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=["as short caches", "as long caches", "as long caches on fast memory"])
def programs(request, monkeypatch):
    """Small shapes get the programs of short caches, then those of long ones, with loads of their own or the copy engine."""
    if request.param != "as short caches":
        from dha_peft.kernels import launch

        fast = request.param.endswith("fast memory")
        if fast and torch.cuda.get_device_capability()[0] < 9:
            pytest.skip("needs the copy engine of a Hopper GPU")
        device = replace(launch.device_of(0), bulk=fast)
        monkeypatch.setattr(launch, "_SHORT", 0)
        monkeypatch.setattr(launch, "device_of", lambda index: device)


def make(batch, heads, key_heads, value_heads, tokens, keys, dim, dtype=torch.bfloat16, seed=0, adjacent=False):
    """With `adjacent` both caches are contiguous, as the bulk copy engine needs them, and either may lie first."""
    generator = torch.Generator("cuda").manual_seed(seed)
    new = {"generator": generator, "device": "cuda", "dtype": torch.float32}
    q = torch.randn(batch, heads, tokens, dim, **new).to(dtype)
    k = torch.randn(batch, keys, key_heads, dim, **new).to(dtype).transpose(1, 2)  # strides of a transposed cache
    v = torch.randn(batch, value_heads, keys, dim, **new).to(dtype)
    if adjacent:
        room = torch.empty(k.numel() + v.numel(), device="cuda", dtype=dtype)
        k_at, v_at = (v.numel(), 0) if seed % 2 else (0, k.numel())
        k, v = (room[at : at + x.numel()].view_as(x).copy_(x) for x, at in ((k, k_at), (v, v_at)))
    maps = [torch.randint(n, (heads,), generator=generator, device="cuda") for n in (key_heads, value_heads)]
    return q, k, v, *maps


def assert_agrees(args, **options):
    out = dha_decode(*args, backend="triton", **options)
    exact = [x.double() for x in args[:3]]
    if (mask := options.get("mask")) is not None and mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        options["mask"] = mask.double().masked_fill(hidden, torch.finfo(torch.float64).min)
    want = naive_decode(*exact, *args[3:], **options)
    assert out.isfinite().all()
    error = (out.double() - want).norm() / want.norm().clamp_min(1e-9)
    assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes(dim, dtype, programs):
    for seed, adjacent in enumerate((False, True, True)):
        assert_agrees(make(2, 12, 3, 5, 1, 333, dim, dtype, seed, adjacent))


@pytest.mark.parametrize("heads", [4, 16, 32, 40, 64, 128])
@pytest.mark.parametrize("tokens", [1, 4])
def test_numbers_of_query_heads(heads, tokens, programs):
    assert_agrees(make(2, heads, 3, 4, tokens, 700, 128, adjacent=True))


@pytest.mark.parametrize("seed", range(36))
def test_ragged_random_shapes(seed, programs):
    draw = random.Random(seed)
    batch, tokens = draw.choice([1, 2, 5]), draw.choice([1, 1, 2, 3, 5])
    keys = draw.randint(tokens + 1, 3000)
    dim, dtype = draw.choice([32, 64, 80, 128]), draw.choice(list(TOLERANCE))
    args = make(
        batch, draw.choice([4, 8, 20, 32]), draw.randint(1, 13), draw.randint(1, 13), tokens, keys, dim, dtype, seed,
        adjacent=draw.random() < 0.7,
    )  # fmt: skip
    start = torch.tensor([draw.randint(0, keys - tokens) for _ in range(batch)], device="cuda")
    length = torch.tensor([draw.randint(int(s) + tokens, keys) for s in start], device="cuda")
    want_inputs = {"start": start, "length": length}
    if seed % 3 == 1:
        want_inputs = {"mask": _mask(batch, tokens, keys, start, length)}
    if seed % 3 == 2:
        seen = _mask(batch, tokens, keys, start, length)
        want_inputs = {"mask": torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)}
    assert_agrees(args, **want_inputs)


def _mask(batch, tokens, keys, start, length):
    index = torch.arange(keys, device="cuda")
    seen = (index >= start.view(-1, 1, 1, 1)) & (index < length.view(-1, 1, 1, 1))
    holes = torch.rand(batch, 1, tokens, keys, device="cuda") < 0.8
    return seen & (holes | (index == start.view(-1, 1, 1, 1)))


@pytest.mark.parametrize("keys", [1, 15, 128, 4096, 20000])
@pytest.mark.parametrize("heads", [(8, 8), (3, 13), (5, 11), (1, 32)])
def test_long_and_short_caches(keys, heads):
    batch = 9 if keys < 1000 else 3 if keys < 10000 else 1  # the reference expands every head in float64
    for adjacent in (False, True):
        assert_agrees(make(batch, 32, *heads, 1, keys, 128, adjacent=adjacent))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_any_number_of_programs(masked, dim, programs):
    from dha_peft.kernels.launch import launch_decode

    for seed, splits in enumerate((1, 3, 8, 50, 300)):
        args = make(2, 32, 3 + seed, 7, 1, 1100 + 37 * seed, dim, seed=seed, adjacent=True)
        start, length = torch.tensor([seed, 400], device="cuda"), torch.tensor([1100, 401 + 30 * seed], device="cuda")
        bounds = (
            {"mask": _mask(2, 1, args[1].shape[2], start, length)} if masked else {"start": start, "length": length}
        )
        out = launch_decode(*args, dim**-0.5, **bounds, splits=splits)
        want = naive_decode(*(x.double() for x in args[:3]), *args[3:], **bounds)
        error = (out.double() - want).norm() / want.norm()
        assert error < TOLERANCE[out.dtype], f"relative error {error:.2e} with {splits} programs"


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_what_lies_outside_of_a_sequence_is_never_read(dim, adjacent, programs):
    q, k, v, *maps = make(6, 8, 2, 3, 1, 500, dim, adjacent=adjacent)
    bounds = {
        "start": torch.tensor([0, 0, 0, 71, 72, 499], device="cuda"),
        "length": torch.tensor([1, 200, 499, 200, 199, 500], device="cuda"),
    }
    want = dha_decode(q, k, v, *maps, **bounds, backend="torch")
    for b, (begin, end) in enumerate(zip(*(x.tolist() for x in bounds.values()), strict=True)):
        for x in (k, v):
            x[b, :, :begin], x[b, :, end:] = torch.nan, torch.nan
    out = dha_decode(q, k, v, *maps, **bounds, backend="triton")
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("keys", [90, 300])
def test_more_sequences_than_programs_and_empty_ones(keys):
    args = make(300, 8, 2, 3, 1, keys, 64, adjacent=True)
    length = torch.randint(0, keys + 1, (300,), device="cuda")
    assert_agrees(args, length=length)


def test_compiled_whole_and_in_a_cuda_graph(programs):
    args = make(2, 8, 2, 3, 1, 300, 64, adjacent=True)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device="cuda")
    mask[:, :, :, 200:] = False
    compiled = torch.compile(
        lambda *a, mask: dha_decode(*a, mask=mask, backend="triton") + 1, fullgraph=True, mode="reduce-overhead"
    )
    want = dha_decode(*args, mask=mask, backend="triton") + 1
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(*args, mask=mask).clone(), want)


@pytest.mark.parametrize("compiled", [False, True])
def test_one_mask_for_all_sequences(compiled):
    args = make(5, 8, 2, 3, 1, 300, 64)
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool, device="cuda")
    mask[..., 40:200] = True
    for given in (mask, mask.expand(5, -1, -1, -1)):
        call = lambda *a: dha_decode(*a, mask=given, backend="triton")  # noqa: B023, E731
        out = torch.compile(call, fullgraph=True)(*args) if compiled else call(*args)
        torch.testing.assert_close(out, dha_decode(*args, mask=mask, backend="torch"), rtol=2e-2, atol=2e-2)


def test_operator_passes_torchs_own_checks():
    args = make(2, 8, 2, 3, 1, 64, 64)
    torch.library.opcheck(torch.ops.dha_peft.decode, (*args, 0.125), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("masked", [False, True])
def test_a_device_that_is_not_the_current_one(masked):
    args = [x.to("cuda:1") for x in make(2, 12, 3, 5, 1, 5000, 64)]
    mask = torch.rand(2, 1, 1, 5000, device="cuda:1") < 0.8 if masked else None
    assert torch.cuda.current_device() == 0
    assert_agrees(args, mask=mask)
    assert torch.cuda.current_device() == 0
