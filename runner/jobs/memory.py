"""How much memory each phase of a plan needs at most, by formula. No torch; tools/bench/memory.py holds it against measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from runner.base import quantized_size
from runner.base.architectures import adapted_layers
from runner.base.layers import checkpointed_blocks, linear_layers
from runner.base.param_counts import BaseConfigs, read_base_configs
from runner.jobs import activation_memory
from runner.jobs.activation_memory import BatchShape, ByteWidths, TrainableLayers
from runner.plan.build import resolutions
from runner.plan.description import resident
from runner.plan.disk import MOMENTS
from runner.plan.phases import (
    Encode,
    Plan,
    Prior,
    TrainPhase,
    gradient_checkpointing,
    trained_encoders,
    trains_lora,
)
from runner.spec.dtypes import BYTES, base_dtype
from runner.spec.schema import Spec

LARGE = ("transformer", "text_encoder_2")  # what model.quantize and model.offload are about

# What the kernels hold for themselves. On a GPU: cuBLAS's workspace, 8 x 4 MiB (device.prepare) for each of two threads.
# On a CPU: code of the libraries that is read in at its first use, more of it once something was trained; measured.
GPU_WORKSPACE = 64 << 20
CPU_WORKSPACE, CPU_TRAINED = 26 << 20, 47 << 20

# What a card must have beside it: CUDA's context and kernels, and what torch's allocator cannot fill of its blocks.
CONTEXT, FRAGMENTS = 0.75 * 2**30, 0.05
HEAP = 0.6  # on a CPU glibc's heap keeps holes: of the activations without checkpointing, up to a half; measured
TABLES = {"validation": "validate"}  # as a spec calls them


@dataclass(frozen=True)
class Memory:
    """Bytes at a phase's worst moment. workspace: what kernels and libraries hold for themselves."""

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


def phases(spec: Spec, plan: Plan, *, on_gpu: bool = True) -> dict[str, Memory] | None:
    """By phase; None where the base's configs are not known."""
    shapes = read_base_configs(spec.model.base)
    return estimate(spec, plan, shapes, on_gpu=on_gpu) if shapes else None


def estimate(spec: Spec, plan: Plan, shapes: BaseConfigs, *, on_gpu: bool) -> dict[str, Memory]:
    found: dict[str, Memory] = {}
    trained = False
    for phase in plan.phases:
        trained = trained or isinstance(phase, TrainPhase)
        workspace = GPU_WORKSPACE if on_gpu else CPU_TRAINED if trained else CPU_WORKSPACE
        context = _MemoryModel(spec, plan, shapes, on_gpu, workspace)
        match phase:
            case Encode():
                found[phase.name] = context.encoding(phase, _learned(plan, phase.at))
            case Prior():
                assert spec.prior is not None
                if spec.prior.dtype:
                    context = replace(context, spec=with_values(spec, {"model": {"dtype": spec.prior.dtype}}))
                encoders = ("text_encoder", "text_encoder_2")
                found[phase.name] = context.drawing(encoders, max(resolutions(spec)), spec.prior.batch_size, 0)
            case TrainPhase():
                found[phase.name] = context.training(phase)
            case _:
                size = spec.validation.size or max(resolutions(spec))
                parts = tuple(part for part in resident(phase) if part.startswith("text_encoder"))
                side = size if spec.validation.prompts else 0
                found[phase.name] = context.drawing((*context.kept, *parts), side, 1, _learned(plan, plan.steps))
    return found


def _learned(plan: Plan, step: int) -> int:
    """How many numbers were trained before this step."""
    phases = [phase for phase in plan.training if phase.start < step]
    return sum({part.what: part.parameters or 0 for phase in phases for part in phase.trains}.values())


