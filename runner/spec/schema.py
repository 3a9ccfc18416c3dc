"""The spec: what a user writes, as one frozen model for each TOML table.

The models state every key's type, limits, default and meaning. Messages, docs/keys.md, `fluxrun new` and `fluxrun
schema` are made from them. Defaults that depend on other keys are in `runner.spec.defaults`, rules over several keys in
`runner.spec.rules`. Reading files is in `runner.spec.loader`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runner.spec.attention import Attention
from runner.spec.dtypes import Dtype

Natural = Annotated[int, Field(ge=1, le=2**31)]
Whole = Annotated[int, Field(ge=0, le=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Side = Annotated[int, Field(ge=16, le=8192, multiple_of=16)]  # pixels

ONE_LINE = r"^[^\x00-\x1f]*$"
WORD = r"^[A-Za-z_][A-Za-z0-9_]*$"
RUN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._=,+-]*(/[A-Za-z0-9_][A-Za-z0-9._=,+-]*)?$"
LONGEST_RUN_NAME = 200  # characters, of one byte each: a file name stays below 255 with what exported files add

Line = Annotated[str, Field(min_length=1, max_length=4000, pattern=ONE_LINE)]
Recomputing = bool | Natural | Literal["selective"]

VERSION_TABLE = "fluxrun"  # only in the specs that fluxrun writes into run folders


def key(default: Any, description: str) -> Any:
    """A key with a default, and its meaning."""
    return Field(default=default, description=description)


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Table):
    """The base model, and how it is kept in memory and computed."""

    base: Line = Field(description="Hub id, folder in diffusers' layout, or builtin:tiny")
    revision: Line | None = key(None, "Branch, tag or commit of a hub base")
    variant: Line | None = key(None, "Weight file variant, e.g. fp16")
    dtype: Dtype | None = key(None, "Number format of the frozen base; default bf16 on a GPU, fp32 on a CPU")
    quantize: Literal["none", "int8", "fp8", "nf4"] = key(
        "none", "Keep the frozen transformer and T5 in 8 or 4 bits; nf4 needs bitsandbytes"
    )
    gradient_checkpointing: Recomputing = key(
        False,
        "Recompute activations in the backward pass, of every block, every n-th, or only the cheapest of each: less memory, slower",
    )
    attention: Attention = key("native", "Attention kernel of the transformer in training, by diffusers' names")
    offload: Literal["none", "blocks"] = key(
        "none",
        "Where the blocks of the transformer and T5 are kept between their uses: on the device, or in host memory",
    )
    compile: bool = key(False, "torch.compile the transformer's blocks")
    tf32: bool = key(True, "Allow TF32 matmuls on a GPU")
    max_sequence_length: Annotated[int, Field(ge=8, le=512)] = key(512, "Number of tokens of a caption that T5 reads")


class Data(Table):
    """The training images and their captions."""

    source: Line = Field(description="Folder of images (captions in NAME.txt), imagefolder, or hub data set")
    config: Line | None = key(None, "Configuration of a hub data set")
    split: Line = key("train", "Split of a hub data set")
    image_column: Line = key("image", "Column that holds the images")
    caption_column: Line | None = key(None, "Column that holds the captions")
    prompt: Line | None = key(None, "Caption of every image that has none of its own")
    repeats: Natural = key(1, "How often each image is shown per epoch")
    resolution: Side | Annotated[tuple[Side, ...], Field(min_length=1, strict=False)] = key(
        512, "Side of the training square in pixels; a list trains each image at several"
    )
    buckets: bool = key(False, "Train each image near its own shape (aspect-ratio buckets) instead of as a square")
    center_crop: bool = key(False, "Crop the center of each image instead of a random place")
    random_flip: bool = key(False, "Mirror a random half of the images")
    interpolation: Literal["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"] = key(
        "lanczos", "Filter that resizes the images"
    )
    variants: Natural | None = key(
        None, "Number of random crops and flips kept of each image; default 4, or 1 where nothing is random"
    )
    caption_dropout: Fraction = key(0.0, "Fraction of the captions that are replaced by an empty one")
    holdout: Whole = key(0, "Number of images held out from training, for the eval loss")
    workers: Whole = key(0, "Number of threads that decode images")


class Prior(Table):
    """Prior preservation: images of the class, trained on beside the others."""

    images: Line = Field(description="Folder of class images; the base generates those that are missing")
    prompt: Line = Field(description="Prompt of the class images")
    count: Natural = key(100, "Number of class images")
    weight: NotNegative = key(1.0, "Weight of the prior loss")
    dtype: Dtype | None = key(None, "Number format in which class images are generated; default model.dtype")
    batch_size: Natural = key(4, "Number of class images generated at a time")


class Token(Table):
    """A new word that the text encoders learn."""

    name: Annotated[str, Field(pattern=WORD, max_length=64)] = Field(
        description="The word that stands for the concept in prompts and captions"
    )
    vectors: Annotated[int, Field(ge=1, le=64)] = key(2, "Number of embedding vectors learned for the token")
    initializer: Line | None = key(None, "Phrase whose embeddings the vectors start from; random if not set")
    placeholder: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z])?$", max_length=32)] | None = key(
        None,
        'Base name of the vocabulary entries, of a-z, 0-9 and -, with a letter first and last: "bird" gives <bird0><bird1>; '
        "default s, numbered across all tokens",
    )


class Inversion(Table):
    """How the embeddings of the tokens are trained."""

    encoders: Annotated[tuple[Literal["clip", "t5"], ...], Field(min_length=1, strict=False)] = key(
        ("clip",), "Text encoders that learn token embeddings"
    )
    until: Annotated[float, Field(gt=0, le=1)] | None = key(
        None, "Fraction of the steps in which token embeddings are trained; default 0.5, or 1.0 where lora.until = 0"
    )
    lr: Positive | None = key(None, "Learning rate of the token embeddings; default train.lr")
    weight_decay: NotNegative = key(1e-3, "Weight decay of the token embeddings")
    pooling: Literal["diffusers", "eos", "both"] = key("diffusers", "Where CLIP's pooled vector is read")
    gradient_checkpointing: Recomputing | None = key(
        None, "model.gradient_checkpointing while token embeddings are trained; default the same value"
    )


class Lora(Table):
    """The transformer's LoRA."""

    rank: Annotated[int, Field(ge=1, le=4096)] = key(16, "Rank of the LoRA's matrices")
    alpha: Positive | None = key(None, "The LoRA is scaled by alpha / rank; default the rank")
    dropout: Below1 = key(0.0, "Dropout rate of the LoRA's input in training")
    layers: (
        Literal["attention", "attention+mlp", "all"] | Annotated[tuple[Line, ...], Field(min_length=1, strict=False)]
    ) = key("attention", "Layers that the LoRA adapts: a preset, or a list of suffixes of module names")
    until: Fraction = key(1.0, "Fraction of the steps in which the LoRA is trained; 0 is pure textual inversion")


