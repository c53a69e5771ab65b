"""Models and data sets on the Hugging Face hub, fetched once and then found in its cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from runtime.console import say
from runtime.errors import UserError
from runtime.extras import needs_package
from runtime.settings.config import RECORDS, hub_token

WEIGHTS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
OTHER_FORMS = ["*/*", "onnx*", "openvino*", "*.onnx"]  # of the same weights


def fetch_model(name: str) -> Path:
    """The folder of a model on the hub. Raises UserError as `fetch` does."""
    return fetch(name, "model", "BASE to the folder of a model", WEIGHTS, OTHER_FORMS)


def fetch_records(name: str) -> Path:
    """The folder of a data set on the hub, with its files of records. Raises UserError as `fetch` does."""
    return fetch(name, "dataset", "DATASET to files of records", [f"*{ending}" for ending in RECORDS], [])


def fetch(name: str, kind: str, instead: str, wanted: list[str], unwanted: list[str]) -> Path:
    """The folder of a repository on the hub, from the cache, or downloaded with a progress bar.

    kind: `model` or `dataset`. instead: what else may be set to what. HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE
    mean what they mean to huggingface_hub. Raises UserError, in one line, where the hub has no such repository, wants a
    token, or cannot be reached.
    """
    with needs_package("huggingface_hub", "pretrained"):
        from huggingface_hub import errors, snapshot_download
    here = "run or folder" if kind == "model" else "file"
    get = partial(snapshot_download, name, repo_type=kind, allow_patterns=wanted, ignore_patterns=unwanted)
    try:
        return Path(get(local_files_only=True))
    except (errors.LocalEntryNotFoundError, FileNotFoundError):
        say(f"Fetching {name} from the Hugging Face hub")
    try:
        return Path(get(token=hub_token()))
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its terms on its page on the hub, and set HF_TOKEN to a token of your account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"there is no {name} on the hub, no {here} of that name here, or it is private: then set HF_TOKEN"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{name} is not in the cache, and the hub cannot be reached (HF_HUB_OFFLINE, or no network); try again "
            f"with a network, or set {instead}"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{name} could not be fetched: {str(error).partition(chr(10))[0]}; try again") from None