@dataclass(frozen=True)
class _MemoryModel:
    spec: Spec
    plan: Plan
    shapes: BaseConfigs
    on_gpu: bool
    workspace: int

    @property
    def narrow(self) -> int:
        return BYTES[base_dtype(self.spec.model.dtype, on_gpu=self.on_gpu)]

    @property
    def width(self) -> ByteWidths:
        """On a CPU autocast leaves the norms in 16 bits."""
        return ByteWidths(self.narrow, 4 if self.on_gpu else self.narrow)

    def weights(self, parts: tuple[str, ...], narrow: int | None = None) -> int:
        counts = {part: self.shapes.parameters[part] for part in parts}
        if self.away:
            counts |= {part: self.shapes.offloaded_parameters(part) for part in parts if part in LARGE}
        quantizable = sum(matrices for matrices, _ in counts.values())
        other = sum(rest for _, rest in counts.values())
        return quantized_size.weight_bytes(quantizable, other, self.spec.model.quantize, narrow or self.narrow)

    @property
    def away(self) -> bool:
        """Whether on the device are the block at work and the next one alone."""
        return self.on_gpu and self.spec.model.offload != "none"

    @property
    def kept(self) -> tuple[str, ...]:
        """What stays on the device for the next phase."""
        return () if self.spec.model.compile else ("transformer",)

    def unpacked(self, parts: tuple[str, ...]) -> int:
        """The largest quantised matrix, which is multiplied in the base's dtype."""
        if self.spec.model.quantize == "none" or not {"transformer", "text_encoder_2"} & {*parts}:
            return 0
        layers = linear_layers(self.shapes.transformer).values()
        return max(out * inside for out, inside in layers) * self.narrow

    # ---- phases ------------------------------------------------------------------------------------------------------

    def encoding(self, phase: Encode, learned: int) -> Memory:
        """One model after the other; the most of them."""
        spec, t, rows = self.spec, self.spec.model.max_sequence_length, []
        if phase.at > 0:  # what has just learned reads the captions, beside the transformer
            names = {"clip": "text_encoder", "t5": "text_encoder_2"}
            parts = (*self.kept, *(names[one] for one in phase.encoders))
            read = activation_memory.t5_buffers(self.shapes.t5, 1, t, self.narrow)
            rows.append(Memory(self.weights(parts), 0, 0, 0, read + self.unpacked(parts), self.workspace))
        elif "clip" in phase.encoders:
            rows.append(self.only("text_encoder", activation_memory.clip_buffers(self.shapes.clip, 1, self.narrow)))
        if phase.at == 0 and "t5" in phase.encoders:
            rows.append(self.only("text_encoder_2", activation_memory.t5_buffers(self.shapes.t5, 1, t, self.narrow)))
        if phase.latents:
            narrow = 4 if spec.model.dtype == "fp16" else self.narrow  # RunContext.vae_base
            pixels = max(width * height for width, height in self.sizes())
            made = activation_memory.vae_encoder_buffers(self.shapes.vae, pixels, narrow)
            rows.append(Memory(self.weights(("vae",), narrow), 0, 0, 0, made, self.workspace))
        most = max(rows, key=lambda one: one.total, default=Memory(0, 0, 0, 0, 0, self.workspace))
        return most if self.on_gpu else replace(most, adapters=4 * learned, optimizer=self.last_checkpoint(learned))

    def only(self, part: str, buffers: int) -> Memory:
        return Memory(self.weights((part,)), 0, 0, 0, buffers + self.unpacked((part,)), self.workspace)

    def drawing(self, first_parts: tuple[str, ...], side: int, count: int, learned: int) -> Memory:
        """Pictures by stock diffusers: `first_parts`, the encoders among them, then transformer and VAE. side: 0 where none
        is drawn."""
        t, narrow = self.spec.model.max_sequence_length, self.narrow
        moments = self.last_checkpoint(learned)
        adapters = learned * (narrow if self.on_gpu else narrow + 4)  # on a CPU the checkpoint is in the same memory
        with_t5 = "text_encoder_2" in first_parts
        reading = (
            activation_memory.t5_buffers(self.shapes.t5, 1, t, narrow) + self.unpacked(first_parts) if with_t5 else 0
        )
        first = Memory(self.weights(first_parts), adapters, 0, moments, reading, self.workspace)
        forward = activation_memory.forward_buffers(
            self.shapes.transformer, BatchShape(count, (side // 16) ** 2, t), self.width
        )
        decoded = activation_memory.vae_decoder_buffers(self.shapes.vae, count * side * side, narrow)
        parts = ("transformer", *(("vae",) if side else ()))
        made = max(forward + self.unpacked(parts), decoded)
        second = Memory(self.weights(parts), adapters, 0, moments, made, self.workspace)
        return max(first, second, key=lambda one: one.total)

    def last_checkpoint(self, learned: int) -> int:
        """The optimizer's numbers in the checkpoint that a CPU run holds from its training on."""
        return 0 if self.on_gpu else int(4 * learned * MOMENTS[self.spec.optimizer.name])

    def training(self, phase: TrainPhase) -> Memory:
        spec, shapes, narrow = self.spec, self.shapes, self.narrow
        images = spec.train.batch_size * (2 if spec.prior else 1)
        texts = (
            images if self.plan.distinct_texts is None else min(images, self.plan.distinct_texts)
        )  # each is read once
        pixels = max(width * height for width, height in self.sizes())
        batch = BatchShape(images, pixels // 256, spec.model.max_sequence_length)
        rows, text_lora = trained_encoders(phase, "token rows"), trained_encoders(phase, "text lora")
        layers = adapted_layers(shapes.transformer, spec.lora.layers) if trains_lora(phase) else {}
        what = TrainableLayers(
            layers, spec.lora.rank, spec.lora.dropout > 0, "clip" in (*rows, *text_lora), "t5" in rows
        )  # fmt: skip
        parts = resident(phase)
        how = gradient_checkpointing(spec, token_rows=bool(rows))
        selective, every = how == "selective", 0 if how == "selective" else how
        again = range(shapes.blocks) if self.away else checkpointed_blocks(shapes.blocks, every)
        saved = activation_memory.transformer_saved(
            shapes.transformer, batch, self.width, what, again, lean=not spec.model.compile, selective=selective
        )
        if "text_encoder" in parts:
            rank = spec.text_lora.rank if spec.text_lora and text_lora else 0
            saved += activation_memory.clip_saved(shapes.clip, texts, narrow, rank)
        saved += activation_memory.backward_buffers(shapes.transformer, batch, self.width) + self.unpacked(parts)
        if "text_encoder_2" in parts:
            length = spec.model.max_sequence_length
            own = activation_memory.t5_saved(shapes.t5, texts, length, narrow, selective=selective)
            saved = max(saved, own) if self.away or every else saved + own  # again when the transformer's are gone
        saved = max(saved, self.looking(batch))
        trained = sum(part.parameters or 0 for part in phase.trains)
        held = trained + self.stopped(phase)
        moments = int(4 * trained * MOMENTS[spec.optimizer.name])
        copied = 0 if self.on_gpu else 4 * trained + moments  # the last checkpoint, in host memory
        return Memory(self.weights(parts), 4 * held, 4 * trained, moments + copied, saved, self.workspace)

    def looking(self, batch: BatchShape) -> int:
        """Pictures between two steps: the VAE comes to what is there."""
        own = self.spec.validation
        if not (own.every and own.prompts):
            return 0
        side = own.size or max(resolutions(self.spec))
        one = replace(batch, images=1, img=(side // 16) ** 2)
        forward = activation_memory.forward_buffers(self.shapes.transformer, one, self.width)
        decoded = activation_memory.vae_decoder_buffers(self.shapes.vae, side * side, self.narrow)
        return self.weights(("vae",)) + max(forward, decoded)

    def stopped(self, phase: TrainPhase) -> int:
        """Numbers of a LoRA that stays in place while it learns no more."""
        if trains_lora(phase) or phase.kind == "lora":
            return 0
        before = [one for one in self.plan.training if one.stop <= phase.start]
        return sum(part.parameters or 0 for one in before[-1:] for part in one.trains if part.what == "lora")

    def sizes(self) -> Iterator[tuple[int, int]]:
        yield from self.plan.sizes or ((side, side) for side in resolutions(self.spec))


# ---- cards -----------------------------------------------------------------------------------------------------------


def needs(memory: Memory) -> int:
    """What a card must have for it."""
    return int(memory.total * (1 + FRAGMENTS) + CONTEXT)


def peak(spec: Spec, plan: Plan, *, on_gpu: bool) -> tuple[int, str] | None:
    """(bytes, phase) that a card, or this machine, must have, margin included; None where the base is not known."""
    shapes = read_base_configs(spec.model.base)
    if shapes is None:
        return None
    found = estimate(spec, plan, shapes, on_gpu=on_gpu)
    if on_gpu:
        return max((needs(memory), name) for name, memory in found.items())
    keys = {"gradient_checkpointing": False}
    saving = with_values(spec, {"model": keys, "inversion": keys})  # all of it passes through the heap, in time
    passing = estimate(saving, plan, shapes, on_gpu=False)
    return max((int(memory.total + HEAP * passing[name].activations), name) for name, memory in found.items())


def with_values(spec: Spec, update: Mapping[str, Mapping[str, Any]]) -> Spec:
    return spec.model_copy(
        update={table: getattr(spec, table).model_copy(update=dict(values)) for table, values in update.items()}
    )
