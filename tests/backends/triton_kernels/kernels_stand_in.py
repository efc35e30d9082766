"""triton_kernels on a CPU: the functions that moetune calls, with plain torch inside that checks what they check."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

VLLM = {"split_k": 1}
"""The constraints that vLLM sets on Hopper."""
SUPPORTED = {"block_m", "block_k", "split_k", "is_persistent", "fused_scatter", "epilogue_subtile", "num_stages"}
FP4 = SimpleNamespace(name="FP4")


@dataclass
class Tensor:
    """Weights or scales: the data in plain order, the layout's name and its options."""

    data: torch.Tensor
    dtype: Any
    layout: tuple[str, dict[str, int]] = ("", {})


@dataclass
class RoutingData:
    gate_scal: torch.Tensor
    expt_hist: torch.Tensor
    n_expts_tot: int
    n_expts_act: int


@dataclass(frozen=True)
class FnSpecs:
    name: str
    fn: Any
    fn_arg_names: tuple[str, ...]


@dataclass(frozen=True)
class FusedActivation:
    specs: FnSpecs
    fn_args: tuple[float, ...]
    reduction_n: int


@dataclass
class PrecisionConfig:
    weight_scale: Tensor


@dataclass
class Bitmatrix:
    data: torch.Tensor
    shape: list[int]
    shape_max: list[int | None]
    scratchpad: torch.Tensor | None


@dataclass
class Package:
    """The package, and what it was called with.

    Attributes:
        seen: those that held in each call of `matmul_ogs`.
    """

    seen: list[dict[str, int]] = field(default_factory=list)

    def modules(self) -> dict[str, ModuleType]:
        """Returns the modules by name; the package itself lies in an empty folder of this name."""
        flags: Any = _module("triton_kernels.matmul_ogs_details.opt_flags", _opt_flags_constraints=dict(VLLM))

        def update(constraints):
            flags._opt_flags_constraints.update(constraints)

        def reset():
            flags._opt_flags_constraints = {}

        flags.update_opt_flags_constraints, flags.reset_opt_flags_constraints = update, reset

        def matmul_ogs(*given, **named):
            assert flags._opt_flags_constraints.keys() <= SUPPORTED
            self.seen.append(dict(flags._opt_flags_constraints))
            return _matmul_ogs(*given, **named)

        package = _module("triton_kernels", __path__=[str(Path("triton_kernels"))])
        others = (
            _module("triton_kernels.matmul_ogs_details", __path__=[]),
            _module(
                "triton_kernels.matmul_ogs",
                matmul_ogs=matmul_ogs,
                FnSpecs=FnSpecs,
                FusedActivation=FusedActivation,
                PrecisionConfig=PrecisionConfig,
            ),
            _module("triton_kernels.routing", routing_from_bitmatrix=_routing_from_bitmatrix),
            _module("triton_kernels.swiglu", swiglu_fn=_swiglu),
            _module(
                "triton_kernels.tensor",
                Bitmatrix=Bitmatrix,
                FP4=FP4,
                convert_layout=_convert_layout,
                wrap_torch_tensor=lambda data, dtype=None: Tensor(data, dtype or data.dtype),
            ),
            _module("triton_kernels.tensor_details", __path__=[]),
            _module(
                "triton_kernels.tensor_details.layout",
                HopperMXValueLayout="HopperMXValueLayout",
                HopperMXScaleLayout="HopperMXScaleLayout",
            ),
        )
        self.flags = flags
        return {module.__name__: module for module in (package, flags, *others)}


def plant(monkeypatch) -> Package:
    """Puts the stand-in into sys.modules for one test."""
    package = Package()
    for name, module in package.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return package


def _module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


def _convert_layout(tensor, layout, **options):
    return Tensor(tensor.data, tensor.dtype, (layout, options))


def _swiglu(projected, alpha, limit):
    gate, up = projected[:, ::2].clamp(max=limit), projected[:, 1::2].clamp(-limit, limit)
    return gate * (alpha * gate).sigmoid() * (up + 1)


