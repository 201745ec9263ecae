"""SGLang on a machine without a GPU.

SGLang 0.5.21 runs on a CPU, but its wheel assumes packages that exist only for GPUs. This module stands in for them
where no GPU is found: in the engine and, because SGLang starts its processes with `spawn`, in each of those.

What is missing, and what stands in for it:

- `triton`: imported everywhere for kernels that the CPU path defines and never launches. A module of decorators.
- `sgl_kernel`: the compiled CPU kernels are on no package index. The two that the plain-torch path calls are written
  here; the others say so when they are called.
- `torchvision`: imported for image models. The CPU build of torch has no matching wheel.
- two Triton kernels of the paged KV allocator, which 0.5.21 launches on a CPU too: the torch code beside them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FLAG = "SGLANG_USE_CPU_ENGINE"  # SGLang's own switch for its CPU platform, which its processes inherit

_STAND_INS = ("triton", "sgl_kernel", "torchvision")

# Model files look these up when they are imported. Operators that SGLang probes for with hasattr must stay absent:
# `convert_weight_packed`, above all, would mean that the CPU has AMX.
_OPERATORS = (
    "apply_rotary_pos_emb_cpu",
    "conv3d_embed_cpu",
    "fused_gdn_gating_cpu",
    "fused_input_proj_cpu",
    "fused_linear_sigmoid_mul",
    "fused_moe_router_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_qkvzba_split_reshape_cat_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_sigmoid_mul_cpu",
    "gptq_marlin_repack",
)


def activate() -> None:
    """Make SGLang importable and runnable in this process, before anything of it is imported."""
    os.environ[FLAG] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # an engine per core beats threads that wait for each other
    # Compiling takes a C++ compiler and half a minute, in the middle of a request.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch._inductor.runtime.triton_compat  # noqa: F401  torch looks for triton now, and finds none

    sys.meta_path.insert(0, _Finder())
    _declare_operators()
    _replace_allocator_kernels()
    _allow_seeds()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the stand-ins to everyone but torch, which would go on to compile with Triton if it saw one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] in _STAND_INS and _importer() != "torch":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        if spec.name == "sgl_kernel":
            return _Kernels(spec.name)
        module = _Decorators(spec.name)
        module.__dict__["__version__"] = "3.0.0"
        if spec.name == "triton":
            module.__dict__.update(cdiv=lambda a, b: -(a // -b), next_power_of_2=lambda n: 1 << (n - 1).bit_length())
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _importer() -> str:
    """The top-level package whose import statement is being carried out."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame and frame.f_globals.get("__name__", "").startswith("importlib"):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0] if frame else ""


class _Names(type):
    """A class with any class attribute that is asked for."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Decorators(types.ModuleType):
    """A module whose every name can be called, used as a decorator, subclassed or looked into."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = _Names(name, (), {"__init__": lambda self, *args, **kwargs: None})
        if not name[0].isupper():
            value = _Decorators(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function

    def __or__(self, other: Any) -> Any:
        return object

    __ror__ = __or__


class _Kernels(types.ModuleType):
    """`sgl_kernel` without its kernels."""

    __version__ = "0.0.0+torch"

    @staticmethod
    def assign_req_to_token_pool_cpu(
        requests: torch.Tensor,
        pool: torch.Tensor,
        starts: torch.Tensor,
        ends: torch.Tensor,
        slots: torch.Tensor,
        _pool_len: int,
    ) -> None:
        """Write each request's new KV slots into its row of the pool, from its start to its end."""
        done = 0
        for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
            pool[request, start:end] = slots[done : done + end - start].to(pool.dtype)
            done += end - start

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"SGLang asked for its compiled kernel {name}, which has no CPU stand-in")

        return missing


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    _Kernels.library = library  # type: ignore[attr-defined]  # the declarations live as long as this object
    for name in _OPERATORS:
        library.define(f"{name}(Tensor a, Tensor b) -> Tensor")
    library.define("murmur_hash32_cpu(Tensor seeds, Tensor positions, Tensor columns) -> Tensor")
    library.impl("murmur_hash32_cpu", _murmur_hash32, "CPU")


