"""herdkern: the Llama 3 recipe, raw web pages to a trained model, on document-masked kernels of its own.

Nothing heavy is imported here; `herdkern.ops` and `herdkern.model` import torch, the data packages never do.
"""

__version__ = "0.1.0"
