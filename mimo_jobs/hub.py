"""``model=``: a local directory, or a Hugging Face Hub id that is downloaded (resumed, if it was cut short)."""

import os
import re

from mimo_jobs import paths
from mimo_jobs.errors import UserError

# org/name as huggingface_hub accepts it (huggingface_hub.utils.validate_repo_id)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")


def locate_model(model: str, download: bool = True, field: str = "model") -> str:
    """The absolute directory of ``model``: as it is, or of a hub id's files, downloaded or found in the cache.

    Args:
        download: false looks only into the cache.
        field: what to call it in an error.

    Raises:
        UserError: neither a directory nor a hub id, or not in the cache and it cannot be downloaded; says what to do.
    """
    path = paths.absolute(model)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise UserError(f"{field}={model} is a file; give the directory that holds it")
    if os.path.isabs(model) or model.startswith((".", "~")) or not HUB_ID.fullmatch(model):
        raise UserError(f"{field}={model}: no such directory (a hub id looks like Qwen/Qwen3.5-0.8B)")
    return _snapshot(model, download, field)


def _snapshot(model: str, download: bool, field: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return os.path.abspath(snapshot_download(model, allow_patterns=list(FILES), local_files_only=not download))
    except GatedRepoError as error:
        raise UserError(
            f"{field}={model} is gated: accept its terms on huggingface.co, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        missing = "no such directory, and no such model on the hub (private? run `hf auth login`)"
        raise UserError(f"{field}={model}: {missing}") from error
    except LocalEntryNotFoundError as error:
        why = "is not in the local cache" + (" and the hub cannot be reached" if download else "")
        raise UserError(
            f"{field}={model} is no local directory, {why}.\n"
            f"  Where there is a network, run `hf download {model} --local-dir DIR`; then give {field}=DIR"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{field}={model}: the download failed: {error}; run the same command again to resume it"
        ) from error
