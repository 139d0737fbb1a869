"""The benchmark: correctness, speed and logit growth of the attention variants."""
