"""Every kernel once, on small data: what compute-sanitizer runs (`python -m flatq_cli.kernels.bench_smoke`)."""

from __future__ import annotations

import torch

from flatq_cli.kernels.bench_work import Shapes, Work, attention_works, gemm_works, kron_works, kv_quant_works

SMALL = Shapes("small", (16, 24), (24, 32), heads=4, kv_heads=2, head_dim=64)


def smoke_works() -> list[Work]:
    """Each kernel on tokens that leave a block half full, odd sizes among them."""
    works: list[Work] = []
    for tokens in (1, 19):
        works += kron_works(((24, 24), (37, 53), (64, 64), (112, 128)), tokens)
        works += [*gemm_works(SMALL, tokens, "w4a4_gemm"), *gemm_works(SMALL, tokens, "w4a8_gemm")]
        works += kv_quant_works(SMALL, tokens)
    works += attention_works(SMALL, batches=(2,), lengths=(77, 1030))
    works += attention_works(SMALL, batches=(2,), lengths=(77, 1030), masked=True)
    return works


def main() -> None:
    """Run every kernel and wait for it."""
    device = torch.device("cuda")
    for work in smoke_works():
        work.make(device)()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
