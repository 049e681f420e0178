"""`dha export`: a trained adapter merged into a model folder, or a merged model in another dtype or shard size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .console import banner, note
from .loading import dtype_of, load_model, load_tokenizer
from .output import check_free, new_folder
from .settings import Run

Source = Annotated[Path, typer.Argument(help="A result folder, or a DHA adapter that peft saved.", show_default=False)]


def export(
    source: Source,
    output: o.Output = None,
    base: Annotated[str | None, typer.Option("--base", help="The adapter's base, if it has moved.")] = None,
    dtype: o.Dtype = None,
    shard: Annotated[str, typer.Option("--max-shard-size", help="Largest weight file.")] = "5GB",
    device: o.Device = None,
) -> None:
    """Write a merged transformers checkpoint: from an adapter, or from a result in another dtype or shard size."""
    adapter = (source / "adapter_config.json").is_file()
    if not adapter and not (source / "config.json").is_file():
        raise ValueError(f"`{source}` holds neither a model nor an adapter; give a folder that was saved by either.")
    run = Run(output=str(output or ""), dtype=dtype or "auto", device=device or "auto")
    check_free(run.output)
    dtype_of(run)
    banner("export", {"source": source, "kind": "adapter" if adapter else "model", "output": run.output})
    model, tokens = _merged(source, base, run) if adapter else (load_model(str(source), run), str(source))
    with new_folder(run.output) as folder:
        model.save_pretrained(folder, max_shard_size=shard)
        load_tokenizer(tokens).save_pretrained(folder)
        for name in ("README.md", "results.json", "run.yaml"):
            if not adapter and (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
    note(f"Wrote {run.output}")


def _merged(source: Path, base: str | None, run: Run):
    from peft import PeftConfig, PeftModel

    name = base or PeftConfig.from_pretrained(source).base_model_name_or_path
    if not name:
        raise ValueError(f"the adapter `{source}` does not name its base model; pass it with `--base`.")
    return PeftModel.from_pretrained(load_model(name, run), source).merge_and_unload(), name
