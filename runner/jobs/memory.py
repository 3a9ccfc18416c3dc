"""How much memory each phase of a plan needs at most, by formula; tools/bench/memory.py compares it with reality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from runner.base import quantized_size
from runner.base.architectures import adapted_layers
from runner.base.layers import checkpointed_blocks, linear_layers
from runner.base.param_counts import BaseConfigs, read_base_configs
from runner.jobs import activation_memory, encoder_memory
from runner.jobs.activation_memory import BatchShape, ByteWidths, TrainableLayers
from runner.plan.build import resolutions
from runner.plan.description import resident
from runner.plan.disk import MOMENTS
from runner.plan.phases import (
    Encode,
    Export,
    Plan,
    Prior,
    TrainPhase,
    gradient_checkpointing,
    trained_encoders,
    trains_lora,
)
from runner.spec.dtypes import BYTES, base_dtype
from runner.spec.schema import Spec

LARGE = ("transformer", "text_encoder_2")  # the parts that model.quantize and model.offload change

# What kernels and libraries allocate for themselves. On a GPU: cuBLAS's workspace, 8 x 4 MiB (device.prepare_device)
# for each of two threads. On a CPU: code of the libraries, loaded at its first use, more of it in training. Measured.
GPU_WORKSPACE = 64 << 20
CPU_WORKSPACE, CPU_WORKSPACE_TRAINED = 26 << 20, 47 << 20

# What a card must have besides: CUDA's context and kernels, and what torch's allocator loses to fragmentation.
CONTEXT, FRAGMENTS = 0.75 * 2**30, 0.05
HEAP_HOLES = 0.6  # on a CPU glibc's heap fragments: up to a half of the activations without checkpointing; measured


@dataclass(frozen=True)
class Memory:
    """Bytes at a phase's peak. workspace: what kernels and libraries allocate for themselves."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations + self.workspace

    def as_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def estimate(spec: Spec, plan: Plan, configs: BaseConfigs, *, on_gpu: bool) -> dict[str, Memory]:
    """The peak of each phase, by its name."""
    found: dict[str, Memory] = {}
    trained = False
    for phase in plan.phases:
        trained = trained or isinstance(phase, TrainPhase)
        workspace = GPU_WORKSPACE if on_gpu else CPU_WORKSPACE_TRAINED if trained else CPU_WORKSPACE
        model = _MemoryModel(spec, plan, configs, on_gpu, workspace)
        match phase:
            case Encode():
                found[phase.name] = model.encode(phase)
            case Prior():
                found[phase.name] = model.prior()
            case TrainPhase():
                found[phase.name] = model.train(phase)
            case Export():
                found[phase.name] = model.export(phase)
    return found


def needs(memory: Memory) -> int:
    """Bytes that a card must have for a phase."""
    return int(memory.total * (1 + FRAGMENTS) + CONTEXT)


def peak(spec: Spec, plan: Plan, *, on_gpu: bool) -> tuple[int, str] | None:
    """(bytes, phase): what a card, or else this machine, must have, with a margin. None where the base's configs are
    not known."""
    configs = read_base_configs(spec.model.base)
    if configs is None:
        return None
    memory_by_phase = estimate(spec, plan, configs, on_gpu=on_gpu)
    if on_gpu:
        return max((needs(memory), name) for name, memory in memory_by_phase.items())
    without = {"gradient_checkpointing": False}
    all_saved = with_values(
        spec, {"model": without, "inversion": without}
    )  # all of it passes through the heap at some time
    on_heap = estimate(all_saved, plan, configs, on_gpu=False)
    return max(
        (int(memory.total + HEAP_HOLES * on_heap[name].activations), name) for name, memory in memory_by_phase.items()
    )


def with_values(spec: Spec, update: Mapping[str, Mapping[str, Any]]) -> Spec:
    """A copy with other values, by field of Spec and by key; they are not validated."""
    return spec.model_copy(
        update={table: getattr(spec, table).model_copy(update=dict(values)) for table, values in update.items()}
    )


