"""herdkern: the Llama 3 recipe, raw web pages to a trained model, on document-masked kernels of its own.

Nothing heavy is imported here; `herdkern.ops` and `herdkern.model` import torch, the data packages never do.
`herdkern.assert_no_leak` and `herdkern.LeakError` are loaded, with torch, when they are named.
"""

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    from herdkern.leak_check import LeakError, assert_no_leak

__all__ = ["LeakError", "__version__", "assert_no_leak"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in ("assert_no_leak", "LeakError"):
        from herdkern import leak_check

        value: object = getattr(leak_check, name)
        return value
    raise AttributeError(f"module 'herdkern' has no attribute {name!r}")
