"""What a MODEL argument names, as a directory on this machine."""

import os
import re
from importlib.resources import files
from pathlib import Path

from hasten.base.errors import CheckpointError, UnsupportedError, one_line

BUNDLED = ("code-8m",)
"""Models shipped inside the package."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken")  # never *.py, never pickles


def bundled_directory(name: str) -> Path:
    """Where a bundled model lies."""
    return Path(str(files("hasten") / "models" / name))


def locate(model: str) -> Path:
    """The directory of ``model``: a directory, a bundled model's name, or a Hub id (downloaded unless it is in the cache).

    Raises CheckpointError or UnsupportedError in one line saying what was tried."""
    try:
        path = Path(model).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a folder nobody may enter, a ~user nobody knows
        raise CheckpointError(f"no model {one_line(model)}: {getattr(error, 'strerror', None) or error}") from None
    if model and is_directory:
        return path
    if is_file:
        raise UnsupportedError(
            f"{model}: a single file is not a model, unless it is a .gguf; give the directory that holds config.json and *.safetensors"
        )
    if model in BUNDLED:
        return bundled_directory(model)
    if HUB_ID.fullmatch(model) and not model.startswith((".", "/", "~")):
        return _from_hub(model)
    raise CheckpointError(
        f"no model {one_line(model)}: not a directory, not bundled ({', '.join(BUNDLED)}), not a Hub id (org/name), not random:SHAPE"
    )


def _from_hub(model: str) -> Path:
    # The hub client retries for minutes on a dead network; one short attempt is what a person at a prompt wants.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"no model {model!r} on the Hub, and no such directory here; check the name, or log in if it is gated"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = one_line(str(error).strip().split("\n")[0], 100)
        raise CheckpointError(
            f"model {model!r} is not in the local Hub cache and the Hub cannot be reached ({reason}); connect, or give a directory"
        ) from None
    except Exception as error:  # the client's transport library is its own choice, and so are its errors
        raise CheckpointError(f"downloading {model!r} from the Hub failed: {type(error).__name__}: {one_line(str(error), 100)}") from None
