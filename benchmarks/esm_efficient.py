"""`virnucpro bench` beside esm-efficient, which is packed, too: the same proteins in the same run, on this GPU.

    python benchmarks/esm_efficient.py [--model 650M] [--seconds 8] [any other option of bench]

esm-efficient calls flash-attn. Where that cannot be installed, PyTorch's own build of FlashAttention-2 answers instead.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from virnucpro_cli.cli import main


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, causal: bool = False,
    softmax_scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """FlashAttention-2 of packed q, k, v [T, H, Dh] in 16 bit, [T, H, Dh]."""
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, False, scale=softmax_scale
    )
    return out


def stand_in() -> None:
    """Modules with the names that esm-efficient imports; it calls `varlen` alone for packed tokens."""
    padding: Any = ModuleType("flash_attn.bert_padding")
    padding.pad_input = padding.unpad_input = None
    flash: Any = ModuleType("flash_attn")
    flash.__spec__ = ModuleSpec("flash_attn", None)
    flash.flash_attn_varlen_func = varlen
    sys.modules |= {"flash_attn": flash, "flash_attn.bert_padding": padding}


if __name__ == "__main__":
    if find_spec("flash_attn") is None:
        stand_in()
    main(["bench", "--packed", "--peers", "esm-efficient", *(sys.argv[1:] or ["--model", "650M"])])
