"""Files pushed to a repository of the user's on the Hugging Face hub, in one commit.

The token is in no message: what the hub's client says may have addresses with signatures in them, so of that only what
is known to be harmless is passed on.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.console import say
from runtime.errors import UsageError, UserError
from runtime.extras import needs_package
from runtime.settings.config import hub_token
from runtime.storage.content import sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
SEAL = re.compile(rb"\n<!-- (\w{12}) -->\n?\Z")  # at the end of a card: the hash of what stands above
WRITES = "make one that may write, in the settings of your account on the hub"


class UnreachableError(UserError):
    """The hub cannot be reached, or fails: it may be otherwise later."""


@dataclass(frozen=True)
class Target:
    """Where to push. name: `user/name`. private: whether a repository that is not there yet becomes so. again: the
    command that tries again."""

    name: str
    private: bool
    again: str = ""

    def check(self) -> HfApi:
        """The hub, asked who the user is. Raises UserError where the client is not installed, UsageError for a name
        that cannot be and for a token that is missing, unknown or may not write there, and UnreachableError."""
        with needs_package("huggingface_hub", "pretrained"):
            from huggingface_hub import HfApi, errors, get_token
            from huggingface_hub.utils import validate_repo_id
        try:
            validate_repo_id(self.name)
        except errors.HFValidationError:
            raise UsageError(
                f"{self.name} cannot be a name on the hub: no '--' or '..', at most 96 characters"
            ) from None
        token = hub_token() or get_token()
        if not token:
            raise UsageError(
                f"pushing to {self.name} needs a token that may write: set HF_TOKEN in the environment or .env{self}"
            )
        if not re.fullmatch(r"[!-~]+", token):
            raise UsageError(f"HF_TOKEN is no token: it has characters that none has; copy it again{self}")
        api = HfApi(token=token)
        with self.told_plainly():
            who = api.whoami()
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UsageError(f"HF_TOKEN is a token that may only read: {WRITES}{self}")
        names, owner = [who["name"], *(org["name"] for org in who.get("orgs", ()))], self.name.partition("/")[0]
        if role == "write" and owner.lower() not in [name.lower() for name in names]:  # others may not tell all
            raise UsageError(f"{owner} is not the owner of HF_TOKEN, which may push to {', '.join(names)}{self}")
        return api

    def __str__(self) -> str:
        """The command that tries again, as the end of a message."""
        return f"; then: {self.again}" if self.again else ""

    @contextmanager
    def told_plainly(self) -> Iterator[None]:
        """Turns what goes wrong with the hub into a UserError of one line, which holds nothing of the token."""
        from httpx2 import HTTPError, TransportError  # which huggingface_hub brings along
        from huggingface_hub import errors

        try:
            with _causes():
                yield
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status == 401:
                raise UsageError(f"the hub does not know HF_TOKEN, or it has expired: {WRITES}{self}") from None
            if status in (403, 404):
                raise UserError(
                    f"HF_TOKEN may not write to {self.name}: take a name of your own, or {WRITES}{self}"
                ) from None
            if status >= 500 or status == 429:
                raise UnreachableError(f"the hub failed with status {status}; wait a little{self}") from None
            raise UserError(f"the hub refused {self.name} with status {status}{self}") from None
        except (errors.OfflineModeIsEnabled, TransportError):
            raise UnreachableError(f"the hub cannot be reached (HF_HUB_OFFLINE, or no network){self}") from None
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.name} could not be pushed ({type(error).__name__}){self}") from None


@contextmanager
def _causes() -> Iterator[None]:
    """Raises what the hub answered where the client has wrapped it, as it does where a large file fails."""
    try:
        yield
    except RuntimeError as error:
        raise error.__cause__ or error from None


def push(target: Target, files: Mapping[str, Path | bytes], message: str, quiet: bool = False) -> str:
    """Push files to the hub in one commit, and return the address of the repository, which is made if there is none.

    files: what each is called there, and where it lies or what is in it. quiet: without a progress bar. A card that
    somebody has changed on the hub stays. Raises UserError in one line, as `Target.check` does.
    """
    api = target.check()
    from huggingface_hub import CommitOperationAdd, constants, errors
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with target.told_plainly():
        try:
            there = api.model_info(target.name)
        except errors.RepositoryNotFoundError:
            api.create_repo(target.name, private=target.private)
        else:
            if target.private and not there.private:
                say(f"{target.name} is public already, and stays so")
            if CARD in files and _is_changed(api, target.name, [file.rfilename for file in there.siblings or ()]):
                say(f"{CARD} of {target.name} was changed on the hub, and stays as it is there")
                files = {name: file for name, file in files.items() if name != CARD}
        operations = [CommitOperationAdd(name, _sealed(file) if name == CARD else file) for name, file in files.items()]
        if quiet:
            disable_progress_bars()
        elif not constants.HF_HUB_DISABLE_PROGRESS_BARS:
            enable_progress_bars()  # transformers may have been told to show none
        try:
            api.create_commit(target.name, operations, commit_message=message)
        except BaseException:
            if not quiet:
                say("")  # the bar of an upload that has stopped does not end its line
            raise
    return f"{api.endpoint}/{target.name}"


def _sealed(card: Path | bytes) -> bytes:
    """A card that tells whether somebody has changed it since."""
    text = card.read_bytes() if isinstance(card, Path) else card
    return text + f"\n<!-- {sha256(text)[:12]} -->\n".encode()


def _is_changed(api: HfApi, name: str, there: list[str]) -> bool:
    """Whether the card on the hub is another than was pushed there."""
    if CARD not in there:
        return False
    with tempfile.TemporaryDirectory() as folder:
        text = Path(api.hf_hub_download(name, CARD, local_dir=folder)).read_bytes()
    seal = SEAL.search(text)
    return not seal or seal[1].decode() != sha256(text[: seal.start()])[:12]
