"""zephyr-lite: distilled SFT, AI feedback and distilled DPO on one GPU (arXiv 2310.16944)."""

__version__ = "0.1.0"
