"""What autograd saves in one forward pass, counted in bytes of distinct storages; nothing is computed (fake
tensors)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5EncoderModel

from runner.model import flow_matching, fused_lora, lora, recomputation, token_rows
from runner.model.family import PromptEmbeds
from runner.model.flux1 import latents, recompute, recompute_t5
from runner.model.flux1.transformer import predictor


def counted(modules: list[Any], forward: Callable[[], Tensor]) -> int:
    """The parameters are there anyway, so they do not count."""
    own = {
        tensor.untyped_storage()._cdata for module in modules for tensor in (*module.parameters(), *module.buffers())
    }
    seen: dict[int, int] = {}
    kept = []  # so that no storage's place is taken by another one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept.append(tensor)
            seen[storage._cdata] = storage.nbytes()
        return tensor

    real, init = torch.autograd.graph.saved_tensors_hooks, recomputation.RecomputedTensor.__init__

    def lean_hooks(own_pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        def both(tensor: Tensor) -> Any:
            packed = own_pack(tensor)
            return pack(packed) if isinstance(packed, Tensor) else packed

        return real(both, unpack)

    def counted_inputs(
        self: recomputation.RecomputedTensor, op: recomputation.RecomputeOp, inputs: Sequence[Any]
    ) -> None:
        init(self, op, inputs)
        for one in self._inputs:
            if isinstance(one, Tensor):
                pack(one)

    with pytest.MonkeyPatch.context() as patch, real(pack, lambda tensor: tensor):
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", lean_hooks)
        patch.setattr(recomputation.RecomputedTensor, "__init__", counted_inputs)
        forward()
    return sum(seen.values())


@contextlib.contextmanager
def as_on_a_gpu(dtype: torch.dtype) -> Iterator[None]:
    """Autocast to 16 bits as CUDA has it: norms in fp32 (torch's AT_FORALL_FP32), which a CPU's autocast leaves
    alone."""
    if dtype == torch.float32:
        yield
        return

    def in_fp32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, shape: Any, weight: Tensor | None = None, *more: Any) -> Tensor:
            return norm(x.float(), shape, None if weight is None else weight.float(), *more)

        return run

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=dtype):
        for name in ("layer_norm", "rms_norm"):
            patch.setattr(torch.nn.functional, name, in_fp32(getattr(torch.nn.functional, name)))
        yield


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def transformer(
    config: dict[str, Any], layers: list[str], rank: int, dtype: torch.dtype, images: int, img: int, txt: int, *,
    pooled: bool, states: bool, spared: bool = False, again: bool = False,
) -> int:  # fmt: skip
    from diffusers import FluxTransformer2DModel

    cpu = torch.device("cpu")
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "image_ids", lambda h, w, device, dtype: torch.zeros(h * w // 4, 3, dtype=dtype))
        patch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # fake tensors cannot be moved; all are there
        with default_dtype(dtype):
            model = FluxTransformer2DModel(**config).requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, target_modules=layers, init_lora_weights=False), adapter_name=lora.ADAPTER)
        lora.skip_dtype_casts(model, 0.0)
        fused_lora.fuse_linears(model)
        if spared:
            recompute.enable_recompute(model, recompute_projections=again)
        assert {parameter.dtype for parameter in lora.adapter_parameters(model).values()} == {torch.float32}
        predict = predictor(model.train(), 3.5, cpu, dtype)
        noise = torch.randn(images, img, config["in_channels"])
        noised = flow_matching.NoisyBatch(noise, noise, torch.ones(images, 1, 1), torch.ones(images))
        read = PromptEmbeds(
            torch.randn(images, txt, config["joint_attention_dim"], dtype=dtype, requires_grad=states),
            torch.randn(images, config["pooled_projection_dim"], dtype=dtype, requires_grad=pooled),
        )

        def forward() -> Tensor:
            with as_on_a_gpu(dtype):
                out = predict(noised, read, 2, img * 2)
            return out.float().square().mean()

        return counted([model], forward)


def encoder(kind: Any, config: Any, dtype: torch.dtype, captions: int, tokens: int, *, again: bool = False) -> int:
    """With two rows that learn; a T5 with lean blocks."""
    with FakeTensorMode():
        with default_dtype(dtype):
            model = kind(config).requires_grad_(False).eval()
        table = model.get_input_embeddings()
        rows = torch.nn.Parameter(torch.zeros(2, table.weight.shape[1]))
        model.set_input_embeddings(token_rows.TokenRows(table, table.weight.shape[0] - 2, rows))
        ids = torch.zeros(captions, tokens, dtype=torch.long)
        if kind is T5EncoderModel:
            recompute_t5.enable_recompute(model, save_activations=False, recompute_projections=again)
        return counted([model], lambda: model(ids)[0])


def graph(*nodes: Any) -> list[Any]:
    """Every step of autograd behind these."""
    found, waiting = [], list(nodes)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.append(node)
            waiting += [below for below, _ in node.next_functions]
    return found
