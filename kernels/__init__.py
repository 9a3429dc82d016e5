"""The Triton kernels, imported as ``cnnfast.kernels``. Nothing is imported here: each module needs triton.

The folder lies at the top of the repository, and another package of the name ``kernels`` exists: so this one refuses to
be imported under that name.
"""

if __name__ != "cnnfast.kernels":
    raise ImportError(
        f"this folder is the package cnnfast.kernels and was imported as {__name__!r}: write `import cnnfast.kernels`; "
        "if you meant another package of the name kernels, run Python from a directory other than cnnfast's repository"
    )
