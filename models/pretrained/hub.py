"""Models on the Hugging Face hub, fetched once and then found in its cache."""

from __future__ import annotations

from pathlib import Path

from runtime.console import say
from runtime.errors import UserError
from runtime.extras import needs_package
from runtime.settings.config import hub_token

WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
UNWANTED = ["*/*", "onnx*", "openvino*", "*.onnx"]  # other forms of the same weights


def fetch(name: str) -> Path:
    """The folder of a model on the hub, from the cache, or downloaded with a progress bar.

    HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to huggingface_hub. Raises UserError, in one
    line, where the hub has no such model, wants a token, or cannot be reached.
    """
    with needs_package("huggingface_hub", "pretrained"):
        from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=True))
    except (errors.LocalEntryNotFoundError, FileNotFoundError):
        say(f"Fetching {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED, token=hub_token()))
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its terms on its page on the hub, and set HF_TOKEN to a token of your account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"there is no {name} on the hub, no run or folder of that name here, or it is private: then set HF_TOKEN"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{name} is not in the cache, and the hub cannot be reached (HF_HUB_OFFLINE, or no network); try again "
            "with a network, or set BASE to the folder of a model"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{name} could not be fetched: {str(error).partition(chr(10))[0]}; try again") from None
