"""Importing the package gives the merged models the decode kernel, cheaply; alone they do without."""

from __future__ import annotations

import subprocess
import sys

import torch

import dha_peft
from dha_peft.kernels import decode_kernel
from dha_peft.models import decode


def test_the_package_plugs_its_kernel_in():
    assert dha_peft.models.decode is decode and decode._kernel is decode_kernel


def test_importing_the_package_imports_no_triton():
    code = "import torch, transformers, peft, sys; had = 'triton' in sys.modules; import dha_peft; sys.exit(not had and 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_off_the_gpu_the_kernel_declines_and_the_step_is_grouped():
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 1, 5, 8)
    maps = decode.HeadMaps([0, 1, 0, 1], [0, 0, 0, 0])
    assert decode_kernel(q, k, v, maps.key_map, maps.value_map, 1.0) is None
    with torch.no_grad():
        out, _ = decode.decode_attention(q, k, v, maps, 0.5, None)
    want, _ = decode.grouped_attention(q, k, v, maps, 0.5)
    torch.testing.assert_close(out, want.transpose(1, 2))
