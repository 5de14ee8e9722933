"""What a training and its evaluation would take of a GPU: an estimate, until one is measured.

A GPU is busy with operations, at a share of its peak, or waits for kernels to be launched, which
with students this small takes as long. Counted as usual: a weight that meets a token is two
operations (Kaplan et al. 2020, arXiv:2001.08361). `just plan` prints it; `just bench gpu` measures.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.cli import UserError, one_line
from common.files import read_json
from training.config import RunConfig, is_local

TABLE = Path(__file__).with_name("cards.yaml")
# Assumed, and measured by nobody here. The one training that ran on a GPU, 47 pairs of the 135M in
# 51 s with its start, leaves at most 7 ms for a layer's pass.
PEAK_SHARE = 0.4
LAUNCH_SECONDS = 0.002  # of a layer's pass in training: 7 quantized products with adapters
# Qwen's own benchmark: 50 tokens a second, one text at a time, 24 layers (Qwen2-0.5B, A100).
ANSWER_SECONDS = 0.0008  # of a layer and token
START_SECONDS = 120  # of a command: imports, weights, rows read
# An encoder of the size of deberta-xlarge-mnli, in 32 bits.
ENCODER_WEIGHTS = 750e6
# Per answer: some 8 sentences held against 8 passages of 150 tokens, and both texts of BERTScore.
ENCODER_TOKENS = 8 * 8 * 150 + 2 * 400


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, as its config.json has them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int

    @property
    def attention_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear modules of a layer."""
        keys = self.num_key_value_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = [(hidden, self.attention_width), (hidden, keys), (hidden, keys)]
        return [*attention, (self.attention_width, hidden), *2 * [(hidden, inner)], (inner, hidden)]

    @property
    def layer_weights(self) -> int:
        """Weights of all layers; norms and biases are too few to count."""
        return self.num_hidden_layers * sum(a * b for a, b in self.projections)

    @property
    def head_weights(self) -> int:
        """Weights of the output layer, whose rows are mostly the embedding's too."""
        return self.hidden_size * self.vocab_size

    def adapter_weights(self, rank: int) -> int:
        """Weights of LoRA of this rank on every linear module of the layers."""
        return self.num_hidden_layers * sum(rank * (a + b) for a, b in self.projections)


@dataclass(frozen=True)
class Card:
    """A GPU: gigabytes, dense 10^12 operations a second, dollars an hour (lowest, highest)."""

    gb: float
    bf16: float
    fp32: float
    usd_per_hour: tuple[float, float]


@dataclass(frozen=True)
class Training:
    """What a config does with its rows. A row is one text, or a pair: the text with two answers."""

    rows: int
    tokens: float  # of a text with an answer, on average
    texts_a_row: int
    reference: bool  # a pass without the adapter, or with a frozen one, for each row
    epochs: float
    checkpointing: bool  # activations are computed a second time
    rank: int
    micro_batch: int
    longest: int  # tokens: sequence_len
    weight_bytes: float  # of a weight of the layers

    @property
    def tokens_read(self) -> float:
        return self.rows * self.epochs * self.texts_a_row * self.tokens

    @property
    def layer_passes(self) -> int:
        """Forward, backward as two, once more forward for checkpoints, and the reference's."""
        return 3 + self.checkpointing + self.reference


@dataclass(frozen=True)
class Evaluation:
    """Answers to test documents, one at a time, each document's as long as the longest allowed."""

    texts: int
    tokens: float  # of a document with its prompt, on average
    systems: int  # that a model answers for
    new_tokens: int


def load_cards() -> dict[str, Card]:
    table = yaml.safe_load(TABLE.read_text())["cards"]
    return {name: Card(**values) for name, values in table.items()}


def shape_of(model: str, revision: str | None = None) -> Shape:
    """The sizes of a student: of its folder, of the table here, or of the Hub. Raises UserError."""
    known = yaml.safe_load(TABLE.read_text())["students"]
    if is_local(model):
        values = read_json(Path(model) / "config.json")
    else:
        values = known.get(model) or config_on_hub(model, revision)
    values = values.get("text_config") or values
    try:
        head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        sizes = {name: values[name] for name in Shape.__annotations__ if name != "head_dim"}
        return Shape(**sizes, head_dim=head_dim)
    except (KeyError, TypeError):
        raise UserError(f"{model} has no config.json with the sizes of a decoder") from None


def config_on_hub(model: str, revision: str | None) -> dict:
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(model, "config.json", revision=revision)))
    except (OSError, ValueError) as error:
        reason = one_line(error, 100)
        raise UserError(f"cannot read the sizes of {model} ({reason}); name a folder") from None