class TextLora(Table):
    """A LoRA of the CLIP encoder."""

    rank: Annotated[int, Field(ge=1, le=4096)] = key(16, "Rank of the CLIP encoder's LoRA")
    alpha: Positive | None = key(None, "The LoRA is scaled by alpha / rank; default the rank")
    until: Annotated[float, Field(gt=0, le=1)] = key(
        1.0, "Fraction of the steps in which the CLIP encoder's LoRA is trained"
    )
    lr: Positive | None = key(None, "Learning rate of the CLIP encoder's LoRA; default train.lr")


class NoWeighting(Table):
    """Timesteps are drawn evenly, and count the same."""

    scheme: Literal["none"] = "none"


class SigmaSqrt(Table):
    """The loss is weighted by 1 / sigma^2."""

    scheme: Literal["sigma_sqrt"]


class LogitNormal(Table):
    """The timestep's logit is drawn from a normal distribution (Stable Diffusion 3)."""

    scheme: Literal["logit_normal"]
    mean: float = key(0.0, "Mean of the timestep's logit")
    std: Positive = key(1.0, "Standard deviation of the timestep's logit")


class Mode(Table):
    """Timesteps are drawn by mode sampling with heavy tails (Stable Diffusion 3)."""

    scheme: Literal["mode"]
    scale: float = key(1.29, "Scale of the mode weighting")


class Cosmap(Table):
    """The loss is weighted by 2 / (pi (1 - 2 sigma + 2 sigma^2)), CosMap of Stable Diffusion 3."""

    scheme: Literal["cosmap"]


class Train(Table):
    """How long and how fast to train."""

    steps: Natural | None = key(None, "Number of optimisation steps; set this or train.epochs")
    epochs: Natural | None = key(None, "Number of passes over the images; set this or train.steps")
    batch_size: Natural = key(1, "Number of images per micro-batch")
    accumulate: Natural = key(1, "Number of micro-batches per step")
    lr: Positive | None = key(None, "Learning rate; default 1e-4, with Prodigy 1.0")
    scale_lr: bool = key(False, "Multiply the learning rate by the number of images per step")
    guidance: NotNegative = key(3.5, "Guidance value that the transformer gets in training")
    max_grad_norm: Positive = key(1.0, "Maximum norm of the gradients, to which they are clipped")
    weighting: Annotated[NoWeighting | SigmaSqrt | LogitNormal | Mode | Cosmap, Field(discriminator="scheme")] = key(
        NoWeighting(), "How the timesteps are drawn and weighted"
    )


class AdamW(Table):
    """torch's AdamW."""

    name: Literal["adamw"] = "adamw"
    beta1: Below1 = key(0.9, "Decay of the gradient's average")
    beta2: Below1 = key(0.999, "Decay of the squared gradient's average")
    eps: Positive = key(1e-8, "Small number added to the denominator")
    weight_decay: NotNegative = key(1e-4, "Weight decay of the LoRA")


class AdamW8bit(Table):
    """bitsandbytes' AdamW with 8-bit state."""

    name: Literal["adamw8bit"]
    beta1: Below1 = key(0.9, "Decay of the gradient's average")
    beta2: Below1 = key(0.999, "Decay of the squared gradient's average")
    eps: Positive = key(1e-8, "Small number added to the denominator")
    weight_decay: NotNegative = key(1e-4, "Weight decay of the LoRA")


