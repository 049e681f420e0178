"""Wheel and sdist: what is in them, and what they ask for."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = {"torch", "transformers", "peft", "accelerate", "safetensors", "tqdm", "typer", "pyyaml"}
BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_wheel(out); b.build_sdist(out)"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Wheel and sdist of a copy of the sources, so that no build folder is left in the tree."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("dha_peft", "tests", "examples", "benchmarks"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "demo_model", "outputs")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def package_files() -> set[str]:
    """Everything of the package that git would know."""
    paths = (path for path in (ROOT / "dha_peft").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    assert {"dha_peft/py.typed", "dha_peft/report/templates/report.html.j2"} <= names
    assert {name for name in names if ".dist-info/" not in name} == package_files()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_asks_for_little(built):
    with zipfile.ZipFile(built[0]) as wheel:
        info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(info).decode())
        entry = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.split("<")[0].split(">")[0].split("=")[0].strip() for line in needed} == LIGHT
    assert {"train", "eval", "report", "docs", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata["License-Expression"] == "Apache-2.0" and "dha = dha_peft.cli:main" in entry


def test_the_sdist_can_build_the_wheel(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert package_files() | {"pyproject.toml", "README.md", "LICENSE"} <= names