@dataclass(frozen=True)
class _MemoryModel:
    """One run's memory, by kind of phase."""

    spec: Spec
    plan: Plan
    configs: BaseConfigs
    on_gpu: bool
    workspace: int

    # ---- phases ------------------------------------------------------------------------------------------------------

    def encode(self, phase: Encode) -> Memory:
        """The largest of the models, which encode one after the other."""
        spec, configs, candidates = self.spec, self.configs, []
        tokens = spec.model.max_sequence_length
        if phase.at > 0:  # encoders that were just trained, with the transformer still in memory
            names = {"clip": "text_encoder", "t5": "text_encoder_2"}
            parts = (*self.kept_parts, *(names[encoder] for encoder in phase.encoders))
            buffers = encoder_memory.t5_buffers(configs.t5, 1, tokens, self.narrow) + self.dequantized(parts)
            candidates.append(self.without_training(self.weights(parts), buffers))
        elif "clip" in phase.encoders:
            candidates.append(
                self.single_part("text_encoder", encoder_memory.clip_buffers(configs.clip, 1, self.narrow))
            )
        if phase.at == 0 and "t5" in phase.encoders:
            buffers = encoder_memory.t5_buffers(configs.t5, 1, tokens, self.narrow)
            candidates.append(self.single_part("text_encoder_2", buffers))
        if phase.latents:
            narrow = 4 if spec.model.dtype == "fp16" else self.narrow  # RunContext.vae_base
            pixels = max(width * height for width, height in self.sizes())
            buffers = encoder_memory.vae_encoder_buffers(configs.vae, pixels, narrow)
            candidates.append(self.without_training(self.weights(("vae",), narrow), buffers))
        largest = max(candidates, key=lambda memory: memory.total, default=self.without_training(0, 0))
        if self.on_gpu:
            return largest
        trained = self.parameters_trained_before(phase.at)
        return replace(largest, adapters=4 * trained, optimizer=self.last_checkpoint(trained))

    def prior(self) -> Memory:
        prior = self.spec.prior
        assert prior is not None
        model = self
        if prior.dtype:
            model = replace(self, spec=with_values(self.spec, {"model": {"dtype": prior.dtype}}))
        encoders = ("text_encoder", "text_encoder_2")
        return model.sample(encoders, max(resolutions(self.spec)), prior.batch_size, trained=0)

    def train(self, phase: TrainPhase) -> Memory:
        trained = sum(part.parameters or 0 for part in phase.trains)
        adapters = trained + self.stopped_lora(phase)
        moments = int(4 * trained * MOMENTS[self.spec.optimizer.name])
        last_checkpoint = 0 if self.on_gpu else 4 * trained + moments  # a copy in host memory
        return Memory(
            weights=self.weights(resident(phase)),
            adapters=4 * adapters,
            gradients=4 * trained,
            optimizer=moments + last_checkpoint,
            activations=self.activations(phase),
            workspace=self.workspace,
        )

    def export(self, phase: Export) -> Memory:
        validation = self.spec.validation
        encoders = tuple(part for part in resident(phase) if part.startswith("text_encoder"))
        side = (validation.size or max(resolutions(self.spec))) if validation.prompts else 0
        trained = self.parameters_trained_before(self.plan.steps)
        return self.sample((*self.kept_parts, *encoders), side, 1, trained=trained)

    def activations(self, phase: TrainPhase) -> int:
        """Activations and buffers at the peak of a training step, or of a validation between two steps."""
        spec, configs, narrow, parts = self.spec, self.configs, self.narrow, resident(phase)
        images = spec.train.batch_size * (2 if spec.prior else 1)
        texts = images if self.plan.distinct_texts is None else min(images, self.plan.distinct_texts)  # each read once
        pixels = max(width * height for width, height in self.sizes())
        batch = BatchShape(images, pixels // 256, spec.model.max_sequence_length)
        rows, text_lora = trained_encoders(phase, "token rows"), trained_encoders(phase, "text lora")
        layers = adapted_layers(configs.transformer, spec.lora.layers) if trains_lora(phase) else {}
        trained = TrainableLayers(
            layers, spec.lora.rank, spec.lora.dropout > 0, pooled="clip" in (*rows, *text_lora), states="t5" in rows
        )
        checkpointing = gradient_checkpointing(spec, token_rows=bool(rows))
        selective, every = checkpointing == "selective", 0 if checkpointing == "selective" else checkpointing
        checkpointed = range(configs.blocks) if self.is_offloaded else checkpointed_blocks(configs.blocks, every)
        total = activation_memory.transformer_saved(
            configs.transformer, batch, self.width, trained, checkpointed, recompute=not spec.model.compile,
            selective=selective,
        )  # fmt: skip
        if "text_encoder" in parts:
            rank = spec.text_lora.rank if spec.text_lora and text_lora else 0
            total += encoder_memory.clip_saved(configs.clip, texts, narrow, rank)
        total += activation_memory.backward_buffers(configs.transformer, batch, self.width) + self.dequantized(parts)
        if "text_encoder_2" in parts:
            t5 = encoder_memory.t5_saved(configs.t5, texts, spec.model.max_sequence_length, narrow, selective=selective)
            # A checkpointed T5 runs again when the transformer's activations are gone.
            total = max(total, t5) if self.is_offloaded or every else total + t5
        return max(total, self.validation_buffers(batch))

    def validation_buffers(self, batch: BatchShape) -> int:
        """Of samples that are drawn between two steps, with the VAE loaded besides."""
        validation = self.spec.validation
        if not (validation.every and validation.prompts):
            return 0
        side = validation.size or max(resolutions(self.spec))
        one_image = replace(batch, images=1, img=(side // 16) ** 2)
        forward = activation_memory.forward_buffers(self.configs.transformer, one_image, self.width)
        decoded = encoder_memory.vae_decoder_buffers(self.configs.vae, side * side, self.narrow)
        return self.weights(("vae",)) + max(forward, decoded)

    def sample(self, encoding_parts: tuple[str, ...], side: int, count: int, *, trained: int) -> Memory:
        """Images drawn by stock diffusers: first `encoding_parts` are in memory, then the transformer and the VAE.
        side: of an image in pixels, 0 where none is drawn. trained: parameters of the adapters in use."""
        tokens, narrow, configs = self.spec.model.max_sequence_length, self.narrow, self.configs
        adapters = trained * (narrow if self.on_gpu else narrow + 4)  # on a CPU the checkpoint is in the same memory
        encoding = 0
        if "text_encoder_2" in encoding_parts:
            encoding = encoder_memory.t5_buffers(configs.t5, 1, tokens, narrow) + self.dequantized(encoding_parts)
        parts = ("transformer", *(("vae",) if side else ()))
        batch = BatchShape(count, (side // 16) ** 2, tokens)
        forward = activation_memory.forward_buffers(configs.transformer, batch, self.width) + self.dequantized(parts)
        decoded = encoder_memory.vae_decoder_buffers(configs.vae, count * side * side, narrow)
        moments = self.last_checkpoint(trained)
        first = Memory(self.weights(encoding_parts), adapters, 0, moments, encoding, self.workspace)
        second = Memory(self.weights(parts), adapters, 0, moments, max(forward, decoded), self.workspace)
        return max(first, second, key=lambda memory: memory.total)

    def single_part(self, part: str, buffers: int) -> Memory:
        return self.without_training(self.weights((part,)), buffers + self.dequantized((part,)))

    def without_training(self, weights: int, buffers: int) -> Memory:
        return Memory(weights, 0, 0, 0, buffers, self.workspace)

    # ---- parts of a sum ----------------------------------------------------------------------------------------------

    @property
    def narrow(self) -> int:
        """Bytes of a number of the base."""
        return BYTES[base_dtype(self.spec.model.dtype, on_gpu=self.on_gpu)]

    @property
    def width(self) -> ByteWidths:
        """On a CPU autocast leaves norms in 16 bits."""
        return ByteWidths(self.narrow, 4 if self.on_gpu else self.narrow)

    def weights(self, parts: tuple[str, ...], narrow: int | None = None) -> int:
        """narrow: bytes of a number, where not `self.narrow`."""
        counts = {part: self.configs.parameters[part] for part in parts}
        if self.is_offloaded:
            counts |= {part: self.configs.offloaded_parameters(part) for part in parts if part in LARGE}
        quantizable = sum(matrices for matrices, _ in counts.values())
        other = sum(rest for _, rest in counts.values())
        return quantized_size.weight_bytes(quantizable, other, self.spec.model.quantize, narrow or self.narrow)

    @property
    def is_offloaded(self) -> bool:
        """Whether only the current and the next block are on the device."""
        return self.on_gpu and self.spec.model.offload != "none"

    @property
    def kept_parts(self) -> tuple[str, ...]:
        """What stays on the device from one phase to the next."""
        return () if self.spec.model.compile else ("transformer",)

    def dequantized(self, parts: tuple[str, ...]) -> int:
        """The largest quantized matrix in the base's dtype, which is how it is multiplied."""
        if self.spec.model.quantize == "none" or not {*LARGE} & {*parts}:
            return 0
        layers = linear_layers(self.configs.transformer).values()
        return max(out * inside for out, inside in layers) * self.narrow

    def last_checkpoint(self, trained: int) -> int:
        """The optimizer state in the last checkpoint, which a run on a CPU keeps in memory once it has trained."""
        return 0 if self.on_gpu else int(4 * trained * MOMENTS[self.spec.optimizer.name])

    def parameters_trained_before(self, step: int) -> int:
        phases = [phase for phase in self.plan.training if phase.start < step]
        return sum({part.what: part.parameters or 0 for phase in phases for part in phase.trains}.values())

    def stopped_lora(self, phase: TrainPhase) -> int:
        """Parameters of a LoRA that stays in place though it is no longer trained."""
        if trains_lora(phase) or phase.kind == "lora":
            return 0
        earlier = [each for each in self.plan.training if each.stop <= phase.start]
        return sum(part.parameters or 0 for each in earlier[-1:] for part in each.trains if part.what == "lora")

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Width and height in pixels of what is trained on."""
        yield from self.plan.sizes or ((side, side) for side in resolutions(self.spec))
