"""Draw a run's loss and, for preference training, its reward margin and accuracy.

Reads the trainer's own history in <output_dir>/checkpoint-*/trainer_state.json, writes
<output_dir>/curves.png at the end of `just train`.
"""

import json
from pathlib import Path

import pandas as pd

from common.cli import UserError
from common.report import drawing

PANELS = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "accuracy"}


def read_history(output_dir: Path) -> pd.DataFrame:
    """One line a logged step, from the latest checkpoint. Raises UserError if there is none."""
    states = output_dir.glob("checkpoint-*/trainer_state.json")
    latest = max(states, key=lambda path: int(path.parent.name.split("-")[1]), default=None)
    if not latest:
        raise UserError(f"{output_dir} holds no checkpoint with a training history")
    history = pd.DataFrame(json.loads(latest.read_text())["log_history"])
    return history[history["loss"].notna()].set_index("step")


def plot_curves(output_dir: Path) -> Path:
    """Draw each logged quantity of PANELS in its own panel, with its running mean."""
    history = read_history(output_dir)
    shown = [key for key in PANELS if key in history and history[key].notna().any()]
    window = max(1, len(history) // 10)
    path = output_dir / "curves.png"
    with drawing(path, (7, 2.2 * len(shown)), rows=len(shown), sharex=True) as panels:
        for axes, key in zip(panels[:, 0], shown, strict=True):
            axes.plot(history[key], color="C0", alpha=0.35)
            axes.plot(history[key].rolling(window, min_periods=1).mean(), color="C0")
            axes.set_ylabel(PANELS[key])
        panels[-1, 0].set_xlabel(f"step (dark line: mean of {window})")
    return path
