"""herdkern: the Llama 3 recipe, raw web pages to a trained model, on document-masked kernels of its own.

Nothing heavy is imported here; `herdkern.ops` and `herdkern.model` import torch, the data packages never do.
`herdkern.assert_no_leak`, `patch`, `unpatch` and `nn` are loaded, with torch, when they are named.
"""

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    from herdkern import nn
    from herdkern.integrations.patch import Patch, patch, unpatch
    from herdkern.leak_check import LeakError, assert_no_leak

__all__ = ["LeakError", "Patch", "__version__", "assert_no_leak", "nn", "patch", "unpatch"]

__version__ = "0.1.0"

_HOMES = {
    "LeakError": "herdkern.leak_check",
    "assert_no_leak": "herdkern.leak_check",
    "Patch": "herdkern.integrations.patch",
    "patch": "herdkern.integrations.patch",
    "unpatch": "herdkern.integrations.patch",
}


def __getattr__(name: str) -> object:
    if name == "nn" or name in _HOMES:
        import importlib

        module = importlib.import_module(_HOMES.get(name, "herdkern.nn"))
        value: object = module if name == "nn" else getattr(module, name)
        return value
    raise AttributeError(f"module 'herdkern' has no attribute {name!r}")
