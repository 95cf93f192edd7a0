# SPDX-License-Identifier: Apache-2.0
"""The functions of the triangle multiplicative update, each from the kernels that are for the tensors it is given.

CUDA C++ on a Hopper GPU where its module finds no reason against it, else Triton. Arguments, results and
errors are those of `triangle_forward` and `triangle_backward`. Which it is, and that the tensors fit each other, is
found once for all calls with tensors of one description. Must not import Transformer Engine or a sibling package of
`kernels`.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Callable, NamedTuple, Optional

import torch

from . import nvrtc, triangle_backward, triangle_forward
from .triangle_forward import Operands
from .triangle_gradients import InputGradients, NormShare, OutputGradients
from .triangle_tiles import GatedProjection, Norm


class _CudaForm(NamedTuple):
    """The CUDA C++ form of a function, which has its name, in a module beside this one.

    `find_reason_against` of that module takes the tensors and says why the function does not. `check`, if there is one,
    raises an error where they do not fit each other; the function then looks at options alone.
    """

    module: str
    check: Optional[str] = "check_tensors"


_CUDA_FORMS = {
    "project_operands": _CudaForm("triangle_project", check="check_operands"),
    "find_operand_amaxes": _CudaForm("triangle_project", check="check_operands"),
    "project_output": _CudaForm("triangle_output"),
    "output_backward": _CudaForm("triangle_output_backward"),
    "project_backward": _CudaForm("triangle_project_backward", check=None),
}
_TRITON_FORMS = {
    "project_operands": triangle_forward.project_operands,
    "find_operand_amaxes": triangle_forward.find_operand_amaxes,
    "project_output": triangle_forward.project_output,
    "output_backward": triangle_backward.output_backward,
    "project_backward": triangle_backward.project_backward,
}
_found: dict[tuple, Callable] = {}
_MAX_FOUND = 4096


def project_operands(
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    **options: object,
) -> Operands:
    """``[a | b] = mask * sigmoid(x Wg^T + bg) * (x Wp^T + bp)``, see `triangle_forward.project_operands`."""
    arguments = (z, norm, projection, mask)
    tensors = (z, norm[0], norm[1], *projection, mask)
    return _find("project_operands", arguments, tensors)(*arguments, **options)


def find_operand_amaxes(
    z: torch.Tensor, norm: Norm, projection: GatedProjection, mask: Optional[torch.Tensor]
) -> torch.Tensor:
    """Largest magnitudes of a and b, see `triangle_forward.find_operand_amaxes`."""
    arguments = (z, norm, projection, mask)
    tensors = (z, norm[0], norm[1], *projection, mask)
    return _find("find_operand_amaxes", arguments, tensors)(*arguments)


def project_output(
    c: torch.Tensor, z: torch.Tensor, norm_in: Norm, norm_out: Norm, output: GatedProjection
) -> torch.Tensor:
    """``sigmoid(x Wgo^T + bgo) * (LN_out(c) Wo^T + bo)``, see `triangle_forward.project_output`."""
    arguments = (c, z, norm_in, norm_out, output)
    tensors = (c, z, norm_in[0], norm_in[1], norm_out[0], norm_out[1], *output)
    return _find("project_output", arguments, tensors)(*arguments)


def output_backward(
    grad_out: torch.Tensor,
    c: torch.Tensor,
    z: torch.Tensor,
    norm_in: Norm,
    norm_out: Norm,
    output: GatedProjection,
    **options: object,
) -> OutputGradients:
    """Backward of `project_output`, see `triangle_backward.output_backward`."""
    arguments = (grad_out, c, z, norm_in, norm_out, output)
    tensors = (grad_out, c, z, norm_in[0], norm_in[1], norm_out[0], norm_out[1], *output)
    return _find("output_backward", arguments, tensors)(*arguments, **options)


def project_backward(
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    z: torch.Tensor,
    norm: Norm,
    projection: GatedProjection,
    mask: Optional[torch.Tensor],
    share: Optional[NormShare] = None,
) -> InputGradients:
    """Backward of `project_operands`, see `triangle_backward.project_backward`."""
    arguments = (grad_a, grad_b, z, norm, projection, mask, share)
    tensors = (
        grad_a,
        grad_b,
        z,
        norm[0],
        norm[1],
        *projection,
        mask,
        *((None,) * 4 if share is None else share),
    )
    return _find("project_backward", arguments, tensors)(*arguments)


def _find(name: str, arguments: tuple, tensors: tuple[Optional[torch.Tensor], ...]) -> Callable:
    """The function for tensors like these; those that do not fit are its error, or raised here."""
    key = (
        name,
        *[
            None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16, x.get_device())
            for x in tensors
        ],
    )
    function = _found.get(key)
    if function is None:
        if len(_found) >= _MAX_FOUND:
            _found.clear()
        function = _found[key] = _choose(name, arguments, tensors[0].get_device())
    return function


def _choose(name: str, arguments: tuple, device_index: int) -> Callable:
    form = _CUDA_FORMS.get(name)
    if form is not None and _runs_cuda_forms(device_index):
        module = importlib.import_module(f".{form.module}", __package__)
        if module.find_reason_against(*arguments) is None:
            if form.check is not None:
                getattr(module, form.check)(*arguments)
            return getattr(module, name)
    return _TRITON_FORMS[name]


@lru_cache(maxsize=None)
def _runs_cuda_forms(device_index: int) -> bool:
    """Whether a device is a Hopper GPU, and what compiles for it is installed. -1 is the CPU, for the interpreter."""
    if device_index < 0 or torch.cuda.get_device_capability(device_index) != (9, 0):
        return False
    try:
        nvrtc.load_bindings()
    except ImportError:
        return False
    return True
