"""The compile matrix: every case of every kernel, compiled for accelerators that this machine does not have.

`make aot`, or `python -m pallas_kernels.aot --help`. The TPU half needs libtpu (.venv-tpu), the GPU half XLA's CUDA compiler
and ptxas (.venv-cuda); neither needs the device. Each target is compiled for in a process of its own (worker.py), so that a
compiler that crashes costs one row.

    targets.py    the seven targets and their limits
    results.py    what is known of a compiled case, and the verdict
    tpu.py, bundles.py    the TPU compiler, and the static schedule that it writes down
    cuda.py, ptx.py       the CUDA compilers, and what ptxas says of registers and spills
    worker.py, pool.py    the process that compiles, and those that wait for it
    counts.py     static counts of two kernels side by side, for benchmarks
"""