def _routing_from_bitmatrix(bitmatrix, expt_scal, expt_indx, n_expts_tot, n_expts_act):
    assert (expt_scal.dtype, expt_indx.dtype, bitmatrix.data.dtype) == (torch.bfloat16, torch.int16, torch.uint32)
    assert bitmatrix.shape == [len(expt_indx), 32 * bitmatrix.data.shape[1]]
    assert n_expts_act == expt_indx.shape[1]
    for row, ids in zip(bitmatrix.data.tolist(), expt_indx.tolist(), strict=True):
        bits = sum(word << 32 * place for place, word in enumerate(row))
        assert bits == sum(1 << expert for expert in ids if expert >= 0)
    assert torch.equal(expt_scal == -1, expt_indx == -1)
    ids = expt_indx.reshape(-1).int()
    valid = ids >= 0
    order = torch.where(valid, ids, n_expts_tot).argsort(stable=True)[: int(valid.sum())]
    by_expert = torch.full_like(ids, -1)
    by_expert[: len(order)] = order.int()
    place = torch.full_like(ids, -1)
    place[order] = torch.arange(len(order), dtype=torch.int32)
    scal = torch.full_like(expt_scal.reshape(-1), torch.nan)
    scal[: len(order)] = expt_scal.reshape(-1)[order]
    hist = torch.bincount(ids[valid], minlength=n_expts_tot).int()
    gather = SimpleNamespace(src_indx=by_expert, dst_indx=place)
    scatter = SimpleNamespace(src_indx=place, dst_indx=by_expert)
    return RoutingData(scal, hist, n_expts_tot, n_expts_act), gather, scatter


def _matmul_ogs(
    x,
    w,
    bias,
    routing_data,
    gather_indx=None,
    scatter_indx=None,
    precision_config=None,
    gammas=None,
    fused_activation=None,
    y=None,
):
    scale = precision_config.weight_scale
    assert w.layout == ("HopperMXValueLayout", {"mx_axis": 1})
    assert scale.layout == ("HopperMXScaleLayout", {"mx_axis": 1, "num_warps": 8})
    assert w.dtype is FP4
    assert x.dtype == torch.bfloat16
    assert bias is None or bias.dtype == torch.float32
    assert scale.data.shape[1] % 4 == 0, "vLLM #47910"
    assert w.data.shape[1] * 2 == x.shape[-1]
    assert x.is_contiguous()
    top_k, starts = routing_data.n_expts_act, [0, *routing_data.expt_hist.cumsum(0).tolist()]
    products = torch.full((len(routing_data.gate_scal), w.data.shape[2]), torch.nan)
    for expert in range(routing_data.n_expts_tot):
        rows = torch.arange(starts[expert], starts[expert + 1])
        chosen = rows if gather_indx is None else gather_indx.src_indx[rows].long() // top_k
        product = x[chosen].float() @ _dequantized(w.data[expert], scale.data[expert])
        products[rows] = product if bias is None else product + bias[expert]
    if fused_activation is not None:
        products = fused_activation.specs.fn(products, *fused_activation.fn_args)
    if gammas is not None:
        products = products * gammas.float().unsqueeze(1)
    if scatter_indx is not None:
        places = scatter_indx.src_indx.view(-1, top_k).long()
        products = torch.where((places >= 0).unsqueeze(-1), products.bfloat16().float()[places], 0).sum(1)
    assert y.shape == (1, *products.shape)
    y.copy_(products)


def _dequantized(codes, scales):
    """From uint8 `[K/2, N]` and `[K/32, N]`: `[K, N]`. The groups that only pad the scales are left out."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    numbers = values[torch.stack((codes & 15, codes >> 4), 1).reshape(-1, codes.shape[1]).long()]
    return numbers * (2.0 ** (scales.float() - 127)).repeat_interleave(32, 0)[: len(numbers)]
