"""`dha push`: a result folder to the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o
from .console import banner, gib, note
from .result import RESULTS, read_facts


def push(
    result: o.Result,
    repo: Annotated[str, typer.Argument(help="Repository on the hub, as in me/my-dha-model.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: o.DryRun = False,
) -> None:
    """Upload a result (weights, code, card, report) to the hub that HF_ENDPOINT and your login name."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    read_facts(result)
    files = sorted(p for p in result.rglob("*") if p.is_file() and not _hidden(p, result))
    api = HfApi()
    size = sum(p.stat().st_size for p in files)
    banner("push", {"repository": f"{api.endpoint}/{repo}", "files": f"{len(files)}, {gib(size)}"})
    for path in files:
        note(f"  {path.relative_to(result)}  {gib(path.stat().st_size)}")
    if dry_run:
        note("dry run: nothing was uploaded.")
        return
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=result, ignore_patterns=[".*"], commit_message=f"dha_peft result ({RESULTS})"
        )
    except Exception as error:  # the client's errors share no parent but this one
        raise OSError(f"the upload to {api.endpoint}/{repo} failed, and `{result}` is as it was: {error}") from error
    note(f"Uploaded to {api.endpoint}/{repo}")


def _hidden(path, root) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
