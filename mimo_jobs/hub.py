"""``model=``: a local directory, or a Hugging Face Hub id that is downloaded (resumed, if it was cut short)."""

import os
import re

from mimo_jobs import paths
from mimo_jobs.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def local_directory(model: str) -> str | None:
    """The absolute path when ``model`` names a directory, or None when it can only be a hub id.

    Raises:
        UserError: neither.
    """
    path = paths.absolute(model)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise UserError(f"model={model} is a file; give the directory that holds it")
    if not HUB_ID.fullmatch(model):
        raise UserError(f"model={model}: no such directory (a hub id looks like Qwen/Qwen3.5-0.8B)")
    return None


def snapshot(model: str, download: bool = True) -> str:
    """The directory of a hub id's files, downloaded with a progress bar unless they are in the cache already.

    Raises:
        UserError: not in the cache and it cannot be downloaded; says what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return snapshot_download(model, allow_patterns=list(FILES), local_files_only=not download)
    except GatedRepoError as error:
        raise UserError(f"model={model} is gated: accept its terms on huggingface.co, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"model={model}: no such directory, and no such model on the hub (private? run `hf auth login`)") from error
    except LocalEntryNotFoundError as error:
        why = "is not in the local cache" if not download else "is not in the local cache and the hub cannot be reached"
        raise UserError(
            f"model={model} is no local directory, {why}.\n"
            f"  On a machine with network run `hf download {model} --local-dir DIR`, then give model=DIR"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"model={model}: the download failed: {error}; run the same command again to resume it") from error
