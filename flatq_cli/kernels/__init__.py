"""The CUDA kernels: each op's torch definition, its plan, and its `torch.library` custom op.

    kron_quant, gemm, kv_quant, kv_attention    the ops, one module each: `from flatq_cli.kernels.gemm import w4a4_gemm`
    codes                                       the numerics contract in torch
    device, cases                               what a plan knows of a device; a kernel at one size
    sources, compiler, cuda                     the .cu text, its machine code (NVRTC, cached), a GPU through CuPy
    static, bench                               what compiling tells about speed; what a GPU tells

Nothing here needs a GPU or CuPy to be imported: on the CPU an op computes its definition. CuPy is imported when a
kernel is compiled or launched. The package uses nothing of flatq but itself: it runs from a checkout on a bare machine.
"""
