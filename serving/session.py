"""Opens the graphs of bundles."""

from pathlib import Path

import onnxruntime

from hashtab.serving.errors import BundleError


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a graph for the CPU.

    Args:
        path: of the ONNX file.
        threads: that one call may use.

    Raises:
        BundleError: if onnxruntime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path} cannot be loaded by onnxruntime: {reason}") from error