def _murmur_hash32(seeds: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (32 bits) of every row's seed and position with every column: what seeded sampling draws from.

    seeds (n, 64-bit), positions (n) and columns (m) make (n, m) of uint32. The algorithm is Austin Appleby's
    (https://github.com/aappleby/smhasher/blob/master/src/MurmurHash3.cpp), over four words and with seed 0.
    """
    import torch

    low = 0xFFFFFFFF  # products wrap around at 64 bits, which leaves the lower 32 right

    def rotate(value: torch.Tensor, bits: int) -> torch.Tensor:
        return (value << bits | value >> 32 - bits) & low

    seeds = seeds.to(torch.int64)[:, None]
    words = (seeds & low, seeds >> 32 & low, positions.to(torch.int64)[:, None], columns.to(torch.int64)[None, :])
    value = torch.zeros((), dtype=torch.int64)
    for word in words:
        value = value ^ rotate(word * 0xCC9E2D51 & low, 15) * 0x1B873593 & low
        value = rotate(value, 13) * 5 + 0xE6546B64 & low
    value = value ^ 16  # bytes hashed
    value = (value ^ value >> 16) * 0x85EBCA6B & low
    value = (value ^ value >> 13) * 0xC2B2AE35 & low
    return (value ^ value >> 16).to(torch.uint32)


def _replace_allocator_kernels() -> None:
    import torch
    from sglang.srt.mem_cache.allocator import paged

    def some(pages: torch.Tensor) -> torch.Tensor:
        """Without a free page, those that requests hold may still do; if not, the caller counts them next and gives up,
        and it does not matter which one it got."""
        return pages if len(pages) else torch.zeros(1, dtype=pages.dtype)

    def extend(
        prefix_lens: torch.Tensor,
        seq_lens: torch.Tensor,
        last_loc: torch.Tensor,
        free_pages: torch.Tensor,
        out: torch.Tensor,
        _width: int,
        page_size: int,
    ) -> None:
        paged.alloc_extend_naive(prefix_lens, seq_lens, last_loc, some(free_pages), out, page_size, out.device)

    def decode(
        seq_lens: torch.Tensor,
        last_loc: torch.Tensor,
        free_pages: torch.Tensor,
        out: torch.Tensor,
        _width: int,
        page_size: int,
    ) -> None:
        needs_page = (seq_lens - 1) % page_size == 0
        pages = some(free_pages)
        fresh = pages[(needs_page.cumsum(0) - 1).clamp(0, len(pages) - 1)] * page_size
        out.copy_(torch.where(needs_page, fresh, last_loc + 1))

    # Triton's are called as `kernel[grid](...)`.
    paged.alloc_extend_kernel = defaultdict(lambda: extend)
    paged.alloc_decode_kernel = defaultdict(lambda: decode)


def _allow_seeds() -> None:
    """SGLang heeds a request's seed only in its deterministic mode, which it offers for GPU attention alone. Torch on a
    CPU needs none of that mode's Triton kernels to be deterministic."""
    import sglang.srt.batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    sglang.srt.batch_invariant_ops.enable_batch_invariant_mode = lambda: None
    _allow_min_p_with_seeds()


def _allow_min_p_with_seeds() -> None:
    """In its deterministic mode SGLang dies of a request with min_p. Leave out what min_p forbids before it samples:
    the tokens are the least likely ones, so it makes no difference to top_k and top_p, which it applies next."""
    from sglang.srt.layers import sampler

    sample = sampler.top_k_top_p_min_p_sampling_from_probs_torch

    def sample_with_min_p(
        probs: torch.Tensor,
        top_ks: torch.Tensor,
        top_ps: torch.Tensor,
        min_ps: torch.Tensor,
        need_min_p_sampling: bool,
        *rest: Any,
        **options: Any,
    ) -> Any:
        if need_min_p_sampling:
            floor = probs.max(dim=-1, keepdim=True).values * min_ps.view(-1, 1)
            probs = probs.masked_fill(probs < floor, 0.0)
        return sample(probs, top_ks, top_ps, min_ps, False, *rest, **options)

    sampler.top_k_top_p_min_p_sampling_from_probs_torch = sample_with_min_p