class Prodigy(Table):
    """Prodigy, which estimates the step size itself."""

    name: Literal["prodigy"]
    beta1: Below1 = key(0.9, "Decay of the gradient's average")
    beta2: Below1 = key(0.999, "Decay of the squared gradient's average")
    beta3: Below1 | None = key(None, "Decay of d's averages; default the square root of beta2")
    eps: Positive = key(1e-8, "Small number added to the denominator")
    weight_decay: NotNegative = key(1e-4, "Weight decay of the LoRA")
    decouple: bool = key(True, "Decay the weights as AdamW does")
    bias_correction: bool = key(True, "Correct the averages' bias as Adam does")
    safeguard_warmup: bool = key(True, "Keep d from growing during warm-up")
    d_coef: Positive = key(1.0, "Factor of the estimate d")
    d0: Positive = key(1e-6, "Initial estimate of d")
    growth_rate: Annotated[float, Field(gt=1)] | None = key(
        None, "Factor by which d may grow per step; default no limit"
    )


class Schedule(Table):
    """How the learning rate changes."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = key(
        "constant", "Learning rate schedule, by diffusers' names"
    )
    warmup: Whole = key(0, "Number of warm-up steps")
    cycles: Natural = key(1, "Number of hard restarts of cosine_with_restarts")
    power: Positive = key(1.0, "Power of the polynomial schedule")


class Checkpoint(Table):
    """When checkpoints are written, and how many are kept."""

    every: Natural = key(100, "Number of steps between checkpoints")
    minutes: Positive | None = key(None, "Minutes between checkpoints, in addition to checkpoint.every")
    keep: Natural = key(
        2,
        "Number of newest checkpoints to keep; the last one of each phase and the one with the lowest eval loss are kept too",
    )


class Validate(Table):
    """Sample pictures and the eval loss, in training."""

    prompts: Annotated[tuple[Line, ...], Field(strict=False)] = key(
        (), "Prompts of the sample pictures, which name tokens as captions do"
    )
    every: Natural | None = key(None, "Number of steps between sample pictures")
    loss: bool = key(
        True,
        "Compute the eval loss at the end and every validate.every steps; costs nine forward passes, or nine per held-out image",
    )
    count: Natural = key(1, "Number of pictures per prompt")
    steps: Natural = key(28, "Number of sampling steps per picture")
    size: Side | None = key(None, "Side of the pictures in pixels; default the resolution")


class Stop(Table):
    """Early stopping by the eval loss."""

    no_better_for: Natural | None = key(None, "Number of steps without a lower eval loss after which training ends")
    loss_above: Positive | None = key(None, "Eval loss above which training ends")
    at: Positive | None = key(None, "Eval loss at which, or below which, training ends")


class Track(Table):
    """Trackers of metrics and pictures."""

    to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = key(
        ("tensorboard",), "Trackers that training is logged to"
    )


class Export(Table):
    """The exported files."""

    dtype: Dtype = key("bf16", "Number format of the exported files; the rounding error is measured and reported")
    best: bool = key(False, "Export the step with the lowest eval loss instead of the last")


class Hub(Table):
    """Upload to the Hugging Face hub."""

    push: bool = key(False, "Upload the export folder when done")
    repo: Line | None = key(None, "Id of the repository; default made from the run's name")
    private: bool = key(False, "Make the repository private")


class Notify(Table):
    """Whom to notify of the end of runs."""

    url: Line | None = key(
        None,
        "Webhook called when a run is done, has failed or was stopped, and when the queue is done; $NAME is a variable of the environment",
    )
    command: Line | None = key(
        None,
        "Command run when a run is done, has failed or was stopped, and when the queue is done; only with `queue --allow-commands`",
    )


class Compute(Table):
    """The devices of one run."""

    gpus: Natural = key(1, "Number of GPUs that one run uses")


class Spec(Table):
    """One run."""

    name: Annotated[str, Field(pattern=RUN_NAME, max_length=LONGEST_RUN_NAME)] = Field(
        description="Name of the run's folder; default the file's stem"
    )
    seed: Whole = key(0, "Seed of everything random")
    model: Model
    data: Data
    prior: Prior | None = None
    tokens: Annotated[tuple[Token, ...], Field(strict=False)] = ()
    inversion: Inversion = Inversion()
    lora: Lora = Lora()
    text_lora: TextLora | None = None
    train: Train
    optimizer: Annotated[AdamW | AdamW8bit | Prodigy, Field(discriminator="name")] = AdamW()
    schedule: Schedule = Schedule()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validate = Field(default=Validate(), alias="validate")
    stop: Stop = Stop()
    track: Track = Track()
    export: Export = Export()
    hub: Hub = Hub()
    notify: Notify = Notify()
    compute: Compute = Compute()


def dump(spec: Spec) -> dict[str, Any]:
    """All keys with their values, defaults included, as plain tables for TOML or JSON. Keys that are not set are left
    out."""
    return spec.model_dump(mode="json", by_alias=True, exclude_none=True)
