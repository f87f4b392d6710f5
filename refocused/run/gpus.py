"""The table of GPUs: rates, sizes, links and prices. Prices are assumed, as are links whose comment names no measurement."""

import re
from typing import NamedTuple


class GPU(NamedTuple):
    peak: float  # dense bf16 FLOP/s with fp32 accumulation, as the maker says
    sold: float  # GB as sold
    found: float  # GiB of it that torch reports, as users' out-of-memory messages say
    bandwidth: float  # bytes/s of its memory, as the maker says
    link: float  # bytes/s that each of a node's GPUs sends in a ring
    network: float  # bytes/s of a node's network
    price: float  # $ per hour
    ceiling: float | None = None  # FLOP/s that the best of large bf16 products was measured at
    bf16: bool = True  # else `peak` is that of fp16: it has no bf16 products


# links: PCIe 4.0 without peer access goes through host memory, 5 to 15 GB/s in users' NCCL tests; with it about 20, half
# of it for 5.0 and 40; NVLink about 0.8 of 300, 450 and 900 GB/s in NCCL's own tests
HOST4, HOST5, PEER4, PEER5 = 10e9, 20e9, 20e9, 40e9
ETHERNET = 1.25e9  # 10 Gbit/s, where machines are rented one by one
CLOUD = 12.5e9  # 100 Gbit/s: AWS's g5 and g6 of eight GPUs

# words of a GPU's name, all of which are in it; the first line that fits counts
GPUS = {
    # 28 and 34 multiprocessors, each as the RTX 3090's 82 and the RTX 4090's 128 at their clocks; 192 and 128 bit
    "RTX 3060": GPU(25.5e12, 12, 11.7, 360e9, HOST4, ETHERNET, 0.08),
    "RTX 4060 Ti": GPU(44.1e12, 16, 15.6, 288e9, HOST4 / 2, ETHERNET, 0.12),  # the one of 16 GB; 8 lanes
    "RTX 3080": GPU(59.5e12, 10, 9.6, 760e9, HOST4, ETHERNET, 0.20),  # GA102 whitepaper
    "RTX 3090": GPU(71e12, 24, 23.6, 936e9, HOST4, ETHERNET, 0.25),  # GA102 whitepaper; its NVLink is not counted
    "RTX 4090": GPU(165.2e12, 24, 23.6, 1008e9, HOST4, ETHERNET, 0.45),  # Ada whitepaper
    "RTX 5090": GPU(209.5e12, 32, 31.4, 1792e9, HOST5, ETHERNET, 0.75),  # RTX Blackwell whitepaper
    # 4,000 sparse FP4 TOPS of its data sheet, an eighth of them in bf16
    "RTX PRO 6000": GPU(500e12, 96, 94.0, 1792e9, PEER5, CLOUD, 1.80),
    "A6000": GPU(154.8e12, 48, 47.4, 768e9, PEER4, ETHERNET, 0.50),  # RTX A6000 data sheet; without its NVLink
    "L40S": GPU(362e12, 48, 44.4, 864e9, PEER4, CLOUD, 0.90),  # L40S data sheet
    "L4": GPU(121e12, 24, 22.0, 300e9, PEER4, CLOUD, 0.45),  # L4 data sheet; 72 W: far less where it is not cold
    "A10G": GPU(70e12, 24, 22.0, 600e9, PEER4, CLOUD, 0.80),  # A10G data sheet
    "A10": GPU(125e12, 24, 22.0, 600e9, PEER4, CLOUD, 0.60),  # A10 data sheet
    "T4": GPU(65e12, 16, 14.6, 320e9, HOST4 / 2, ETHERNET, 0.15, bf16=False),  # T4 data sheet; PCIe 3
    # V100 data sheet: SXM2, NVLink 300 GB/s; fp16 measured at 89 TFLOP/s, bf16 at 10 (zzc0721/torch-performance-test-data)
    "V100 32GB": GPU(125e12, 32, 31.7, 900e9, 115e9, CLOUD, 0.50, 89e12, bf16=False),
    "V100": GPU(125e12, 16, 15.8, 900e9, 115e9, CLOUD, 0.40, 89e12, bf16=False),
    # A100 data sheet; measured: ml-engineering (Stas Bekman), "Maximum Achievable Matmul FLOPS"; network: AWS p4d
    "A100 PCIe 40GB": GPU(312e12, 40, 39.4, 1555e9, PEER4, CLOUD, 1.10, 252.9e12),
    "A100 40GB": GPU(312e12, 40, 39.4, 1555e9, 230e9, 50e9, 1.20, 271.2e12),
    "A100 PCIe": GPU(312e12, 80, 79.1, 1935e9, PEER4, CLOUD, 1.40, 252.9e12),
    "A100": GPU(312e12, 80, 79.1, 2039e9, 230e9, 50e9, 1.60, 271.2e12),
    # H100 data sheet; measured: the same table; network: AWS p5, 3,200 Gbit/s
    "H100 PCIe": GPU(756e12, 80, 79.1, 2000e9, PEER5, CLOUD, 2.30),
    "H100 NVL": GPU(835e12, 94, 93.1, 3900e9, PEER5, CLOUD, 2.60),  # only pairs of them have NVLink
    "H100": GPU(989.4e12, 80, 79.1, 3350e9, 360e9, 400e9, 2.60, 794.5e12),
    "H200 NVL": GPU(835e12, 141, 139.8, 4800e9, PEER5, CLOUD, 3.40),  # NVLink between two or four of them alone
    "H200": GPU(989.4e12, 141, 139.8, 4800e9, 360e9, 400e9, 3.60, 794.5e12),  # H200 data sheet; H100's products
    "B200": GPU(2250e12, 192, 178.4, 8000e9, 700e9, 400e9, 5.50, 1745e12),  # HGX B200 data sheet; the same table
    # HGX B300 and GB200, GB300 NVL72 data sheets: half of the sparse 4.5 and 5 PFLOP/s; memory as sold in units of 10^9
    "B300": GPU(2250e12, 288, 268.2, 8000e9, 700e9, 400e9, 6.50),
    "GB200": GPU(2500e12, 186, 173.2, 8000e9, 700e9, 400e9, 6.00),
    "GB300": GPU(2500e12, 288, 268.2, 8000e9, 700e9, 400e9, 7.00),
}


OTHERS = {"ti", "super", "laptop", "d", "max", "mig"}  # words that make another card of it, or a slice of one


def find(name: str) -> GPU | None:
    """The GPU of a device's name, such as NVIDIA A100-SXM4-80GB, or of a line here."""
    words = set(re.findall(r"\w+", name.lower()))
    fits = {key: set(key.lower().split()) for key in GPUS}
    return next((GPUS[key] for key, own in fits.items() if words >= own and not (words - own) & OTHERS), None)


def usable(sold: float) -> float:
    """GiB that torch finds on a card, by the GB that it is sold with; 2 percent less for a card that is not in the table."""
    return next((gpu.found for gpu in GPUS.values() if gpu.sold == sold), 0.98 * sold)
