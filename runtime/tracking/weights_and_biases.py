"""Weights & Biases: https://docs.wandb.ai. Its own log of a run is in the run's folder, also where it is sent at once.

The key comes from WANDB_API_KEY alone; without one, or where W&B cannot be reached, the run is tracked offline, to be
sent by `wandb sync`. W&B reads variables of its own, such as WANDB_PROJECT, WANDB_MODE and WANDB_BASE_URL.
"""

from __future__ import annotations

import logging
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.console import say
from runtime.extras import needs_package
from runtime.settings.config import wandb_api_key
from runtime.tracking import wandb_log

FOLDER, PROJECT = "wandb", "nano-gpt-lora"
PATIENCE, LAST = 30.0, 60.0  # seconds that the start of a run waits for W&B, and its end


class WeightsAndBiases:
    """One run of W&B's, which has the id of the log that is in the run's folder already. Steps that it has are not sent
    again; W&B takes none that is not above all others."""

    label = "W&B"

    @staticmethod
    def check() -> None:
        """Raises UserError where W&B's package is missing."""
        with needs_package("wandb", "tracking"):
            import wandb  # noqa: F401

    def __init__(self, folder: Path, settings: Mapping[str, str], resumed_at: int) -> None:
        import wandb

        own = folder / FOLDER
        logging.getLogger("wandb").setLevel(logging.CRITICAL)
        key, shared = wandb_api_key(), wandb.setup(wandb.Settings(silent=True)).settings
        logs = wandb_log.logs_in(own)
        how = {"silent": True, "console": "off", "init_timeout": PATIENCE, "disable_git": True, "save_code": False}
        how |= {"finish_timeout": LAST, "finish_timeout_raises": True, "disable_code": True}
        how |= {"x_disable_meta": True, "x_disable_machine_info": True}
        self.about = {"dir": folder, "id": logs[-1].id if logs else secrets.token_hex(4), "resume": "allow"}
        self.about |= {"name": folder.name, "project": shared.project or PROJECT, "config": dict(settings)}
        self.run = None
        if key and shared.mode == "online":
            self.run = self._online(wandb.Settings(api_key=key, **how), own)
        elif not key:
            say(f"WANDB_API_KEY is not set, so W&B tracks offline; to send it: {_sync(own)}")
        mode = "offline" if shared.mode == "online" else shared.mode
        self.run = self.run or wandb.init(mode=mode, settings=wandb.Settings(**how), **self.about)
        self.newest = max([0, self.run.starting_step - 1, *(log.newest() for log in logs)])

    def _online(self, settings: Any, folder: Path) -> Any:
        """The run, sent to W&B as it goes on; None where that does not work, which is said."""
        import wandb

        say(f"Starting the run at W&B, for which it has {PATIENCE:.0f} seconds")
        try:
            return wandb.init(mode="online", settings=settings, **self.about)
        except wandb.errors.Error as error:  # whose words may tell of the key
            refused = isinstance(error, wandb.errors.AuthenticationError)
            why = "W&B does not accept WANDB_API_KEY" if refused else "W&B cannot be reached"
            say(f"warning: {why} ({type(error).__name__}), so it tracks offline; to send it later: {_sync(folder)}")
            wandb.teardown()  # its own process would refuse the next run too
            return None

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """All figures of a step, unless W&B has them."""
        if step > self.newest:
            self.run.log(dict(values), step=step, commit=True)
            self.newest = step

    def text(self, step: int, name: str, text: str) -> None:
        """A text, in the run's summary; the settings are its config already."""
        if name != "settings":
            self.run.summary[name] = text

    def flush(self) -> None:
        """W&B's own process writes and sends when it likes; what is lost comes from the log of metrics again."""

    def close(self, failed: bool) -> None:
        """Wait until all is written, and sent where it is sent."""
        import wandb

        self.run.finish(exit_code=int(failed))
        wandb.teardown()  # waits for W&B's own process, which may still be writing


def _sync(folder: Path) -> str:
    """The command that sends all that is there."""
    return f"wandb sync {shlex.quote(str(folder))}/*run-*"