def training_of(config: RunConfig, rows: int, text_tokens: float, answer_tokens: float) -> Training:
    """What a config does with so many rows of texts and answers of so many tokens."""
    get = config.settings.get
    method = get("rl")
    return Training(
        rows=rows,
        tokens=min(text_tokens + answer_tokens, get("sequence_len") or math.inf),
        texts_a_row=2 if method else 1,
        reference=method in ("dpo", "ipo", "kto"),
        epochs=get("num_epochs") or 1,
        checkpointing=bool(get("gradient_checkpointing")),
        rank=get("lora_r") or 0,
        micro_batch=get("micro_batch_size") or 1,
        longest=get("sequence_len") or int(text_tokens + answer_tokens),
        # NF4 with its scales; else two bytes.
        weight_bytes=0.52 if config.four_bits else 2,
    )


def operations_a_token(shape: Shape, training: Training) -> float:
    """Operations that training takes for each token of a text with its answer.

    The base is frozen, so its backward pass is as long as the forward one and not twice; the
    adapter's is twice. Only the layers are computed again for checkpoints.
    """
    layers = 2 + training.checkpointing + training.reference  # passes, the backward one as one
    head = 2 + training.reference
    adapter = 3 + training.checkpointing
    # A token looks at half of the others on average: two products of the attention's width each.
    attention = 2 * shape.num_hidden_layers * shape.attention_width * training.tokens
    of_attention = 3 + training.checkpointing + training.reference
    return (
        2 * shape.layer_weights * layers
        + 2 * shape.head_weights * head
        + 2 * shape.adapter_weights(training.rank) * adapter
        + attention * of_attention
    )


def training_seconds(shape: Shape, training: Training, card: Card, peak_share: float) -> float:
    operations = training.tokens_read * operations_a_token(shape, training)
    micro_batches = math.ceil(training.rows / training.micro_batch) * training.epochs
    launches = micro_batches * shape.num_hidden_layers * training.layer_passes * LAUNCH_SECONDS
    return operations / (peak_share * card.bf16 * 1e12) + launches + START_SECONDS


def answer_seconds(shape: Shape, evaluation: Evaluation, card: Card, peak_share: float) -> float:
    answers = evaluation.texts * evaluation.systems
    weights = shape.layer_weights + shape.head_weights
    reading = 2 * weights * evaluation.tokens / (peak_share * card.bf16 * 1e12)
    writing = evaluation.new_tokens * shape.num_hidden_layers * ANSWER_SECONDS
    return answers * (reading + writing) + START_SECONDS


def score_seconds(evaluation: Evaluation, card: Card, peak_share: float) -> float:
    """Of the measures' encoder, in 32 bits; the first sentences are scored as well."""
    answers = evaluation.texts * (evaluation.systems + 1)
    operations = answers * ENCODER_TOKENS * 2 * ENCODER_WEIGHTS
    return operations / (peak_share * card.fp32 * 1e12) + START_SECONDS


def memory_gb(shape: Shape, training: Training) -> float:
    """Peak of training on the longest rows: weights, adapter with its optimizer, checkpoints of the
    layers, and the logits, which with these vocabularies are most of it."""
    tokens = training.micro_batch * training.texts_a_row * training.longest
    base = shape.layer_weights * training.weight_bytes + shape.head_weights * 4
    adapter = shape.adapter_weights(training.rank) * 16  # itself, gradient, two moments
    activations = tokens * shape.hidden_size * 2 * shape.num_hidden_layers
    activations += tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size) * 4  # one layer
    logits = tokens * shape.vocab_size * (4 + 4 + 4 + 2)  # in 32 bits, softmax, gradient; in 16
    return (base + adapter + activations + logits) / 1e9 + 1  # CUDA's own


def explain(shape: Shape, training: Training, peak_share: float) -> str:
    """The formula, with the numbers of this run, as text."""
    per_token = operations_a_token(shape, training)
    backward = "forward 1, backward 1 as the base is frozen"
    again = ", forward again 1 for checkpoints" if training.checkpointing else ""
    reference = ", the reference 1" if training.reference else ""
    return (
        f"operations a token: 2 x {shape.layer_weights / 1e9:.2f} G weights of the layers x passes "
        f"({backward}{again}{reference}),\n"
        f"  the output layer's {shape.head_weights / 1e9:.2f} G, LoRA of rank {training.rank}, and "
        f"attention over {training.tokens:,.0f} tokens: {per_token / 1e9:.1f} G\n"
        f"tokens: {training.rows:,} rows x {training.texts_a_row} x {training.tokens:,.0f} x "
        f"{training.epochs:g} epochs = {training.tokens_read / 1e6:.1f} M\n"
        f"hours: tokens x operations / ({peak_share:g} of the card's peak in bf16), and for each "
        f"of {training.rows * training.epochs / training.micro_batch:,.0f} micro-batches\n"
        f"  {shape.num_hidden_layers} layers x {training.layer_passes} passes x "
        f"{LAUNCH_SECONDS * 1000:g} ms for launching kernels (backward counts twice)"
    )
