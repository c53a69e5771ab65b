"""Models and data sets on the Hugging Face hub, fetched once and then found in its cache."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from runtime.console import say
from runtime.errors import UserError
from runtime.extras import needs_package
from runtime.settings.config import RECORDS, hub_token

WEIGHTS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
OTHER_FORMS = ["*/*", "onnx*", "openvino*", "*.onnx"]  # of the same weights
CONFIG = "config.json"
FILES = "DATASET to files of records"


def fetch_model(name: str) -> Path:
    """The folder of a model on the hub. Raises UserError as `fetch` does."""
    return fetch(name, "model", "BASE to the folder of a model", WEIGHTS, OTHER_FORMS)


def fetch_config(name: str) -> Path:
    """The folder of a model on the hub with its config.json, and perhaps nothing else. Raises UserError as `fetch`
    does, and where there is no config.json."""
    folder = fetch(name, "model", "BASE to the folder of a model", [CONFIG], [])
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name} on the hub has no {CONFIG}, so it is no model that can be read here")
    return folder


def fetch_records(name: str) -> Path:
    """The folder of a data set on the hub, with its files of records. Raises UserError as `fetch` does."""
    return fetch(name, "dataset", FILES, [f"*{ending}" for ending in RECORDS], [])


def fetch_chosen(name: str, paths: Sequence[str]) -> list[Path]:
    """Some files of a data set on the hub, by their names from `listed`; no others are downloaded.

    Raises UserError as `fetch` does, and where one has gone from the hub since they were listed.
    """
    folder = fetch(name, "dataset", FILES, [glob.escape(path) for path in paths], [])
    if gone := [path for path in paths if not (folder / path).is_file()]:
        raise UserError(f"{name} has changed on the hub, where {gone[0]} was before; try again")
    return [folder / path for path in paths]


def listed(name: str) -> list[str]:
    """The files of a data set on the hub, as they were when it was last fetched, or as they are now. Raises UserError
    as `fetch` does."""
    with needs_package("huggingface_hub", "pretrained"):
        from huggingface_hub import HfApi, errors, get_cached_repo_tree
    try:
        return [file.path for file in get_cached_repo_tree(name, repo_type="dataset")]
    except errors.CachedRepoTreeNotFoundError:
        with told_plainly(name, "dataset", FILES):
            return [file.rfilename for file in HfApi(token=hub_token()).dataset_info(name).siblings or ()]


def fetch(name: str, kind: str, instead: str, wanted: list[str], unwanted: list[str]) -> Path:
    """The folder of a repository on the hub, from the cache, or downloaded with a progress bar.

    kind: `model` or `dataset`. instead: what else may be set to what. HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE
    mean what they mean to huggingface_hub. Raises UserError, in one line, where the hub has no such repository, wants a
    token, or cannot be reached.
    """
    with needs_package("huggingface_hub", "pretrained"):
        from huggingface_hub import errors, get_cached_repo_tree, snapshot_download
    get = partial(snapshot_download, name, repo_type=kind, allow_patterns=wanted, ignore_patterns=unwanted)
    try:
        get_cached_repo_tree(name, repo_type=kind)  # without it nobody knows whether a folder in the cache is whole
        return Path(get(local_files_only=True))
    except (errors.CachedRepoTreeNotFoundError, errors.LocalEntryNotFoundError, FileNotFoundError):
        what = f"config.json of {name}" if wanted == [CONFIG] else name
        say(f"Fetching {what} from the Hugging Face hub")
    with told_plainly(name, kind, instead):
        return Path(get(token=hub_token()))


@contextmanager
def told_plainly(name: str, kind: str, instead: str) -> Iterator[None]:
    """Turns what goes wrong with the hub into a UserError of one line. kind, instead: as for `fetch`."""
    from httpx2 import HTTPError, TransportError  # which huggingface_hub brings along
    from huggingface_hub import errors

    here = "run or folder" if kind == "model" else "file"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its terms on its page on the hub, and set HF_TOKEN to a token of your account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"there is no {name} on the hub, no {here} of that name here, or it is private: then set HF_TOKEN"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, TransportError):
        raise UserError(
            f"{name} is not in the cache, and the hub cannot be reached (HF_HUB_OFFLINE, or no network); try again "
            f"with a network, or set {instead}"
        ) from None
    except (HTTPError, OSError) as error:
        raise UserError(f"{name} could not be fetched: {str(error).partition(chr(10))[0]}; try again") from None
