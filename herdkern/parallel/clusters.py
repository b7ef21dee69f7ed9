"""Machines as numbers: what a projection needs to know of a cluster, each number with its source. Needs no torch.

The numbers are rates that were reached, not those of data sheets, wherever somebody measured them.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Link:
    """What moves between devices: seconds = latency_s + bytes / bytes_per_s, one direction, for one device.

    scatters_by_reducing: a reduce-scatter sends as much as an all-reduce, as gloo's does.
    """

    bytes_per_s: float
    latency_s: float
    scatters_by_reducing: bool = False

    def seconds(self, size: float) -> float:
        """The time of one message of `size` bytes; none takes no time."""
        return self.latency_s + size / self.bytes_per_s if size else 0.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal devices.

    memory_bytes: of a device; reserved_bytes of it go to the driver, the collectives' buffers and fragments.
    peak_flops: what utilisation is measured against.  gemm_flops: of a large product of matrices, before what is lost
    to tiles that do not fill all processors at once.  attention_*_flops: of causal attention.
    memory_bytes_per_s: of a copy.  node_link, network: inside a node, between nodes.
    failures_per_device_day: interruptions of a job.  checkpoint_bytes_per_s: of all devices together.
    cores: processors on which all devices of a run are threads, their transfers too, so that nothing is hidden behind
    computing; 0: each device computes alone.  host_block_s: of a block's forward pass, what it takes with hardly a
    token; twice as much backward.
    """

    name: str
    about: str
    devices_per_node: int
    memory_bytes: int
    reserved_bytes: int
    peak_flops: float
    gemm_flops: float
    processors: int
    attention_forward_flops: float
    attention_backward_flops: float
    memory_bytes_per_s: float
    node_link: Link
    network: Link
    failures_per_device_day: float
    checkpoint_bytes_per_s: float
    cores: int = 0
    host_block_s: float = 0.0
    sources: tuple[str, ...] = field(default=(), repr=False)

    @property
    def usable_bytes(self) -> int:
        """What a training step may fill."""
        return self.memory_bytes - self.reserved_bytes

    def link(self, group_span: int) -> Link:
        """The link that bounds a collective of ranks that lie within `group_span` neighbouring devices."""
        return self.node_link if group_span <= self.devices_per_node else self.network

    def gemm_seconds(self, m: int, n: int, k: int) -> float:
        """(m, k) times (k, n): full waves of 128 x 256 tiles on all processors."""
        tiles = math.ceil(m / 128) * math.ceil(n / 256)
        waves = math.ceil(tiles / self.processors)
        return 2.0 * m * n * k / self.gemm_flops * (waves * self.processors / tiles)


_SOURCES = (
    "memory: 81,559 MiB as nvidia-smi shows an 80 GB H100; 2 GiB of it kept back is our assumption",
    "peak: 989.4 TFLOP/s bf16 dense, NVIDIA's data sheet of the H100 SXM",
    "products: 788 TFLOP/s reached at 8192 x 8192 x 8192, bf16, random data, by PyTorch on one H200, whose matrix "
    "rates are the H100's; 812 before its waves of tiles (97 % full)",
    "attention: 566 and 470 TFLOP/s forward and backward, causal, head_dim 128, FlashAttention-3 (arXiv:2407.08608)",
    "memory rate: 3.0 TB/s of the data sheet's 3.35, the share (.9) that copies reach",
    "inside a node: NVLink 900 GB/s both ways (data sheet), 450 one way; 80 % of it and 10 us are our assumption",
    "network: 400 Gb/s RoCE a device (arXiv:2407.21783, section 3.3.1); 85 % of it is our assumption, 30 us within "
    'its "tens of microseconds"',
    "interruptions: 466 in 54 days of 16,384 devices (arXiv:2407.21783, section 3.3.4)",
    "checkpoints: 2 TB/s sustained (arXiv:2407.21783, section 3.3.1)",
)


def h100(
    name: str = "h100", about: str = "Llama 3's: 8 H100 80 GB a node, NVLink, 400 Gb/s RoCE", memory_mib: int = 81_559
) -> Cluster:
    """The cluster of the Llama 3 paper."""
    return Cluster(
        name=name,
        about=about,
        devices_per_node=8,
        memory_bytes=memory_mib << 20,
        reserved_bytes=2 * GIB,
        peak_flops=989.4e12,
        gemm_flops=812e12,
        processors=132,
        attention_forward_flops=566e12,
        attention_backward_flops=470e12,
        memory_bytes_per_s=3.0e12,
        node_link=Link(bytes_per_s=360e9, latency_s=10e-6),
        network=Link(bytes_per_s=42.5e9, latency_s=30e-6),
        failures_per_device_day=466 / 54 / 16_384,
        checkpoint_bytes_per_s=2e12,
        sources=_SOURCES,
    )


def h200() -> Cluster:
    """The same nodes with H200: 141 GB at 4.8 TB/s (data sheet), 4.3 TB/s reached by copies."""
    import dataclasses

    base = h100("h200", "8 H200 141 GB a node, NVLink, 400 Gb/s RoCE", 143_771)
    memory = "memory: 143,771 MiB as nvidia-smi shows an H200, 4.3 TB/s reached by copies; the rest as an H100"
    return dataclasses.replace(base, memory_bytes_per_s=4.3e12, sources=(memory, *_SOURCES[1:]))


CLUSTERS = {"h100": h100, "h200": h200}


def collective_seconds(
    link: Link, ranks: int, size: float, kind: Literal["all_gather", "reduce_scatter", "all_reduce"]
) -> float:
    """A ring over `ranks` of a tensor of `size` bytes, counted where it is whole."""
    if ranks == 1:
        return 0.0
    rounds = 2 if kind == "all_reduce" or (kind == "reduce_scatter" and link.scatters_by_reducing) else 1
    return rounds * (link.seconds(size * (ranks - 1) / ranks) + (ranks - 2) * link.latency_s / 8)
