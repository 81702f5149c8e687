"""What a prefill costs, by calculation."""
