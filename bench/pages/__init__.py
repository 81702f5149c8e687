"""Pages of dense text: pictures, questions about them, a small Qwen3-VL-MoE that reads them, and its training."""
