"""Draw a run's loss and, for preference training, its reward margin and accuracy.

Reads the trainer's own history in <output_dir>/checkpoint-*/trainer_state.json, writes
<output_dir>/curves.png. `just train` does it at its end.

    python -m training.plot_curves axolotl_configs/smollm2-135m-dpo-sft-lora.yaml
"""

import json
from pathlib import Path

import matplotlib
import pandas as pd

from common.cli import UserError, run, script_parser
from common.files import replacing
from training.run_config import load_run_config

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "accuracy"}


def read_history(output_dir: Path) -> pd.DataFrame:
    """One line a logged step, from the latest checkpoint. Raises UserError if there is none."""
    states = sorted(
        output_dir.glob("checkpoint-*/trainer_state.json"),
        key=lambda path: int(path.parent.name.rpartition("-")[2]),
    )
    if not states:
        raise UserError(f"{output_dir} holds no checkpoint with a training history")
    history = pd.DataFrame(json.loads(states[-1].read_text())["log_history"])
    return history[history["loss"].notna()].set_index("step")


def plot_curves(output_dir: Path) -> Path:
    """Draw each logged quantity of PANELS in its own panel, with its running mean."""
    history = read_history(output_dir)
    shown = [key for key in PANELS if key in history and history[key].notna().any()]
    figure, panels = plt.subplots(
        len(shown), sharex=True, squeeze=False, figsize=(7, 2.2 * len(shown)), layout="constrained"
    )
    window = max(1, len(history) // 10)
    for axes, key in zip(panels[:, 0], shown, strict=True):
        axes.plot(history[key], color="C0", alpha=0.35)
        axes.plot(history[key].rolling(window, min_periods=1).mean(), color="C0")
        axes.set_ylabel(PANELS[key])
    panels[-1, 0].set_xlabel(f"step (dark line: mean of {window})")
    path = output_dir / "curves.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    return path


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", type=Path, help="the axolotl YAML of the run")
    print(plot_curves(load_run_config(parser.parse_args().config).output_dir))


if __name__ == "__main__":
    run(main)
