"""BERTScore (Zhang et al. 2020): how alike two texts are to an encoder, word by word."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

from common.cli import UserError, one_line
from common.files import file_sha

WINDOW = 512  # tokens an encoder reads
BASELINES = Path(__file__).parent.parent / "results/rescale_baselines.csv"
PARTS = ("bertscore_p", "bertscore_r", "bertscore_f1")


def encoder_key(encoder: str) -> str:
    """What tells an encoder's weights: the hash of its file if it is a folder, or its Hub id."""
    weights = Path(encoder) / "model.safetensors"
    return file_sha(weights) if weights.is_file() else encoder


def check_encoder(encoder: str, layer: int | None) -> None:
    """Raise UserError for an encoder that cannot be had, or has no such layer, before answers wait
    for it."""
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(encoder)
    except (OSError, ValueError):
        hint = "name another: --encoder models/minilm --encoder-layers 6 is the demo's"
        raise UserError(
            f"the encoder {encoder} is not on the Hub or cannot be had; {hint}"
        ) from None
    n_layers = getattr(config, "num_hidden_layers", None)
    if layer is None and encoder not in model2layers:
        raise UserError(f"bert-score knows no layer of {encoder}: --encoder-layers")
    if layer and n_layers and layer > n_layers:
        raise UserError(f"{encoder} has {n_layers} layers: --encoder-layers {layer} is too many")


def rescale_baseline(encoder: str, layer: int) -> list[float] | None:
    """P, R and F1 of unrelated texts for an encoder's layer: of bert-score's own file, or of a row
    that `just bench rescale_encoder` added to results/; None where none was computed."""
    official = files("bert_score") / f"rescale_baseline/en/{encoder}.tsv"
    if official.is_file():
        return pd.read_csv(official)[["P", "R", "F"]].iloc[layer].tolist()
    rows = pd.read_csv(BASELINES)
    rows = rows[(rows.weights == encoder_key(encoder)) & (rows.layer == layer)]
    return rows[["P", "R", "F"]].iloc[-1].tolist() if len(rows) else None


class BertScore:
    """The official BERTScorer (Zhang et al. 2020), made to work with transformers 5: encoders that
    declare no limit are given one of 512 tokens and computed in float32."""

    def __init__(self, encoder: str, layers: int | None, batch_size: int):
        from bert_score import BERTScorer

        try:
            self.scorer = BERTScorer(encoder, num_layers=layers, batch_size=batch_size, lang="en")
        except KeyError:
            raise UserError(f"bert-score knows no layer of {encoder}: --encoder-layers") from None
        except AssertionError as error:
            raise UserError(f"--encoder-layers {layers}: {one_line(error)}") from None
        self.scorer._tokenizer.model_max_length = WINDOW
        self.scorer._model.float()
        self.baseline = rescale_baseline(encoder, self.scorer.num_layers)
        self.settings = {"hash": self.scorer.hash, "rescale_baseline": self.baseline}

    def __call__(self, answers: list[str], rows: list[dict]) -> dict[str, list[float]]:
        """Precision, recall and F1, raw and rescaled as in bert-score: unrelated texts 0;
        over_512_tokens: 1 for an answer that is longer than the encoder reads."""
        given = [answer if answer.strip() else "-" for answer in answers]  # it takes no empty ones
        references = [row["reference"] for row in rows]
        raw = np.stack(self.scorer.score(given, references, batch_size=self.scorer.batch_size))
        raw = raw.astype(float) * [bool(answer.strip()) for answer in answers]
        columns = dict(zip(PARTS, raw.tolist(), strict=True))
        if self.baseline:
            baseline = np.array(self.baseline)[:, None]
            rescaled = ((raw - baseline) / (1 - baseline)).tolist()
            columns |= {f"{part}_rescaled": rescaled[i] for i, part in enumerate(PARTS)}
        tokens = self.scorer._tokenizer(answers, verbose=False).input_ids
        return columns | {"over_512_tokens": [float(len(ids) > WINDOW) for ids in tokens]}
