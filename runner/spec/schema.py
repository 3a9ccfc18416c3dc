"""The spec: what a user writes. Frozen, one model per TOML table; reading and checking is `runner.spec.loader`'s."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runner.spec.attention import Attention
from runner.spec.dtypes import Dtype

Natural = Annotated[int, Field(ge=1, le=2**31)]
Whole = Annotated[int, Field(ge=0, le=2**31)]
Part = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Side = Annotated[int, Field(ge=16, le=8192, multiple_of=16)]

ONE_LINE = r"^[^\x00-\x1f]*$"
WORD = r"^[A-Za-z_][A-Za-z0-9_]*$"
RUN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._=,+-]*(/[A-Za-z0-9_][A-Za-z0-9._=,+-]*)?$"
LONGEST_RUN_NAME = 200  # characters, all of one byte: with what export files add, a file's name stays below 255

Line = Annotated[str, Field(min_length=1, max_length=4000, pattern=ONE_LINE)]


VERSION_TABLE = "fluxrun"  # in the specs that fluxrun itself writes into run folders, and in no others


def key(default: Any, description: str) -> Any:
    return Field(default=default, description=description)


Recomputing = bool | Natural | Literal["selective"]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Table):
    base: Line = Field(description="Hub id, folder in diffusers' layout, or builtin:tiny")
    revision: Line | None = key(None, "Branch, tag or commit of a hub base")
    variant: Line | None = key(None, "Weight file variant, e.g. fp16")
    dtype: Dtype | None = key(None, "Number format of the frozen base; default bf16 on a GPU, fp32 on a CPU")
    quantize: Literal["none", "int8", "fp8", "nf4"] = key(
        "none", "Hold the frozen transformer and T5 in 8 or 4 bits; nf4 needs bitsandbytes"
    )
    gradient_checkpointing: Recomputing = key(
        False,
        "Recompute activations in the backward pass, of every block, every n-th, or the cheapest of all: less memory, slower",
    )
    attention: Attention = key("native", "Attention kernel of the transformer while it trains, by diffusers' names")
    offload: Literal["none", "blocks"] = key(
        "none", "Where the transformer's and T5's blocks wait for their turn: on the device, or in host memory"
    )
    compile: bool = key(False, "torch.compile the transformer's blocks")
    tf32: bool = key(True, "Allow TF32 matmuls on a GPU")
    max_sequence_length: Annotated[int, Field(ge=8, le=512)] = key(512, "Number of tokens that T5 reads of a caption")


class Data(Table):
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
    center_crop: bool = key(False, "Crop the middle of each image instead of a random place")
    random_flip: bool = key(False, "Mirror a random half of the images")
    interpolation: Literal["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"] = key(
        "lanczos", "Filter that resizes the images"
    )
    variants: Natural | None = key(
        None, "Number of random crops and mirrorings kept of each image; default 4, or 1 where nothing is random"
    )
    caption_dropout: Part = key(0.0, "Share of the captions that are replaced by an empty one")
    holdout: Whole = key(0, "Number of images that are kept from training, for the eval loss")
    workers: Whole = key(0, "Number of threads that decode images")


class Prior(Table):
    images: Line = Field(description="Folder of class images; the base makes those that are missing")
    prompt: Line = Field(description="Prompt of the class images")
    count: Natural = key(100, "Number of class images")
    weight: NotNegative = key(1.0, "Weight of the prior loss")
    dtype: Dtype | None = key(None, "Number format in which class images are made; default model.dtype")
    batch_size: Natural = key(4, "Number of class images made at a time")


class Token(Table):
    name: Annotated[str, Field(pattern=WORD, max_length=64)] = Field(
        description="The word that stands for the concept in prompts and captions"
    )
    vectors: Annotated[int, Field(ge=1, le=64)] = key(2, "Number of embedding rows learned for the token")
    initializer: Line | None = key(None, "Phrase whose embeddings the rows start from; random when absent")
    placeholder: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z])?$", max_length=32)] | None = key(
        None,
        'Base name of the vocabulary entries: "bird" gives <bird0><bird1>. a-z, 0-9 and -, a letter first and last. '
        "Default s, numbered across all tokens",
    )


class Inversion(Table):
    encoders: Annotated[tuple[Literal["clip", "t5"], ...], Field(min_length=1, strict=False)] = key(
        ("clip",), "Text encoders that learn rows"
    )
    until: Annotated[float, Field(gt=0, le=1)] | None = key(
        None, "Share of the steps in which rows learn; default 0.5, or 1.0 where lora.until = 0"
    )
    lr: Positive | None = key(None, "Learning rate of the rows; default train.lr")
    weight_decay: NotNegative = key(1e-3, "Weight decay of the rows")
    pooling: Literal["diffusers", "eos", "both"] = key("diffusers", "Where CLIP's pooled vector is read")
    gradient_checkpointing: Recomputing | None = key(
        None, "The same as model.gradient_checkpointing, while rows learn; default as there"
    )


class Lora(Table):
    rank: Annotated[int, Field(ge=1, le=4096)] = key(16, "Rank of the LoRA's matrices")
    alpha: Positive | None = key(None, "The LoRA is scaled by alpha / rank; default the rank")
    dropout: Below1 = key(0.0, "Share of the LoRA's input that is dropped while it trains")
    layers: (
        Literal["attention", "attention+mlp", "all"] | Annotated[tuple[Line, ...], Field(min_length=1, strict=False)]
    ) = key("attention", "Which layers the LoRA adapts: a preset, or a list of suffixes of module names")
    until: Part = key(1.0, "Share of the steps in which the LoRA learns; 0 is pure textual inversion")


class TextLora(Table):
    rank: Annotated[int, Field(ge=1, le=4096)] = key(16, "Rank of the CLIP encoder's LoRA")
    alpha: Positive | None = key(None, "The LoRA is scaled by alpha / rank; default the rank")
    until: Annotated[float, Field(gt=0, le=1)] = key(1.0, "Share of the steps in which the CLIP encoder's LoRA learns")
    lr: Positive | None = key(None, "Learning rate of the CLIP encoder's LoRA; default train.lr")


class NoWeighting(Table):
    scheme: Literal["none"] = "none"


class SigmaSqrt(Table):
    scheme: Literal["sigma_sqrt"]


class LogitNormal(Table):
    scheme: Literal["logit_normal"]
    mean: float = key(0.0, "Mean of the timestep's logit")
    std: Positive = key(1.0, "Standard deviation of the timestep's logit")


class Mode(Table):
    scheme: Literal["mode"]
    scale: float = key(1.29, "Scale of the mode weighting")


class Cosmap(Table):
    scheme: Literal["cosmap"]


class Train(Table):
    steps: Natural | None = key(None, "Number of optimisation steps; set this or train.epochs")
    epochs: Natural | None = key(None, "Number of passes over the images; set this or train.steps")
    batch_size: Natural = key(1, "Number of images per micro-batch")
    accumulate: Natural = key(1, "Number of micro-batches per step")
    lr: Positive | None = key(None, "Learning rate; default 1e-4, with Prodigy 1.0")
    scale_lr: bool = key(False, "Multiply the learning rate by the number of images per step")
    guidance: NotNegative = key(3.5, "Guidance that the transformer is told while it trains")
    max_grad_norm: Positive = key(1.0, "Norm to which gradients are clipped")
    weighting: Annotated[NoWeighting | SigmaSqrt | LogitNormal | Mode | Cosmap, Field(discriminator="scheme")] = key(
        NoWeighting(), "How the timesteps are drawn and weighted"
    )


class AdamW(Table):
    name: Literal["adamw"] = "adamw"
    beta1: Below1 = key(0.9, "Decay of the gradient's average")
    beta2: Below1 = key(0.999, "Decay of the squared gradient's average")
    eps: Positive = key(1e-8, "Small number added to the denominator")
    weight_decay: NotNegative = key(1e-4, "Weight decay of the LoRA")


class AdamW8bit(Table):
    name: Literal["adamw8bit"]
    beta1: Below1 = key(0.9, "Decay of the gradient's average")
    beta2: Below1 = key(0.999, "Decay of the squared gradient's average")
    eps: Positive = key(1e-8, "Small number added to the denominator")
    weight_decay: NotNegative = key(1e-4, "Weight decay of the LoRA")


class Prodigy(Table):
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
    d0: Positive = key(1e-6, "First estimate of d")
    growth_rate: Annotated[float, Field(gt=1)] | None = key(
        None, "Factor by which d may grow per step; default no limit"
    )


class Schedule(Table):
    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = key(
        "constant", "Learning rate schedule, by diffusers' names"
    )
    warmup: Whole = key(0, "Number of warm-up steps")
    cycles: Natural = key(1, "Number of hard restarts of cosine_with_restarts")
    power: Positive = key(1.0, "Power of the polynomial schedule")


class Checkpoint(Table):
    every: Natural = key(100, "Number of steps between checkpoints")
    minutes: Positive | None = key(None, "Minutes between checkpoints, in addition to checkpoint.every")
    keep: Natural = key(
        2,
        "Number of newest checkpoints to keep; the last one of each phase and the one with the lowest eval loss are kept too",
    )


class Validate(Table):
    prompts: Annotated[tuple[Line, ...], Field(strict=False)] = key(
        (), "Prompts of the sample pictures, with tokens by their names"
    )
    every: Natural | None = key(None, "Number of steps between sample pictures")
    loss: bool = key(
        True,
        "Compute the eval loss at the end and every validate.every steps; costs nine forward passes, or nine per held-out "
        "image",
    )
    count: Natural = key(1, "Number of pictures per prompt")
    steps: Natural = key(28, "Number of sampling steps per picture")
    size: Side | None = key(None, "Side of the pictures in pixels; default the resolution")


class Stop(Table):
    no_better_for: Natural | None = key(None, "Number of steps without a lower eval loss after which training ends")
    loss_above: Positive | None = key(None, "Eval loss above which training ends")
    at: Positive | None = key(None, "Eval loss at which, or below which, training ends")


class Track(Table):
    to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = key(
        ("tensorboard",), "Where training is logged"
    )


class Export(Table):
    dtype: Dtype = key("bf16", "Number format of the exported files; the rounding error is measured and reported")
    best: bool = key(False, "Export the step with the lowest eval loss instead of the last")


class Hub(Table):
    push: bool = key(False, "Upload the export folder when done")
    repo: Line | None = key(None, "Id of the repository; default one made of the run's name")
    private: bool = key(False, "Make the repository private")


class Notify(Table):
    url: Line | None = key(
        None,
        "Webhook told when a run is done, failed or stopped, and when the queue is done; $NAME stands for a variable of the environment",
    )
    command: Line | None = key(
        None,
        "Command run when a run is done, failed or stopped, and when the queue is done; only with `queue --allow-commands`",
    )


class Compute(Table):
    gpus: Natural = key(1, "Number of GPUs of one run")


class Spec(Table):
    """One run. Values that default to another key's are filled in when the file is read (`runner.spec.loader`)."""

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
    """Every key, defaults included, as plain tables ready for TOML; what is not set is left out."""
    return spec.model_dump(mode="json", by_alias=True, exclude_none=True)
