# SPDX-License-Identifier: Apache-2.0
"""Kernels in CUDA C++, compiled at run time by NVRTC and launched through the driver.

A kernel is a source file beside this one that includes no header but those beside it, and takes one struct. Its machine code is kept
on disk (`$XDG_CACHE_HOME/transformer_engine_batched`, or `~/.cache/...`) and in the process. Both libraries come with
torch (the packages `cuda-bindings` and `nvidia-cuda-nvrtc`): no compiler need be installed. They are imported when
a kernel is asked for. Compiling needs no GPU. Must not import the rest of the package.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import tempfile
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Sequence, Union

import torch

TENSOR_MAP_BYTES = 128
_OPTIONS = (b"--gpu-architecture=sm_90a", b"--std=c++17")
_lock = threading.Lock()
_thread_state = threading.local()


class _Bindings(NamedTuple):
    """Modules of cuda-bindings."""

    driver: Any
    nvrtc: Any


@lru_cache(maxsize=None)
def load_bindings() -> _Bindings:
    """cuda.bindings, imported where it is first needed; an ImportError says how to get it."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise ImportError(
            f"a kernel in CUDA C++ was asked for, and cuda.bindings, which compiles and launches it, cannot be imported "
            f"({error}): pip install 'cuda-bindings>=13.0.3,<14'"
        ) from error
    return _Bindings(driver, nvrtc)


def cache_folder() -> Path:
    """Where machine code is kept: safe to delete at any time."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "transformer_engine_batched"


def compile_cubin(source: str, definitions: Mapping[str, Union[int, str]]) -> bytes:
    """Machine code for sm_90a, from the cache on disk or from NVRTC.

    Parameters
    ----------
    source : str
        CUDA C++; the only headers are the files `*.cuh` beside this one.
    definitions : mapping
        Preprocessor definitions; strings are taken as they are.

    Raises
    ------
    RuntimeError
        The source does not compile: with the compiler's log.
    ImportError
        The package cuda-bindings is missing.
    """
    options = [*_OPTIONS, *(f"-D{name}={value}".encode() for name, value in definitions.items())]
    version = _check(load_bindings().nvrtc.nvrtcVersion())
    headers = _read_headers()
    key = hashlib.sha256(repr((source, headers, options, version)).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin = _compile(source, headers, options)
    _keep(path, cubin)
    return cubin


def _compile(source: str, headers: Mapping[str, str], options: Sequence[bytes]) -> bytes:
    nvrtc = load_bindings().nvrtc
    names = [name.encode() for name in headers]
    texts = [text.encode() for text in headers.values()]
    program = _check(
        nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", len(headers), texts, names)
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), list(options))
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(
                f"NVRTC could not compile a kernel with {b' '.join(options).decode()}:\n"
                f"{log.rstrip(bytes(1)).decode(errors='replace')}"
            )
        cubin = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _keep(path: Path, cubin: bytes) -> None:
    """Writes a file of the cache so that no other process sees half of it; a read-only home has no cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(cubin)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError:
        pass


