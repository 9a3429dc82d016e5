"""The Triton kernels, imported as ``cnnfast.kernels``. Nothing is imported here: each module needs triton.

Each kernel, what it computes, who launches it, and its test (of convolutions in three dimensions, of which conv_hopper
knows nothing, tests/gpu/test_three_dimensions.py):

    conv_transpose.py                cnnfast/gpu/conv.py      tests/gpu/test_conv.py, test_conv_statistics.py
        conv_transpose_kernel        y = act((conv(x) + bias - mean) * rsqrt(var + eps) * scale + shift + residual)
        split_k_epilogue_kernel      the same of conv(x) = the sum of the parts of K
    conv_hopper.py                   cnnfast/gpu/conv_hopper.py                    tests/gpu/test_conv_hopper.py
        conv_hopper_kernel           the first again, for sm_90 in Gluon; off (gpu/conv_hopper_plan.HOPPER)
    conv_wgrad.py                    cnnfast/gpu/conv_wgrad.py                     tests/gpu/test_conv_wgrad.py
        conv_wgrad_kernel            dw[a, b, t] = sum of A[position, a] * B[position at tap t, b] over positions
        sum_splits_kernel            dw = the sum of the parts of the positions
    weight.py                        cnnfast/gpu/weight.py                         tests/gpu/test_weight.py
        gather_weight_kernel         out[slot] = the sum of w's taps of the slot, and its derivative
    norm_act.py                      cnnfast/gpu/norm_act.py  tests/gpu/test_norm_act.py, test_norm_statistics.py
        partial_stats_kernel         count, mean and sum of (x - mean)^2 of each part of each channel
        merge_stats_kernel           mean and 1 / sqrt(var + eps) of their parts; running statistics
        norm_act_kernel              y = act((x - mean) * rstd * weight + bias + residual)
    norm_act_backward.py             cnnfast/gpu/norm_act_backward.py              tests/gpu/test_norm_act.py
        grad_sums_kernel             the sums of dz = grad * act'(z) and of dz * (x - mean) * rstd, by parts
        finish_sums_kernel           dbias, dweight and dslope, and the means that dx takes away
        grad_apply_kernel            dx = rstd * (weight * dz - mean1 - (x - mean) * rstd * mean2)
        act_backward_kernel          dz = grad * act'(y) and dbias, where there is no norm

What they share, device functions:

    activation.py                    act(x) and act'(x), one branch for each row of `cnnfast.activations`
    epilogue.py                      from the accumulator to the store, in any layout; vectors
    indexing.py                      which tile, phase or part a program owns, and where it lies
    product.py                       a @ b: as it is, of operands rounded to TF32, or float32 by three products of TF32
    statistics.py                    statistics stored by parts, and read

The folder lies at the top of the repository, and another package of the name ``kernels`` exists. Under that name this
one is empty: libraries that ask whether the other is there find version 0, which is too old for any of them. (An error
would not do: transformers imports what has no metadata to look for its version.)
"""

if __name__ != "cnnfast.kernels":
    __version__ = "0"
    __path__: list[str] = []  # its modules are not to be found under this name

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"this folder is the package cnnfast.kernels and was imported as {__name__!r}: it has no {name}; write "
            "`import cnnfast.kernels`, or, if you meant another package of the name kernels, run Python from a "
            "directory other than cnnfast's repository"
        )
