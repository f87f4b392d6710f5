"""What is known of GPUs: the one table of peaks, sizes and prices."""

# part of a GPU's name: (dense bf16 FLOP/s with fp32 accumulation, GB as sold, assumed $ per hour); makers' data sheets
GPUS = {
    "RTX 3080": (59.5e12, 10, 0.20),
    "RTX 4090": (165.2e12, 24, 0.45),
    "A100": (312e12, 80, 1.60),
    "H100 PCIe": (756e12, 80, 2.30),
    "H100 NVL": (835e12, 94, 2.60),
    "H100": (989.4e12, 80, 2.60),
    "H200": (989.4e12, 141, 3.60),
}


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name, None where unknown: an invented peak would be an invented MFU."""
    return next((flops for part, (flops, _, _) in GPUS.items() if part in name), None)


# GB as a card is sold: GiB that torch finds on it, as its users' out-of-memory messages say
FOUND: dict[float, float] = {10: 9.6, 24: 23.6, 80: 79.1}


def usable(sold: float) -> float:
    """GiB that torch finds on a card sold with so many GB; a fiftieth less than its name where nobody has said."""
    return FOUND.get(sold, 0.98 * sold)