class Kernel:
    """One compiled form of a source: compiled and loaded at its first launch on a device.

    Parameters
    ----------
    file_name : str
        Source beside this module.
    entry : str
        Its `extern "C"` kernel, which takes one struct by value.
    definitions : mapping
        See `compile_cubin`.
    num_threads, shared_bytes : int
        Threads and dynamic shared memory of a CTA.
    waits : bool, default = False
        Programmatic dependent launch: CTAs start where the kernel before has none left. All of them must call
        `wait_for_kernel_before` before they read or write tensors.
    """

    def __init__(
        self,
        file_name: str,
        entry: str,
        definitions: Mapping[str, Union[int, str]],
        num_threads: int,
        shared_bytes: int,
        waits: bool = False,
    ) -> None:
        self._file_name = file_name
        self._entry = entry
        self._definitions = definitions
        self._num_threads = num_threads
        self._shared_bytes = shared_bytes
        self._waits = waits
        self._functions: dict[int, Any] = {}

    def launch(self, num_ctas: int, parameters: bytes, device_index: int) -> None:
        """Launches on the current stream of a device; `parameters` are the bytes of the struct."""
        if device_index != torch.cuda.current_device():
            with torch.cuda.device(device_index):
                self.launch(num_ctas, parameters, device_index)
            return
        function = self._functions.get(device_index) or self._load(device_index)
        # The driver copies the struct before the call returns.
        pointer = ctypes.c_char_p(parameters)
        if self._waits:
            config = _make_config(num_ctas, self._num_threads, self._shared_bytes)
            config.hStream = torch._C._cuda_getCurrentRawStream(device_index)
            driver = load_bindings().driver
            _call_driver(driver.cuLaunchKernelEx, config, function, ctypes.addressof(pointer), 0)
            return
        _call_driver(
            load_bindings().driver.cuLaunchKernel,
            function,
            *(num_ctas, 1, 1),
            *(self._num_threads, 1, 1),
            self._shared_bytes,
            torch._C._cuda_getCurrentRawStream(device_index),
            ctypes.addressof(pointer),
            0,
        )

    def _load(self, device_index: int) -> Any:
        with _lock:
            if device_index not in self._functions:
                cubin = compile_cubin(_read_source(self._file_name), self._definitions)
                driver = load_bindings().driver
                torch.cuda.set_device(device_index)
                module = _call_driver(driver.cuModuleLoadData, cubin)
                function = _check(driver.cuModuleGetFunction(module, self._entry.encode()))
                attribute = driver.CUfunction_attribute
                _check(
                    driver.cuFuncSetAttribute(
                        function,
                        attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                        self._shared_bytes,
                    )
                )
                self._functions[device_index] = function
            return self._functions[device_index]


def _make_config(num_ctas: int, num_threads: int, shared_bytes: int) -> Any:
    """Of a programmatic dependent launch, but for the stream. A thread's own: another may launch meanwhile."""
    configs = _thread_state.__dict__.setdefault("configs", {})
    key = (num_ctas, num_threads, shared_bytes)
    config = configs.get(key)
    if config is None:
        if len(configs) >= 256:
            configs.clear()
        driver = load_bindings().driver
        attribute = driver.CUlaunchAttribute()
        names = driver.CUlaunchAttributeID
        attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = num_ctas, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.attrs, config.numAttrs = [attribute], 1
        configs[key] = config
    return config


@lru_cache(maxsize=None)
def _read_source(file_name: str) -> str:
    return (Path(__file__).parent / file_name).read_text(encoding="utf-8")


@lru_cache(maxsize=None)
def _read_headers() -> dict[str, str]:
    paths = sorted(Path(__file__).parent.glob("*.cuh"))
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


@lru_cache(maxsize=4096)
def encode_tensor_map(
    address: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
) -> bytes:
    """Descriptor for bulk copies of boxes of a tensor of bytes, with zeros outside the tensor.

    Parameters
    ----------
    address : int
        A multiple of 16.
    sizes, box : tuple of int
        Innermost dim first; ``box[0]`` is 128, which is swizzled as the tensor cores read it.
    strides : tuple of int
        Bytes, multiples of 16, of all dims but the first.
    """
    driver = load_bindings().driver
    tensor_map = _call_driver(
        driver.cuTensorMapEncodeTiled,
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        len(sizes),
        address,
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride) for stride in strides],
        [driver.cuuint32_t(size) for size in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    words = [int(word) for word in tensor_map.opaque]
    return struct.pack(f"<{TENSOR_MAP_BYTES // 8}Q", *words)


def _call_driver(function: Callable[..., tuple], *arguments: object) -> Any:
    """The value of a call of the driver, in the context of torch's current device.

    A thread whose first CUDA work this is has no context: torch binds it, and the call is repeated.
    """
    status, *values = function(*arguments)
    if status == load_bindings().driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        torch.cuda.set_device(torch.cuda.current_device())
        status, *values = function(*arguments)
    return _check((status, *values))


def _check(result: tuple) -> Any:
    """The value of a driver or NVRTC call, or an error with the name of its status."""
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"a call of the CUDA driver or of NVRTC failed with {status.name}")
    return values[0] if values else None
